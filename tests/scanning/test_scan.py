"""`adept_fx.scan` and its command line, against what hooks on the model see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import adept_fx
from adept_fx import cli, files
from adept_fx.errors import ConfigError, InputError
from adept_fx.scanning.measure import _points
from adept_fx.scanning.proposal import propose
from adept_fx.scanning.result import Layer, Scan
from adept_fx.texts import texts_of
from models import tiny


def _ids(seed: int, *shape: int) -> Tensor:
    return torch.randint(3, 100, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _by_hand(model: Any, ids: Tensor) -> list[Tensor]:
    """Logits after each layer, through the model's own norm and head."""
    states = model(ids[None], output_hidden_states=True).hidden_states
    found = [model.lm_head(model.model.norm(state))[0] for state in states[1:-1]]
    return [*found, model(ids[None]).logits[0]]


def test_every_layer_says_what_the_model_would() -> None:
    model = tiny("llama")
    texts = [_ids(0, 12), _ids(1, 7)]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    found = adept_fx.scan(model, texts)
    assert model.training
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    model.eval()
    said = [torch.cat(parts) for parts in zip(*(_by_hand(model, t) for t in texts), strict=True)]
    *early, final = said
    assert [layer.after for layer in found.layers] == [1, 2, 3]
    assert (found.num_layers, found.tokens) == (4, 19)
    inner = [*range(11), *range(12, 18)]  # those that have a next token
    targets = torch.cat([text[1:] for text in texts])
    assert found.loss == pytest.approx(float(F.cross_entropy(final[inner], targets)), rel=1e-4)
    agreed = torch.zeros(19, dtype=torch.bool)
    for layer, logits in zip(found.layers, early, strict=True):
        agrees = logits.argmax(-1) == final.argmax(-1)
        assert layer.agreement == pytest.approx(float(agrees.float().mean()))
        assert layer.earliest == pytest.approx(float((agrees & ~agreed).float().mean()))
        agreed |= agrees
        expected = F.cross_entropy(logits[inner], targets)
        assert layer.loss == pytest.approx(float(expected), rel=1e-4)
        p, q = final.log_softmax(-1), logits.log_softmax(-1)
        assert layer.divergence == pytest.approx(
            float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3
        )


def test_exit_points_are_all_or_evenly_spread() -> None:
    assert _points(4) == (1, 2, 3)
    assert _points(17) == tuple(range(1, 17))
    assert len(_points(32)) == 16
    assert 0 < min(_points(80)) <= max(_points(80)) < 80


def test_texts_are_cut_and_counted() -> None:
    data = [{"input_ids": list(range(7))}, torch.arange(6).view(2, 3), [1], list(range(50))]
    found = [len(piece) for piece in texts_of(data, tokens=20, length=4)]
    assert found == [4, 3, 3, 3, 4, 3]
    for wrong in ("text", torch.zeros(3), [[1], [2, 3]], torch.zeros(1, 2, 3, dtype=torch.long)):
        with pytest.raises(InputError, match="item 0 of the dataset holds no token ids"):
            list(texts_of([wrong], 10, 10))


# Two exit points of four layers, eight tokens: those that are sure are right, but for one.
AGREES = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, 0, 1, 1]]).bool()
SURE = torch.tensor(
    [[0.9, 0.8, 0.1, 0.2, 0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.8, 0.7, 0.1, 0.75, 0.7, 0.6]]
)


def test_proposals_keep_their_target_and_save_most() -> None:
    exact = propose(AGREES, SURE, (1, 3), 4, 1.0)
    assert exact.agreement == 1.0
    assert exact.exits == (1, 3)
    # Two leave at 1, one more at 3.
    assert exact.saved == pytest.approx((2 * 3 / 4 + 1 / 4) / 8)
    assert 0.75 <= exact.threshold < 0.8
    loose = propose(AGREES, SURE, (1, 3), 4, 0.8)
    assert loose.agreement >= 0.8
    assert loose.saved > exact.saved
    nothing = propose(torch.zeros_like(AGREES), SURE, (1, 3), 4, 0.97)
    assert (nothing.exits, nothing.threshold, nothing.saved) == ((), 1.0, 0.0)


def _scan(perfect: float, saved: float) -> Scan:
    proposal = propose(AGREES, SURE, (1, 3), 4, 0.97)
    layers = (Layer(1, 0.5, 1.0, 3.0, perfect),)
    changed = type(proposal)(0.97, (1,), 0.9, saved, 0.98)
    return Scan(layers, 4, 8, 2.0, perfect, (changed,))


def test_the_answer_is_plain() -> None:
    assert _scan(0.5, 0.2).pays
    assert "save 20% of the token-layers at 97% agreement" in _scan(0.5, 0.2).verdict
    assert "What 8 tokens would say" in str(_scan(0.5, 0.2))
    assert "Untrained exits will not pay" in _scan(0.5, 0.01).verdict
    assert "Trained gates can get nearer to the 50%" in _scan(0.5, 0.01).verdict
    assert "Early exit will not pay" in _scan(0.05, 0.0).verdict
    assert _scan(0.05, 0.0).to_dict()["pays"] is False


def test_what_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match="the dataset is empty"):
        adept_fx.scan(model, [[5]])
    with pytest.raises(ConfigError, match="at least 2"):
        adept_fx.scan(model, [[5, 6]], length=1)
    ee = adept_fx.transform(model, adept_fx.ExitConfig(exits=(2,)))
    with pytest.raises(ConfigError, match="takes the plain model"):
        adept_fx.scan(ee, [[5, 6]])


def _saved(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{at}": at for at in range(90)} | {"[UNK]": 90}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    tiny("llama").save_pretrained(folder)
    return folder


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text, out = _saved(tmp_path / "m"), tmp_path / "text", tmp_path / "out.json"
    text.write_text(" ".join(f"w{at * at % 83}" for at in range(40)), "utf-8")
    status = cli.main(["scan", str(model), str(text), "--exits", "1,3", "--json", str(out)])
    found = json.loads(out.read_text("utf-8"))
    assert status == (0 if found["pays"] else 1)
    assert [layer["after"] for layer in found["layers"]] == [1, 3]
    assert found["tokens"] == 40
    assert "token-layers" in capsys.readouterr().out


def test_what_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    assert cli.main(["scan", "nowhere/at-all", str(text)]) == 2
    assert "cannot read" in capsys.readouterr().err
    text.write_text("w1 w2", "utf-8")
    assert cli.main(["scan", str(tmp_path), str(text)]) == 2
    assert "cannot load" in capsys.readouterr().err
    monkeypatch.setattr(files, "find_spec", lambda _: None)
    assert cli.main(["scan", str(tmp_path), str(text), "--plot", str(tmp_path / "x.png")]) == 2
    assert "matplotlib" in capsys.readouterr().err

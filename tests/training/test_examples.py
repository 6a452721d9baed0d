"""Datasets of all kinds, padding, and classifiers."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import adept_fx
from adept_fx.errors import ConfigError, InputError
from adept_fx.training.examples import batch, examples_of
from adept_fx.training.exits import ExitLoss
from adept_fx.training.observe import Observation, observe
from classify import LABELS, classifier
from micro import everything, rewritten, settings, texts

ROWS = texts(6, 0)


def _ragged() -> list[Tensor]:
    return [row[: 4 + 5 * at] for at, row in enumerate(ROWS)]


def _datasets() -> dict[str, Any]:
    items = [{"input_ids": row.tolist()} for row in ROWS]
    padded = [{"input_ids": [*row, 0, 0], "attention_mask": [1] * 32 + [0] * 2} for row in ROWS]
    found: dict[str, Any] = {
        "tensor": ROWS,
        "lists": ROWS.tolist(),
        "tensors": list(ROWS),
        "batches": [ROWS[:4], ROWS[4:]],
        "items": items,
        "padded": [{name: list(map(int, v)) for name, v in item.items()} for item in padded],
        "with empty lines": [{"input_ids": []}, *items],
        "a generator": (item for item in items),
    }
    if find_spec("datasets"):
        library: Any = import_module("datasets")
        found["datasets"] = library.Dataset.from_list(items)
        found["datasets, as tensors"] = found["datasets"].with_format("torch")
    return found


@pytest.mark.parametrize("kind", _datasets())
def test_datasets(kind: str) -> None:
    found = examples_of(_datasets()[kind], 100, 32, classes=False)
    assert len(found) == 6
    assert all(torch.equal(found[at]["input_ids"], row) for at, row in enumerate(ROWS))


def test_endless_ones_are_not_read_to_their_end() -> None:
    def endless() -> Any:
        while True:
            yield ROWS[0]

    assert len(examples_of(endless(), 8, 32, classes=False)) == 8
    result = adept_fx.fit(everything(), endless(), settings(steps=1))
    assert result.steps == 1


def _loss(ee: Any, seen: Observation) -> Tensor:
    return ExitLoss(ee, settings(), ("gates", "adapters"))(seen)[0]


def _observed(ee: Any, items: list[dict[str, Tensor]], pad: int = 0) -> Observation:
    with torch.no_grad():
        return observe(ee, batch(items, pad), tokens=1000, seed=None)


def test_padding_changes_nothing() -> None:
    ee = everything()
    torch.nn.init.normal_(ee.adept.gates[0].weight)
    items = [{"input_ids": row} for row in _ragged()]
    alone = [_observed(ee, [item]) for item in items]
    together = _observed(ee, items)
    for name in ("final", "targets"):
        one = torch.cat([getattr(seen, name) for seen in alone])
        torch.testing.assert_close(getattr(together, name), one, rtol=1e-4, atol=1e-5)
    at = 0
    for seen in alone:
        count = len(seen.targets)
        part = together.pick(torch.arange(at, at + count))
        torch.testing.assert_close(_loss(ee, part), _loss(ee, seen), rtol=1e-4, atol=1e-5)
        at += count
    assert at == sum(map(len, _ragged()))


def test_targets_are_the_next_tokens() -> None:
    seen = _observed(everything(), [{"input_ids": ROWS[0, :3]}, {"input_ids": ROWS[1, :5]}])
    assert seen.targets.tolist() == [*ROWS[0, 1:3].tolist(), -1, *ROWS[1, 1:5].tolist(), -1]


def test_tokens_are_chosen_at_random() -> None:
    ee, given = everything(), batch([{"input_ids": row} for row in ROWS], 0)
    with torch.no_grad():
        whole = observe(ee, given, tokens=1000, seed=None)
        some = observe(ee, given, tokens=50, seed=torch.rand(192))
    assert len(some.targets) == len(some.inputs[1].hidden) == 50
    numbers = some.inputs[0].batch_index * 32 + some.inputs[0].token_index
    assert torch.equal(whole.pick(numbers).final, some.final)
    assert len(set(some.inputs[0].batch_index.tolist())) == 6


@pytest.fixture(scope="module")
def classes() -> Any:
    """A classifier whose padding token is not 0."""
    return rewritten(classifier("llama", pad_token_id=3), exits=(1, 3), adapter_rank=2)


def _labelled(name: str = "labels") -> list[dict[str, Any]]:
    return [{"input_ids": row, name: at % LABELS} for at, row in enumerate(_ragged())]


def test_classifiers_see_the_token_that_the_class_is_read_from(classes: Any) -> None:
    data = examples_of(_labelled(), 6, 32, classes=True)
    items = [data[at] for at in range(6)]
    seen = _observed(classes, items, pad=3)
    assert seen.targets.tolist() == [at % LABELS for at in range(6)]
    assert seen.inputs[0].token_index.tolist() == [len(row) - 1 for row in _ragged()]
    with torch.no_grad():
        wanted = torch.cat([classes(row[None], use_cache=False).logits for row in _ragged()])
    found = classes.adept.final_logits(seen.final)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("data", ["labels", "label", None])
def test_classifiers_are_trained(classes: Any, data: str | None) -> None:
    items = _labelled(data) if data else [{"input_ids": row} for row in _ragged()]
    result = adept_fx.fit(classes, items, settings(steps=3, batch_size=3))
    assert result.parts == ("gates", "adapters")
    assert 0 < result.last("loss") < 100


def test_one_token_is_a_text_to_classify(classes: Any) -> None:
    assert len(examples_of([{"input_ids": [5], "label": 1}], 6, 32, classes=True)[0]) == 2
    for wrong, message in (
        ({"input_ids": [[5], [6]], "label": 1}, "is not one text"),
        ({"input_ids": [5], "label": 0.5}, "no class index"),
        ({"input_ids": [5], "label": "good"}, "no class index"),
        ({"input_ids": [5], "label": [1, 0]}, "no class index"),
    ):
        with pytest.raises(InputError, match=message):
            adept_fx.fit(classes, [wrong], settings())


def test_what_classifiers_refuse(classes: Any) -> None:
    with pytest.raises(InputError, match="needs the class of every text"):
        adept_fx.fit(classes, [{"input_ids": ROWS[0]}], settings(backbone="lora"))
    classes.config.pad_token_id = None
    with pytest.raises(ConfigError, match="has no pad_token_id"):
        adept_fx.fit(classes, _labelled(), settings())
    adept_fx.fit(classes, _labelled(), settings(batch_size=1, steps=1))
    classes.config.pad_token_id, classes.config.num_labels = 3, 1
    with pytest.raises(ConfigError, match="no class that exits could agree on"):
        adept_fx.fit(classes, _labelled(), settings())
    classes.config.num_labels = LABELS


def test_classes_of_tokens() -> None:
    ee = rewritten(classifier("llama", "tokens"), exits=(1,), adapter_rank=2)
    result = adept_fx.fit(ee, ROWS, settings(steps=2))
    assert result.last("kl_1") > 0
    with pytest.raises(ConfigError, match="predicts no next token"):
        adept_fx.fit(ee, ROWS, settings(objective="adept", quality="likelihood"))

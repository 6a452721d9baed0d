"""The Hub, with fakes in the place of `huggingface_hub`'s functions."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

import adept_fx
from adept_fx.errors import CheckpointError, ConfigError
from adept_fx.gates import Replay
from shared_exits import CARD, CONFIG, TENSORS, made, said

REAL = huggingface_hub.HfApi


def real(name: str, *args: Any, **options: Any) -> None:
    """Raises if the real method does not take these arguments."""
    inspect.signature(getattr(REAL, name)).bind(None, *args, **options)


class FakeApi:
    """Keeps a repository in a folder, and notes what it was asked."""

    root: Path
    asked: list[tuple[str, dict[str, Any]]]

    def __init__(self, token: Any = None) -> None:
        self.asked.append(("token", {"token": token}))

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        real("create_repo", repo_id, **options)
        self.asked.append(("create_repo", {"repo_id": repo_id, **options}))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_branch(self, repo_id: str, **options: Any) -> None:
        real("create_branch", repo_id, **options)
        self.asked.append(("create_branch", {"repo_id": repo_id, **options}))

    def file_exists(self, repo_id: str, filename: str, *, revision: Any = None) -> bool:
        real("file_exists", repo_id, filename, revision=revision)
        return (self.root / repo_id / filename).is_file()

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: Any = None) -> str:
        real("hf_hub_download", repo_id, filename, revision=revision)
        return str(self.root / repo_id / filename)

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> Any:
        real("upload_folder", repo_id=repo_id, folder_path=folder_path, **options)
        allowed = options.get("allow_patterns")
        sent = [f for f in Path(folder_path).iterdir() if allowed is None or f.name in allowed]
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        for file in sent:
            shutil.copy(file, self.root / repo_id / file.name)
        self.asked.append(
            ("upload", {"repo_id": repo_id, "sent": {f.name for f in sent}} | options)
        )
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    monkeypatch.setattr(FakeApi, "root", tmp_path / "hub", raising=False)
    monkeypatch.setattr(FakeApi, "asked", [], raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)

    def snapshot_download(repo_id: str, **options: Any) -> str:
        real("snapshot_download", repo_id, **options)
        FakeApi.asked.append(("download", {"repo_id": repo_id, **options}))
        if not (FakeApi.root / repo_id).is_dir():
            raise FileNotFoundError("no such repository\nsecond line")
        return str(FakeApi.root / repo_id)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    api = FakeApi()
    FakeApi.asked.clear()
    return api


def test_pushed_and_loaded_again(hub: FakeApi) -> None:
    model, ee = made("mlp")
    url = adept_fx.push_to_hub(ee, "me/exits", private=True, token="secret", commit_message="one")
    assert url == "https://huggingface.co/me/exits/commit/1"
    asked = dict(hub.asked)
    assert asked["token"] == {"token": "secret"}
    assert asked["create_repo"] == {"repo_id": "me/exits", "private": True, "exist_ok": True}
    assert asked["upload"] == {
        "repo_id": "me/exits",
        "sent": {CARD, CONFIG, TENSORS},
        "revision": None,
        "commit_message": "one",
        "create_pr": False,
    }
    card = (hub.root / "me/exits" / CARD).read_text()
    assert 'adept_fx.load(model, "me/exits")' in card
    assert "secret" not in card
    again = adept_fx.load(model, "me/exits", revision="v1", token="other")
    assert dict(hub.asked)["download"] == {
        "repo_id": "me/exits",
        "revision": "v1",
        "token": "other",
        "allow_patterns": [CONFIG, TENSORS],
    }
    assert torch.equal(said(again)[0], said(ee)[0])


def test_a_branch_is_made_and_a_users_card_is_kept(hub: FakeApi) -> None:
    _, ee = made()
    (hub.root / "me/exits").mkdir(parents=True)
    (hub.root / "me/exits" / CARD).write_text("# Mine\n")
    adept_fx.push_to_hub(ee, "me/exits", revision="next", create_pr=True)
    assert (hub.root / "me/exits" / CARD).read_text() == "# Mine\n"
    asked = dict(hub.asked)
    assert asked["create_branch"] == {"repo_id": "me/exits", "branch": "next", "exist_ok": True}
    assert (asked["upload"]["revision"], asked["upload"]["create_pr"]) == ("next", True)


def test_what_cannot_be_saved_reaches_no_hub(hub: FakeApi) -> None:
    _, ee = made()
    ee.adept.set_gates(Replay([]))
    with pytest.raises(ConfigError, match="Replay"):
        adept_fx.push_to_hub(ee, "me/exits")
    with pytest.raises(ConfigError, match="Replay"):
        ee.save_pretrained(hub.root / "x", push_to_hub=True)
    assert not hub.asked


def test_save_pretrained_pushes_base_and_exits_in_one_commit(hub: FakeApi, tmp_path: Path) -> None:
    _, ee = made()
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / "older.txt").write_text("")
    ee.save_pretrained(folder, push_to_hub=True, repo_id="both", token="t", private=True)
    asked = dict(hub.asked)
    assert asked["create_repo"] == {
        "repo_id": "both",
        "exist_ok": True,
        "private": True,
        "token": "t",
    }
    assert [what for what, _ in hub.asked].count("upload") == 1
    assert asked["upload"]["repo_id"] == "me/both"
    assert asked["upload"]["sent"] >= {CARD, CONFIG, TENSORS, "model.safetensors", "config.json"}
    assert "older.txt" not in asked["upload"]["sent"]


def test_what_is_neither_folder_nor_repository(hub: FakeApi, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"'me/none' is no folder here.*: no such repository\n"
    ):
        adept_fx.load(made()[0], "me/none")
    (hub.root / "me/empty").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"there is no exit_config\.json"):
        adept_fx.load(made()[0], "me/empty")


@pytest.mark.parametrize("name", ["../up", "/no/such/folder", "a/b/c", "", "me/x\0y", "~/exits"])
def test_names_that_the_real_library_refuses(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"is no folder|there is no exit_config"):
        adept_fx.load(made()[0], name)


def test_errors_of_the_hub_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
        raise RepositoryNotFoundError("404 Client Error", response=response)

    assert issubclass(RepositoryNotFoundError, HfHubHTTPError)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(CheckpointError, match="404 Client Error"):
        adept_fx.load(made()[0], "me/none")

"""What is published: complete, in one commit, with a card of facts and no paths of this machine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import CommitOperationDelete, HfApi

from qatc.errors import CheckpointError, ConfigError
from qatc.export.hub import plan_push, push
from qatc.output.model_card import write_card
from qatc.recipe.recipe import Recipe
from qatc.storage.directories import EXPORT_FILE
from qatc.storage.files import read_json, write_json
from tests.conftest import make_output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output as a run leaves it, with the places that it came from."""
    path = make_output(tmp_path_factory.mktemp("hub") / "out", Recipe.from_bits("4-8-4"))
    metadata = read_json(path / "qatc.json")
    metadata |= {
        "model": "/home/me/models/tiny",
        "model_is_directory": True,
        "run": {"data": None, "method": "qat"},
        "inputs": {
            "the model /home/me/models/tiny": "00ff",
            "the corpus /home/me/my texts/tiny.data": "11ff",
        },
    }
    write_json(path / "qatc.json", metadata)
    (path / "report.md").write_text("# /home/me/models/tiny at 4-8-4\n")
    (path / "run.yaml").write_text("model: /home/me/models/tiny\n")
    write_card(path)
    return path


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


class Hub:
    """Stands for the hub: what is there, and the commits."""

    def __init__(self, files: list[str]) -> None:
        self.files, self.commits = files, []  # type: ignore[var-annotated]
        self.created: list[tuple[str, bool]] = []
        self.branches: list[str] = []
        self.private = True

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.created.append((repo, private))

    def repo_info(self, repo: str) -> Any:
        return SimpleNamespace(private=self.private)

    def create_branch(self, repo: str, *, branch: str, exist_ok: bool) -> None:
        self.branches.append(branch)

    def list_repo_files(self, repo: str, *, revision: Any) -> list[str]:
        return self.files

    def create_commit(self, repo: str, operations: Any, **options: Any) -> Any:
        self.commits.append((repo, operations, options))
        return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub([".gitattributes"])
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    return hub


def test_everything_is_in_one_commit(output: Path, hub: Hub) -> None:
    planned = plan_push(output, "me/tiny-4-8-4", base_model="them/tiny")
    assert push(planned, private=True) == "https://hub/me/tiny-4-8-4/commit/1"
    assert hub.created == [("me/tiny-4-8-4", True)]
    [(_, operations, options)] = hub.commits
    wanted = {p.name for p in output.iterdir()} - {"run.yaml"}
    assert {operation.path_in_repo for operation in operations} == wanted
    assert planned.sizes["model.safetensors"] == (output / "model.safetensors").stat().st_size
    assert options["revision"] is None


def test_no_path_of_this_machine_leaves_it(output: Path) -> None:
    planned = plan_push(output, "me/tiny-4-8-4")
    for name, held in planned.files.items():
        assert b"/home/me" not in (held if isinstance(held, bytes) else held.read_bytes()), name
    metadata = planned.files["qatc.json"]
    assert isinstance(metadata, bytes)
    plain = json.loads(metadata)
    assert plain["model"] == "tiny"
    assert plain["inputs"] == {"the model tiny": "00ff", "the corpus tiny.data": "11ff"}
    assert plain["digests"] == read_json(output / "qatc.json")["digests"]
    assert any("--base-model" in note for note in planned.notes)


def test_the_card_is_of_the_files(output: Path) -> None:
    planned = plan_push(output, "me/tiny-4-8-4", base_model="them/tiny")
    card = planned.files["README.md"]
    assert isinstance(card, bytes)
    text = card.decode()
    assert "base_model: them/tiny" in text and "THIS_DIRECTORY" not in text
    assert "hf download me/tiny-4-8-4 --local-dir tiny-4-8-4\n" in text
    assert 'qatc.load("tiny-4-8-4")' in text and "vllm serve me/tiny-4-8-4" in text
    assert 'AutoModelForCausalLM.from_pretrained("me/tiny-4-8-4")' in text
    numbers = re.search(r"codes of (\d+) weights \| ([\d,]+)", text)
    assert numbers is not None and int(numbers[1]) == 14


@pytest.mark.parametrize("fact", ["4 bits, one scale per output channel", "codes of 14 weights"])
def test_a_card_that_is_not_so_is_refused(output: Path, fact: str) -> None:
    card = output / "README.md"
    whole = card.read_text()
    assert whole.count(fact) == 1
    card.write_text(whole.replace(fact, fact.replace("4", "3")))
    with pytest.raises(ConfigError, match="--new-card"):
        plan_push(output, "me/tiny")
    assert fact.encode() in plan_push(output, "me/tiny", new_card=True).files["README.md"]  # type: ignore[operator]
    card.write_text(f"{whole}\nMade on a rainy day.\n")
    planned = plan_push(output, "me/tiny", base_model="them/tiny")
    assert b"rainy" in planned.files["README.md"]  # type: ignore[operator]
    assert b"base_model: them/tiny\n" in planned.files["README.md"]  # type: ignore[operator]
    own = plan_push(output, "me/tiny").files["README.md"]
    assert isinstance(own, bytes) and b"base_model" not in own and b"before you publish" not in own
    assert any("written by hand" in note for note in planned.notes)


def test_what_is_there_is_not_overwritten(output: Path, hub: Hub) -> None:
    hub.files += ["model-00001-of-00002.safetensors", "README.md"]
    planned = plan_push(output, "me/tiny")
    with pytest.raises(ConfigError, match="--overwrite"):
        push(planned)
    assert not hub.commits
    push(planned, overwrite=True)
    [(_, operations, _)] = hub.commits
    deleted = [o.path_in_repo for o in operations if isinstance(o, CommitOperationDelete)]
    assert deleted == ["model-00001-of-00002.safetensors"]


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "me/ti ny"])
def test_names(output: Path, repo: str) -> None:
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        plan_push(output, repo)


@pytest.mark.parametrize("how", ["shorter", "a bit"])
def test_a_damaged_output_is_not_published(output: Path, how: str) -> None:
    file = output / "model.safetensors"
    held = bytearray(file.read_bytes())
    held[-100] ^= 1
    file.write_bytes(held if how == "a bit" else held[:-100])
    with pytest.raises(CheckpointError, match="digest" if how == "a bit" else "damaged"):
        plan_push(output, "me/tiny")


def test_a_public_repository_is_none_for_private_models(output: Path, hub: Hub) -> None:
    hub.private = False
    with pytest.raises(ConfigError, match="there and public"):
        push(plan_push(output, "me/tiny"), private=True)
    assert not hub.commits


def test_what_the_hub_does_not_take(
    output: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def invalid(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("Invalid metadata in README.md")

    monkeypatch.setattr(hub, "create_commit", invalid)
    with pytest.raises(ConfigError, match="front matter"):
        push(plan_push(output, "me/tiny"), revision="new")
    assert hub.branches == ["new"]


def test_an_export_without_metadata(output: Path) -> None:
    (output / "qatc.json").unlink()
    (output / EXPORT_FILE).write_text("{}")
    with pytest.raises(ConfigError, match="hf upload me/tiny"):
        plan_push(output, "me/tiny")


def test_without_a_network(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = HfApi(endpoint="http://localhost:9", token="none")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    with pytest.raises(CheckpointError, match="nothing was published"):
        push(plan_push(output, "me/tiny"))

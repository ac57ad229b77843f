"""Publish an output on the Hugging Face hub: in one commit, with a card that its files bear out.

What is uploaded is planned first, without a network: :func:`plan_push` reads every file once and
holds the card against the tensors. :func:`push` then uploads it as one commit, so that nobody ever
downloads half of a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatc.errors import CheckpointError, ConfigError
from qatc.models.cards import CARD, HUB_NAME
from qatc.output import open_output
from qatc.output.model_card import make_card
from qatc.output.stored import measure
from qatc.storage.files import read_json

_METADATA = "qatc.json"
_RUN_FILE = "run.yaml"
"""How the run was called, with paths of the machine that it ran on."""

_REPORT = "report.md"
_PLACE = "THIS_DIRECTORY"
_ABSOLUTE = re.compile(r"(/|~/|[A-Za-z]:\\)\S")
_OF_THE_HUB = (".gitattributes",)


@dataclass(frozen=True)
class Push:
    """What is to be uploaded.

    Attributes:
        repo: the name of the repository, ``OWNER/NAME``.
        files: by their names there: a file as it lies on the disk, or other bytes.
        notes: what a user should know before, a line each.
    """

    repo: str
    files: Mapping[str, Path | bytes]
    notes: Sequence[str]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {
            name: len(held) if isinstance(held, bytes) else held.stat().st_size
            for name, held in self.files.items()
        }


def plan_push(
    source: Path,
    repo: str,
    *,
    base_model: str | None = None,
    new_card: bool = False,
    trust_remote_code: bool = False,
) -> Push:
    """What :func:`push` would upload of an output, or of an export of one; nothing is sent.

    Args:
        source: the directory.
        repo: the name on the hub, ``OWNER/NAME``.
        base_model: the hub name of the model that it was made from, where that was a directory.
        new_card: upload the card as it follows from the files, instead of the ``README.md`` there.
        trust_remote_code: allow code that comes with the model, which is uploaded as well.

    Raises:
        ConfigError: a name is none of the hub's, or the card says what the files do not.
        CheckpointError: the directory is no complete output, or a file of it is damaged.
    """
    for name in (repo, *([base_model] if base_model else [])):
        _require_name(name)
    open_output(source, trust_remote_code=trust_remote_code)
    metadata, notes = read_json(source / _METADATA), []
    if base_model is not None:
        metadata |= {"model": base_model, "model_is_directory": False}
    elif metadata.get("model_is_directory"):
        notes.append(
            "it was made from a directory, which the hub cannot show as its base model; pass"
            " --base-model OWNER/NAME"
        )
    derived = make_card(metadata, read_json(source / "config.json"), measure(source))
    card, changed = derived, False
    if not new_card and (source / CARD).is_file():
        card = (source / CARD).read_text(encoding="utf-8")
        own = make_card(read_json(source / _METADATA), *_described(source))
        changed = card != own
        card = _held_against(card, derived) if changed else derived
    if changed:
        notes.append(f"its {CARD} was written by hand, and says what the files do: it is kept")
    if "license:" not in card.partition("\n---\n")[0]:
        notes.append(f"its card names no license; put that of the base model into {CARD}")
    files = _files(source)
    if _RUN_FILE in files:
        del files[_RUN_FILE]
        notes.append(f"{_RUN_FILE} stays here: it names paths of this machine")
    paths = sorted(_paths(read_json(source / _METADATA)), key=len, reverse=True)
    files[_METADATA] = (json.dumps(_public(metadata, paths), indent=2) + "\n").encode()
    if _REPORT in files:
        text = (source / _REPORT).read_text(encoding="utf-8", errors="backslashreplace")
        files[_REPORT] = str(_public(text, paths)).encode()
    files[CARD] = card.replace(_PLACE, repo).encode("utf-8", errors="backslashreplace")
    return Push(repo, dict(sorted(files.items())), notes)


def push(
    planned: Push,
    *,
    private: bool = False,
    overwrite: bool = False,
    message: str = "Upload a model quantized by qatc",
    revision: str | None = None,
) -> str:
    """Upload, as one commit; the repository is created if there is none.

    Args:
        planned: by :func:`plan_push`.
        private: whether a new repository is private.
        overwrite: replace the model that is there; files of it that have no successor are deleted.
        message: of the commit.
        revision: the branch; the main one by default.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: nobody is logged in or may write there, or there is a model already and no
            ``overwrite``.
        CheckpointError: the hub cannot be reached, or the upload failed; nothing is published then.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with _readable_errors(planned.repo):
        api.create_repo(planned.repo, private=private, exist_ok=True)
        there = set(api.list_repo_files(planned.repo, revision=revision)) - set(_OF_THE_HUB)
        if there - {CARD} and not overwrite:
            raise ConfigError(
                f"{planned.repo} holds {len(there)} files already, {min(there - {CARD})} among"
                " them; choose another --repo, or pass --overwrite to replace the model there"
            )
        operations: list[Any] = [
            CommitOperationAdd(name, held if isinstance(held, bytes) else str(held))
            for name, held in planned.files.items()
        ]
        operations += [CommitOperationDelete(n) for n in sorted(there - planned.files.keys())]
        done = api.create_commit(
            planned.repo, operations, commit_message=message, revision=revision
        )
    return str(done.commit_url)


def _require_name(name: str) -> None:
    if not HUB_NAME.fullmatch(name):
        raise ConfigError(
            f"a repository of the hub is called OWNER/NAME, in letters, digits, -, _ and .; got"
            f" {name!r}"
        )


def _described(source: Path) -> tuple[Mapping[str, Any], Any]:
    return read_json(source / "config.json"), measure(source)


def _held_against(card: str, derived: str) -> str:
    """A card written by hand, all of whose tables are those that follow from the files."""
    wanted = [line for line in derived.splitlines() if line.startswith("| ")]
    found = set(card.splitlines())
    missing = [line for line in wanted if line not in found and "---" not in line]
    if missing:
        raise ConfigError(
            f"the {CARD} was changed, and lacks what the files say, such as {missing[0]!r}; put it"
            " back, or pass --new-card for the card that follows from the files"
        )
    return card


def _files(source: Path) -> dict[str, Path | bytes]:
    """What is uploaded of a directory: its files, but for hidden ones and what is half-written."""
    return {
        path.relative_to(source).as_posix(): path
        for path in source.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
        and not path.name.endswith(".writing")
    }


def _paths(value: Any) -> set[str]:
    """The absolute paths in plain data."""
    if isinstance(value, Mapping):
        return _paths([*value.values()])
    if isinstance(value, list):
        return {path for item in value for path in _paths(item)}
    return {value} if isinstance(value, str) and _ABSOLUTE.match(value) else set()


def _public(value: Any, paths: Sequence[str]) -> Any:
    """Plain data or text with the last part of every one of these paths in its place."""
    if isinstance(value, Mapping):
        return {_public(key, paths): _public(item, paths) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item, paths) for item in value]
    if isinstance(value, str):
        for path in paths:
            value = value.replace(path, Path(path.replace("\\", "/")).name)
    return value


@contextmanager
def _readable_errors(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    # That of the HTTP client below, which is another package in every few versions.
    client_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ConfigError(_LOG_IN.format(repo=repo)) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ConfigError(_LOG_IN.format(repo=repo)) from error
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the hub refused to publish {repo} ({reason}); nothing was published, run the same"
            " command again"
        ) from error
    except (OfflineModeIsEnabled, client_error, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the hub cannot be reached to publish {repo} ({reason}); nothing was published: check"
            " the network and HF_HUB_OFFLINE, and run the same command again"
        ) from error


_LOG_IN = (
    "the hub lets nobody publish {repo} who is not logged in and may write there; log in with"
    " `hf auth login`, or put a token with write access into HF_TOKEN"
)

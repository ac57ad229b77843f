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
from qatc.output import Output, open_output
from qatc.output.directory import digest_of
from qatc.output.model_card import is_hub_name, make_card
from qatc.output.stored import measure
from qatc.storage.directories import EXPORT_FILE
from qatc.storage.files import read_json

_METADATA = "qatc.json"
_RUN_FILE = "run.yaml"
"""How the run was called, with paths of the machine that it ran on."""

_REPORT = "report.md"
_PLACE = "THIS_DIRECTORY"
_READ_THE_HUB = ("from_pretrained", "vllm serve")
_BEHIND_WORDS = re.compile(r"(?<=\s)(/|~/|[A-Za-z]:\\)\S.*$")
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
    if (source / EXPORT_FILE).exists() and not (source / _METADATA).exists():
        raise ConfigError(
            f"{source} is an export that holds no {_METADATA}, which a card is held against; upload"
            f" it by `hf upload {repo} {source}`"
        )
    _require_digests(open_output(source, trust_remote_code=trust_remote_code))
    written, notes = read_json(source / _METADATA), []
    metadata, config, stored = dict(written), read_json(source / "config.json"), measure(source)
    if base_model is not None:
        metadata |= {"model": base_model, "model_is_directory": False}
    elif metadata.get("model_is_directory"):
        notes.append(
            "it was made from a directory, which the hub cannot show as its base model; pass"
            " --base-model OWNER/NAME"
        )
    derived = make_card(metadata, config, stored)
    card, changed = derived, False
    if not new_card and (source / CARD).is_file():
        card = (source / CARD).read_text(encoding="utf-8")
        changed = card != make_card(written, config, stored)
        card = _held_against(card, derived) if changed else derived
    if changed:
        notes.append(f"its {CARD} was written by hand, and says what the files do: it is kept")
    if "license:" not in card.partition("\n---\n")[0]:
        notes.append(f"its card names no license; put that of the base model into {CARD}")
    files = _files(source)
    if _RUN_FILE in files:
        del files[_RUN_FILE]
        notes.append(f"{_RUN_FILE} stays here: it names paths of this machine")
    paths = sorted(_paths(written), key=len, reverse=True)
    files[_METADATA] = (json.dumps(_public(metadata, paths), indent=2) + "\n").encode()
    if _REPORT in files:
        text = (source / _REPORT).read_text(encoding="utf-8", errors="backslashreplace")
        files[_REPORT] = str(_public(text, paths)).encode()
    published = _with_base_model(_of_the_repository(card, repo), metadata)
    files[CARD] = published.encode("utf-8", errors="backslashreplace")
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
        if private and not api.repo_info(planned.repo).private:
            raise ConfigError(
                f"{planned.repo} is there and public; make it private on the hub, or leave out"
                " --private"
            )
        if revision is not None:
            api.create_branch(planned.repo, branch=revision, exist_ok=True)
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


def _require_digests(output: Output) -> None:
    """Raise ``CheckpointError`` if a tensor is not the one that was written."""
    digests, floats = (output.metadata[name] for name in ("digests", "float_digests"))
    found = {name: digest_of(w.codes, w.scale) for name, w in output.weights.items()}
    found |= {name: digest_of(value) for name, value in output.state.items() if name in floats}
    wanted = {**digests, **floats}
    for name, digest in found.items():
        if wanted.get(name, digest) != digest:
            raise CheckpointError(
                f"the tensor {name} of {output.place} is not the one that was written: its digest"
                " differs; quantize or export the model again"
            )


def _of_the_repository(card: str, repo: str) -> str:
    """A card whose commands are of the repository: qatc reads what was downloaded before."""
    name = repo.partition("/")[2]
    lines = [
        line.replace(_PLACE, repo if any(c in line for c in _READ_THE_HUB) else name)
        for line in card.splitlines()
    ]
    text, run = "\n".join(lines) + "\n", "## How to run it\n"
    return text.replace(run, f"{run}\n```\nhf download {repo} --local-dir {name}\n```\n", 1)


def _with_base_model(card: str, metadata: Mapping[str, Any]) -> str:
    """A card that names the base model by its name on the hub, or none."""
    card = re.sub(r"\nIt was made from a directory called [^\n]*\n", "", card)
    front, end, rest = card.partition("\n---\n")
    name = metadata.get("model")
    if not is_hub_name(metadata):
        front = re.sub(r"\nbase_model(_relation)?: [^\n]*", "", front)
    elif re.search(r"^base_model: ", front, re.MULTILINE):
        front = re.sub(r"\nbase_model: [^\n]*", f"\nbase_model: {name}", front)
    else:
        front += f"\nbase_model: {name}\nbase_model_relation: quantized"
    return front + end + rest


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _paths(value: Any) -> set[str]:
    """The absolute paths in plain data, also behind the words of what a key names."""
    if isinstance(value, Mapping):
        keys = {found[0] for key in value if (found := _BEHIND_WORDS.search(key))}
        return keys | _paths([*value.values()])
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
        raise CheckpointError(
            f"the hub refused to publish {repo} ({_line(error)}); nothing was published"
        ) from error
    except ConfigError:
        raise
    except ValueError as error:  # of names and of the card's front matter
        raise ConfigError(
            f"the hub does not take {repo} as it is ({_line(error)}); correct --repo or the front"
            f" matter of {CARD}"
        ) from error
    except (OfflineModeIsEnabled, client_error, ConnectionError, TimeoutError) as error:
        raise CheckpointError(
            f"the hub cannot be reached to publish {repo} ({_line(error)}); nothing was published:"
            " check the network and HF_HUB_OFFLINE, and run the same command again"
        ) from error


_LOG_IN = (
    "the hub lets nobody publish {repo} who is not logged in and may write there; log in with"
    " `hf auth login`, or put a token with write access into HF_TOKEN"
)

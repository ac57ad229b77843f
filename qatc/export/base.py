"""What a format is: a name, and how it is written and read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qatc.errors import ConfigError
from qatc.output import Output, QuantizedWeight, write_output
from qatc.output.directory import copy_companions
from qatc.output.layouts import Form
from qatc.progress import Observer


@dataclass(frozen=True)
class Format:
    """A format that another runtime loads.

    Attributes:
        name: what users call it.
        loads_in: the runtimes that load it.
        write: writes an opened output into an empty directory, with the codes and scales as they
            were trained, bit for bit. What the format cannot hold is a ``ConfigError`` that says
            why, and which format can. What takes long tells the observer.
        read: the inverse: the quantized weights of such a directory by name.
        notes: what a user should know of an opened output in this format, a line each; raises as
            ``write`` does, without writing anything.
        commands: how its runtime is started with what was written into a directory, a line each.
    """

    name: str
    loads_in: str
    write: Callable[[Output, Path, Observer], None]
    read: Callable[[Path], Mapping[str, QuantizedWeight]]
    notes: Callable[[Output], Sequence[str]]
    commands: Callable[[Output, Path], Sequence[str]] = lambda output, directory: ()


def write_with_companions(output: Output, directory: Path, form: Form) -> None:
    """Write an opened output into an empty directory, in a form of :func:`write_output`."""
    copy_companions(output.place, directory)  # the generation config among them, byte for byte
    plain = replace(output, generation_config=None)
    write_output(directory, plain, form=form)


TOKENIZER = "tokenizer.json"
"""What the package tokenizers reads."""

_COMPANIONS = (TOKENIZER, "tokenizer_config.json", "chat_template.jinja")


def copy_tokenizer(output: Output, directory: Path) -> None:
    """Copy the tokenizer of an opened output, as far as it has one."""
    for name in _COMPANIONS:
        if (output.place / name).is_file():
            shutil.copyfile(output.place / name, directory / name)


def end_tokens(output: Output) -> list[int]:
    """The tokens that a text of the model ends with."""
    for source in (output.generation_config, output.config):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return sorted(found) if isinstance(found, list) else [found]
    return []


def context_of(output: Output) -> int | None:
    """Tokens that the model's texts have at most, if its config says so."""
    known: int | None = getattr(output.config.get_text_config(), "max_position_embeddings", None)
    return known


def refuse_windows(output: Output, runtime: str, longest: int | None) -> None:
    """Raise ``ConfigError`` if layers forget what lies behind a window, or keep no KV cache.

    Args:
        output: opened.
        runtime: what it is for, in words.
        longest: tokens of the longest text that it will hold, if that is known.
    """
    config = output.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    # Without kinds of layers, as in Mistral, the window alone makes the mask of all of them.
    if not kinds and window is not None and (longest is None or window < longest):
        kinds = {f"a sliding window of {window} tokens"}
    if kinds := kinds - {"full_attention"}:
        raise ConfigError(
            f"its layers have {', '.join(sorted(kinds))}, and qatc writes caches that hold every"
            f" token for {runtime}; run it by qatc"
        )

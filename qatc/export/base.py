"""What a format is: a name, and how it is written and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qatc.output import Output, QuantizedWeight, write_output
from qatc.output.directory import copy_companions
from qatc.output.layouts import Form


@dataclass(frozen=True)
class Format:
    """A format that another runtime loads.

    Attributes:
        name: what users call it.
        loads_in: the runtimes that load it.
        write: writes an opened output into an empty directory, with the codes and scales as they
            were trained, bit for bit. What the format cannot hold is a ``ConfigError`` that says
            why, and which format can.
        read: the inverse: the quantized weights of such a directory by name.
        notes: what a user should know of an opened output in this format, a line each; raises as
            ``write`` does, without writing anything.
        commands: how its runtime is started with what was written into a directory, a line each.
    """

    name: str
    loads_in: str
    write: Callable[[Output, Path], None]
    read: Callable[[Path], Mapping[str, QuantizedWeight]]
    notes: Callable[[Output], Sequence[str]]
    commands: Callable[[Output, Path], Sequence[str]] = lambda output, directory: ()


def write_with_companions(output: Output, directory: Path, form: Form) -> None:
    """Write an opened output into an empty directory, in a form of :func:`write_output`."""
    copy_companions(output.place, directory)  # the generation config among them, byte for byte
    plain = replace(output, generation_config=None)
    write_output(directory, plain, form=form)

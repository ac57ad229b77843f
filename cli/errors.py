"""How errors end a command: one line, and 2 for a wrong use, 1 for a failure.

Where another process writes to the same place it is 75, which shells know as: try again later.

Signals end it as shells expect: 130 after Ctrl-C, 143 after SIGTERM, 128 and its number in general.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from qatc.cli.terminal import print_error
from qatc.errors import BUSY, BusyError, ConfigError, QatcError
from qatc.machine.signals import Terminated, raising

_OF_A_PATH = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP}
"""What is wrong with a path itself; what is wrong with a disk is told by who writes to it."""


@contextmanager
def readable_errors(interrupted: str = "interrupted") -> Iterator[None]:
    """Turn errors that a user can act on into a line and an exit code.

    Args:
        interrupted: what to say after Ctrl-C or another signal to end.
    """
    try:
        with raising():
            yield
    except QatcError as error:
        print_error(str(error))
        raise typer.Exit(_status(error)) from None
    except Terminated as signal:
        print_error(f"{signal}: {interrupted}")
        raise typer.Exit(128 + signal.number) from None
    except KeyboardInterrupt:
        print_error(interrupted)
        raise typer.Exit(130) from None
    except OSError as error:
        if error.errno not in _OF_A_PATH or error.filename is None:
            raise
        path = os.fsdecode(error.filename)
        print_error(f"cannot open {path}: {error.strerror}; give another path")
        raise typer.Exit(2) from None
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print_error("out of memory; try a smaller --batch-size, --max-length or --rows")
        raise typer.Exit(1) from None


def _status(error: QatcError) -> int:
    if isinstance(error, BusyError):
        return BUSY
    return 2 if isinstance(error, ConfigError) else 1


def _is_out_of_memory(error: Exception) -> bool:
    """Torch has an error of its own on a GPU, and a plain RuntimeError on a CPU."""
    signs = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)

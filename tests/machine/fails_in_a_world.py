"""One of two processes fails while the other waits for it: ``fails_in_a_world HOW``."""

from __future__ import annotations

import os
import signal
import sys

import typer

from qatc.cli.errors import readable_errors
from qatc.errors import ConfigError
from qatc.machine.world import joined


def main(how: str) -> None:
    with readable_errors(), joined("cpu") as world:
        if how == "both":
            raise ConfigError("both cannot")
        if not world.first:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ConfigError("the second cannot")
        world.on_first(lambda: None)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except typer.Exit as end:
        sys.exit(end.exit_code)

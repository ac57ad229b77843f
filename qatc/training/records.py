"""The steps of a training, a line of JSON each, as far as its checkpoints have come.

Of several processes the first one writes them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from qatc.errors import CheckpointError
from qatc.machine.world import current
from qatc.storage.files import sync, write_atomically, writing_to

Record = TypeVar("Record")


class Records(Generic[Record]):
    """A file of records.

    Args:
        file: where they are.
        kind: a dataclass of numbers.

    Attributes:
        history: all of them.
    """

    def __init__(self, file: Path, kind: type[Record]) -> None:
        self.file, self._kind, self._world = file, kind, current()
        self.history: list[Record] = []

    def resume(self, count: int) -> None:
        """Keep the first ``count`` records, those that checkpoints stand for.

        Raises:
            CheckpointError: there are fewer.
        """
        lines: list[str] = []
        if self.file.exists():
            lines = self.file.read_text(encoding="utf-8").splitlines()[:count]
        if len(lines) < count:
            raise CheckpointError(
                f"{self.file} records {len(lines)} steps, but the checkpoints are of {count}; put"
                f" the file back, or remove {self.file.parent} to start over"
            )
        if self.file.exists():
            whole = "".join(f"{line}\n" for line in lines).encode()
            self._world.on_first(write_atomically, self.file, whole)
        self.history = [self._kind(**json.loads(line)) for line in lines]

    def add(self, record: Record) -> None:
        """Write one more."""
        self.history.append(record)
        plain: Any = record
        if not self._world.first:
            return
        with writing_to(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(plain)) + "\n")

    def sync(self) -> None:
        """Bring it to the disk: a checkpoint must not outlive the record of its steps."""
        self._world.on_first(self._sync)

    def _sync(self) -> None:
        with writing_to(self.file):
            sync(self.file)

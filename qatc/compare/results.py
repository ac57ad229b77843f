"""The results of a grid, written once every cell has ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qatc.compare.grid import Cell
from qatc.compare.page import to_html
from qatc.compare.running import failures, records
from qatc.compare.summary import Row, rows_of, to_csv, to_markdown
from qatc.storage.files import write_atomically, write_json
from qatc.storage.locks import locked


def write_results(cells: Sequence[Cell], out: Path) -> list[Row] | None:
    """Write ``compare.md``, ``.csv``, ``.json`` and ``.html`` into ``out``.

    Returns:
        The rows; None where cells have not ended yet, with nothing written: whoever runs the last
        of them writes.

    Raises:
        ConfigError: another process is writing them.
        CheckpointError: they cannot be written.
    """
    finished, others = records(cells, out)
    failed = failures(others, out)
    if len({cell.name for cell in others}) > len(failed):
        return None
    rows = rows_of(finished)
    with locked(out / "compare"):
        plain = {"rows": [row.to_dict() for row in rows], "failed": failed}
        write_json(out / "compare.json", plain)
        texts = {"csv": to_csv(rows), "md": to_markdown(rows, failed)}
        texts["html"] = to_html(rows, failed)
        for ending, text in texts.items():
            write_atomically(out / f"compare.{ending}", text.encode())
    return rows

"""All that is printed: results on stdout, status on stderr."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from qatc.progress import Observer
from qatc.storage.files import to_json

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

_LINE_SECONDS = 30.0
"""Seconds between progress lines where stderr is not a terminal."""


_TALKATIVE = (
    "datasets",
    "huggingface_hub",
    "lm_eval",
    "torch._export",
    "torch._inductor",
    "torch.utils._pytree",
    "torchao",
)


def prepare_streams() -> None:
    """Let no character that comes in or goes out end a command.

    What the terminal's encoding lacks is printed as its escape, as Python does on stderr; bytes
    that are no text come in as surrogates, for whoever reads them to refuse.
    """
    for stream, errors in (
        *((s, "backslashreplace") for s in (sys.stdout, sys.stderr)),
        (sys.stdin, "surrogateescape"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def print_error(message: str) -> None:
    """One line on stderr."""
    err.print(f"[bold red]error:[/] {escape(message)}", highlight=False)


def note(text: str) -> None:
    """A remark on stderr, in one line."""
    err.print(escape(text), style="dim", highlight=False)


def warn_unverified(output: Path) -> None:
    """Say so on stderr if an output was not compared with what was trained."""
    from qatc.output.reading import why_unverified

    reason = why_unverified(output)
    if reason is not None:
        err.print(f"not verified: {escape(reason)}; see qatc verify", style="dim", highlight=False)


def stream(text: str) -> None:
    """Text on stdout as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """A result for machines, on stdout."""
    sys.stdout.write(to_json(value) + "\n")


def print_table(rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on stdout; the first row is its header. Long cells wrap, nothing is cut off."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows[1:]:
        table.add_row(*(escape(cell) for cell in row))
    out.print(table, soft_wrap=False)


def quiet_libraries() -> None:
    """Keep the chatter of libraries off the screen; call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars, beside which ours would jump
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"torch|torchao|transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


class RunDisplay(Observer):
    """Draws a run: stages as lines, work as a bar with rates and time left."""

    def __init__(self) -> None:
        columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=err, transient=True)
        self._task: TaskID | None = None
        self._started = time.monotonic()
        self._first: tuple[float, float] | None = None
        self._last: str | None = None
        self._line = 0.0

    @contextmanager
    def live(self) -> Iterator[RunDisplay]:
        """Draw inside the block."""
        try:
            with self._bar if err.is_terminal else nullcontext():
                yield self
        finally:
            self._end_stage()

    def stage(self, title: str) -> None:
        self._end_stage()
        elapsed = time.monotonic() - self._started
        err.print(f"[dim]{_clock(elapsed)}[/] [bold]{escape(title)}[/]", highlight=False)

    def note(self, text: str) -> None:
        err.print(f"      {escape(text)}", highlight=False)

    def generated(self, sequences: int, total: int, tokens: int) -> None:
        done = f"{sequences}/{total} sequences, {tokens:,} tokens"
        self._show(tokens, sequences / total, done, "tokens/s")
        self._last = done

    def recorded(self, done: int, total: int) -> None:
        self._show(done, done / total, f"teacher recorded of {done}/{total} rows")

    def trained(self, metrics: Any, total: int) -> None:
        text = f"step {metrics.step}/{total}, loss {metrics.loss:.4f}, KL {metrics.kl:.4f}"
        rate = metrics.tokens / max(metrics.seconds, 1e-9)
        self._show(metrics.step, metrics.step / total, f"{text}, {rate:,.0f} tokens/s")
        self._last = text

    def trained_layer(self, metrics: Any, layers: int, steps: int) -> None:
        done = (metrics.layer - 1) * steps + metrics.step
        text = f"layer {metrics.layer}/{layers}, step {metrics.step}/{steps}"
        text += f", error {metrics.loss:.4g}"
        rate = metrics.tokens / max(metrics.seconds, 1e-9)
        self._show(done, done / (layers * steps), f"{text}, {rate:,.0f} tokens/s")
        self._last = text

    def evaluated(self, done: int, total: int) -> None:
        self._show(done, done / total, f"{done}/{total} rows")

    def lowered(self, done: int, total: int) -> None:
        total = max(done, total)
        self._show(done, done / total, f"{done}/{total} parts")

    def _show(self, amount: float, share: float, text: str, unit: str | None = None) -> None:
        now = time.monotonic()
        if self._first is None or amount < self._first[1]:
            self._first, self._line = (now, amount), now
        elapsed, gained = now - self._first[0], amount - self._first[1]
        if unit is not None and elapsed > 0:
            text += f", {gained / elapsed:,.0f} {unit}"
        if share > 0 and gained > 0 and elapsed > 1:
            text += f", {_clock(elapsed * (1 - share) / share)} left"
        if err.is_terminal:
            if self._task is None:
                self._task = self._bar.add_task(text, total=1.0)
            self._bar.update(self._task, completed=share, description=text)
        elif now - self._line > _LINE_SECONDS:
            self._line = now
            err.print(f"      {text}", highlight=False)

    def _end_stage(self) -> None:
        """Leave one line of what the stage came to, in place of its bar."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        if self._last is not None:
            self.note(self._last)
        self._task, self._first, self._last = None, None, None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:d}:{seconds:02d}"

"""The whole estimate of a run: memory, time, disk, and what makes it fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qatc.errors import ConfigError
from qatc.estimate.fit import ASSUMED, Choice, fit, smallest
from qatc.estimate.memory import largest, phases
from qatc.estimate.parts import PhaseMemory
from qatc.estimate.setup import Setup
from qatc.estimate.shapes import Shape
from qatc.estimate.work import Speed, disk, seconds

_UNITS = {"": 1e9, "GB": 1e9, "G": 1e9, "GIB": 2.0**30, "MB": 1e6, "MIB": 2.0**20, "TB": 1e12}


@dataclass(frozen=True)
class Estimate:
    """What a run takes, and what would make it fit.

    Attributes:
        shape: of the model.
        setup: of the run, as it was asked for.
        memory: bytes that a GPU has, or the machine.
        phases: memory of every phase.
        seconds: of the phases that take long; None where no throughput is known.
        disk: bytes by what takes them.
        choice: the cheapest options with which it fits; None where there are none.
        nearest: the choice that needs least, where none fits.
        chosen_phases: memory of every phase with the options of ``choice`` or ``nearest``.
        chosen_seconds, chosen_disk: as ``seconds`` and ``disk``, with these.
    """

    shape: Shape
    setup: Setup
    memory: float
    phases: list[PhaseMemory]
    seconds: Mapping[str, float] | None
    disk: Mapping[str, float]
    choice: Choice | None
    nearest: Choice | None
    chosen_phases: list[PhaseMemory]
    chosen_seconds: Mapping[str, float] | None
    chosen_disk: Mapping[str, float]

    @property
    def fits(self) -> bool:
        """Whether it does, as it was asked for."""
        return largest(self.phases).total <= self.memory

    def to_dict(self) -> dict[str, Any]:
        """Plain data; bytes and seconds."""
        chosen = self.choice or self.nearest
        assert chosen is not None
        return {
            "model": asdict(self.shape) | {"parameters": self.shape.parameters},
            "setup": asdict(self.setup),
            "memory": self.memory,
            "fits": self.fits,
            "largest_phase": largest(self.phases).title,
            "phases": [_plain(phase) for phase in self.phases],
            "seconds": self.seconds,
            "disk": self.disk,
            "options": {
                "fits": self.choice is not None,
                "typed": chosen.typed,
                "added_share_of_a_step": round(chosen.added, 4),
                "phases": [_plain(phase) for phase in self.chosen_phases],
                "seconds": self.chosen_seconds,
                "disk": self.chosen_disk,
            },
        }


def estimate(shape: Shape, setup: Setup, memory: float, speed: Speed | None = None) -> Estimate:
    """Reckon a run.

    Args:
        shape: of the model.
        setup: of the run.
        memory: bytes that each GPU has, or the machine.
        speed: what the machine reaches; ``None`` if that is not known: then no time is given.
    """
    choice = fit(shape, setup, memory, speed or ASSUMED)
    nearest = None if choice else smallest(shape, setup, memory, speed or ASSUMED)
    chosen = choice or nearest
    assert chosen is not None
    return Estimate(
        shape,
        setup,
        memory,
        phases(shape, setup, memory),
        seconds(shape, setup, speed, memory) if speed else None,
        disk(shape, setup),
        choice,
        nearest,
        phases(shape, chosen.setup, memory),
        seconds(shape, chosen.setup, speed, memory) if speed else None,
        disk(shape, chosen.setup),
    )


def parse_memory(text: str) -> float:
    """Bytes of ``24GB``, ``24`` (GB), ``22.5GiB`` or ``900MB``.

    Raises:
        ConfigError: it is no amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not float(match[1]):
        raise ConfigError(f"memory is an amount such as 24GB, 22.5GiB or 900MB; got {text!r}")
    return float(match[1]) * unit


def _plain(phase: PhaseMemory) -> dict[str, Any]:
    return {
        "phase": phase.title,
        "bytes": round(phase.total),
        "parts": {name: round(held) for name, held in phase.parts.items()},
        "host": {name: round(held) for name, held in phase.host.items()},
    }

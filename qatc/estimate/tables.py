"""An estimate as rows of tables: one for each question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qatc.estimate.answer import Estimate
from qatc.estimate.memory import largest
from qatc.estimate.parts import PhaseMemory
from qatc.report.first_steps import duration

_SHOWN = 0.01
"""Parts of a phase below this share are left out."""

Rows = list[list[str]]


def memory_rows(found: Sequence[PhaseMemory], memory: float) -> Rows:
    """How much memory does each phase take, and what of?"""
    most, with_host = largest(list(found)), any(phase.host for phase in found)
    rows = [["phase", "GB", "", "of which, GB", *(["host, GB"] if with_host else [])]]
    for phase in found:
        mark = "too much" if phase.total > memory else ""
        if phase is most:
            mark = f"largest, {mark}" if mark else "largest"
        own = [phase.title, _gb(phase.total), mark, _parts(phase.parts)]
        rows.append([*own, *([_gb(phase.host_total)] if with_host else [])])
    return rows


def time_rows(seconds: Mapping[str, float], steps: int) -> Rows:
    """How long does each phase take?"""
    rows = [["phase", "time, at least"]]
    rows += [[name, duration(value)] for name, value in seconds.items()]
    each = seconds["training"] / steps
    rows.append(["a training step", f"{each:.3g} s"])
    return [*rows, ["all", duration(sum(seconds.values()))]]


def disk_rows(found: Mapping[str, float]) -> Rows:
    """How much room does it take on the disk?"""
    rows = [["on the disk", "GB"], *([name, _gb(held)] for name, held in found.items())]
    return [*rows, ["all", _gb(sum(found.values()))]]


def option_rows(found: Estimate) -> Rows:
    """Which options make it fit, and what do they cost?"""
    chosen = found.choice or found.nearest
    assert chosen is not None
    rows = [["option", "adds to a step", "changes"]]
    if chosen.halvings:
        setup = chosen.setup
        typed = f"--batch-size {setup.batch_size} --accumulate {setup.accumulate}"
        rows.append([typed, _percent(chosen.halving_share), "nothing but the order of sums"])
    for option, added in zip(chosen.options, chosen.shares, strict=True):
        rows.append([option.name, _percent(added), option.effect])
    return [*rows, ["all", _percent(chosen.added), ""]]


def headline(found: Estimate) -> str:
    """Does it fit?"""
    setup, gigabytes = found.setup, f"{found.memory / 1e9:.4g} GB"
    where = f"{setup.gpus} x {gigabytes}" if setup.on_gpu else gigabytes
    most = largest(found.phases)
    needs = f"{_gb(most.total)} GB while {most.title}"
    if found.fits:
        return f"fits into {where} as it is: {needs}"
    if found.choice is not None:
        return f"does not fit into {where} as it is ({needs}), but with these options:"
    assert found.nearest is not None
    nearest = found.nearest
    return (
        f"does not fit into {where}: {needs}, and {_gb(nearest.phase.total)} GB while"
        f" {nearest.phase.title} with all that helps:"
    )


def _parts(parts: Mapping[str, float]) -> str:
    total = sum(parts.values())
    shown = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {_gb(held)}" for name, held in shown if held >= _SHOWN * total)


def _gb(held: float) -> str:
    return f"{held / 1e9:,.1f}" if held >= 1e9 else f"{held / 1e9:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"

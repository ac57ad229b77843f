"""What the parity gate reports: figures, what they may be, and the verdict."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from qatc.errors import ParityError


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        point: stored, local, global, cached or runtime.
        what: what was compared.
        figure: the largest difference found, in the unit that ``what`` names.
        limit: what it may be; None for a figure that is reported and not judged.
        where: the first place that differs by more than the limit, if one does.
    """

    point: str
    what: str
    figure: float
    limit: float | None = None
    where: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the figure is within its limit."""
        return self.limit is None or self.figure <= self.limit


@dataclass(frozen=True)
class ParityReport:
    """What :func:`verify` found."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a figure that is no number is None."""
        checks = [
            asdict(check)
            | {"figure": check.figure if math.isfinite(check.figure) else None}
            | {"passed": check.passed}
            for check in self.checks
        ]
        return {"passed": self.passed, "checks": checks}

    def require(self, what: str) -> ParityReport:
        """Return the report itself.

        Raises:
            ParityError: a check failed; the message names the first place that differs.
        """
        for check in self.checks:
            if not check.passed:
                place = f" at {check.where}" if check.where else ""
                raise ParityError(
                    f"{what} does not compute what was trained: {check.what} differs{place}"
                    f" ({check.figure:.3g}, at most {check.limit:.3g}); please report this with the"
                    " model and the recipe, and do not use the output"
                )
        return self

"""Errors that a user can act on.

Every error below says what was wrong, quotes the value and names the way out. The command line
prints the message alone, without a traceback. Anything else that is raised is a bug.
"""

from __future__ import annotations

BUSY = 75
"""The exit status of a command that met a :class:`BusyError`: EX_TEMPFAIL of sysexits.h."""


class QatcError(Exception):
    """Base of all errors that a user can act on."""


class ConfigError(QatcError, ValueError):
    """A setting is not valid: bits, recipe, option or path given by the user."""


class BusyError(ConfigError):
    """Another process writes to a place; later it will not."""


class CaptureError(QatcError):
    """A module could not be captured as a graph."""


class PassError(QatcError):
    """A pass could not do what it was asked to, for example because nothing matched."""


class DataError(QatcError):
    """A corpus is missing, damaged, or does not belong to the model."""


class CheckpointError(QatcError):
    """A model directory or a training checkpoint cannot be read or written."""


class TrainingError(QatcError):
    """Training stopped because going on would be useless (NaN or a diverging loss)."""


class EvaluationError(QatcError):
    """A model cannot be evaluated, because its answers are not numbers."""


class ParityError(QatcError):
    """What runs on integers is not what was trained."""


class WorldError(QatcError):
    """One of several processes that do a run together is gone."""

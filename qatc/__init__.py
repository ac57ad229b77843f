"""qatc: data-free quantization-aware training of language models, as a graph compiler.

The public names below are loaded when they are first used, so that ``import qatc`` is instant and
loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qatc.errors import QatcError as QatcError
    from qatc.export import load_codes as load_codes
    from qatc.parity import verify as verify
    from qatc.preparation import prepare as prepare
    from qatc.preparation import restore as restore
    from qatc.recipe import Recipe as Recipe
    from qatc.runtime import load as load
    from qatc.spec import QuantSpec as QuantSpec

_EXPORTS = {
    "QatcError": "qatc.errors",
    "QuantSpec": "qatc.spec",
    "Recipe": "qatc.recipe",
    "load": "qatc.runtime",
    "load_codes": "qatc.export",
    "prepare": "qatc.preparation",
    "restore": "qatc.preparation",
    "verify": "qatc.parity",
}

__all__ = [
    "QatcError",
    "QuantSpec",
    "Recipe",
    "__version__",
    "load",
    "load_codes",
    "prepare",
    "restore",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'qatc' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)

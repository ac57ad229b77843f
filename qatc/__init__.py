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
    from qatc.evaluation.parity import verify as verify
    from qatc.export.prepared import save as save
    from qatc.export.torchao_model import to_torchao as to_torchao
    from qatc.models.centers import center_keys as center_keys
    from qatc.models.preparation import prepare as prepare
    from qatc.models.preparation import restore as restore
    from qatc.output import load_codes as load_codes
    from qatc.recipe.recipe import Recipe as Recipe
    from qatc.recipe.spec import QuantSpec as QuantSpec
    from qatc.runtime.model import load as load

_EXPORTS = {
    "QatcError": "qatc.errors",
    "QuantSpec": "qatc.recipe.spec",
    "Recipe": "qatc.recipe.recipe",
    "center_keys": "qatc.models.centers",
    "load": "qatc.runtime.model",
    "load_codes": "qatc.output",
    "prepare": "qatc.models.preparation",
    "restore": "qatc.models.preparation",
    "save": "qatc.export.prepared",
    "to_torchao": "qatc.export.torchao_model",
    "verify": "qatc.evaluation.parity",
}

__all__ = [
    "QatcError",
    "QuantSpec",
    "Recipe",
    "__version__",
    "center_keys",
    "load",
    "load_codes",
    "prepare",
    "restore",
    "save",
    "to_torchao",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'qatc' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)

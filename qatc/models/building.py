"""A model of a config: its modules and shapes, and no weights that say anything."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from qatc.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Device = Literal["cpu", "meta", "parameters on meta"]


def build_model(
    config: PreTrainedConfig, dtype: torch.dtype, *, device: Device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal LM of a config, unquantized, with attention through SDPA.

    Args:
        config: left as it is; a ``quantization_config`` is ignored.
        dtype: of the parameters.
        device: ``cpu`` for new weights, ``meta`` for none, and ``parameters on meta`` for real
            buffers, which the config decides, around parameters without storage.
        trust_remote_code: run the model's own code, if it has any.

    Raises:
        CheckpointError: the model's own code cannot be run.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    place: AbstractContextManager[object] = parameters_on_meta()
    if device != "parameters on meta":
        place = torch.device(device)
    try:
        with place:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation="sdpa",
                trust_remote_code=trust_remote_code,
            )
    except (OSError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"cannot build the model of {config._name_or_path}: {reason}; copy it again with its"
            " Python files, and install what they import"
        ) from error
    return model


_BUILDING = threading.local()
"""Whether this thread builds a model whose parameters get no storage."""


def _move_to_meta(
    module: nn.Module, name: str, parameter: nn.Parameter | None
) -> nn.Parameter | None:
    building = getattr(_BUILDING, "on_meta", False)
    if not building or parameter is None or parameter.device.type == "meta":
        return None  # which leaves the parameter as it is, tied ones one and the same
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


register_module_parameter_registration_hook(_move_to_meta)  # type: ignore[arg-type]
# Never removed: torch knows hooks for all threads only, and to change them would disturb others.


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that this thread builds get parameters without storage.

    Buffers, which the config decides, are real, and other threads build theirs as ever.
    """
    _BUILDING.on_meta = True
    try:
        yield
    finally:
        _BUILDING.on_meta = False

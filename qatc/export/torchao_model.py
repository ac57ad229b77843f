"""A trained model whose quantized weights torchao holds, without a directory in between."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from qatc.export.prepared import trained_specs
from qatc.export.torchao import differences
from qatc.models import is_transformers_model
from qatc.models.preparation import prepared_state, restore
from qatc.models.vocabulary import are_tied, find_ends, untie
from qatc.output import QuantizedWeight, torchao
from qatc.output.compressed_tensors import find_float_linears


def to_torchao(model: nn.Module) -> nn.Module:
    """Let torchao hold the quantized weights of a prepared, trained model, in place.

    The layers get their own forward back, as by :func:`qatc.restore`, and every quantized weight
    becomes a ``torchao.quantization.Int8Tensor`` around the codes and scales that were trained. A
    transformers model is then what ``from_pretrained`` makes of an export: ``generate``,
    ``torch.compile`` and ``save_pretrained`` work, and ``from_pretrained`` loads what that writes.

    The float weights are gone afterwards, and head and embedding, if one of them is quantized, are
    no longer tied. Cast the model (``.to(torch.bfloat16)``) afterwards rather than before: weights
    that were cast may round to other codes.

    Args:
        model: prepared by :func:`qatc.prepare`.

    Returns:
        ``model`` itself, in evaluation mode.

    Raises:
        ConfigError: the model is not prepared, was not run yet as it is now, or torchao cannot hold
            what it was trained for. The model is as it was then.

    Warns:
        UserWarning: torchao computes in another way than the model was trained for.
    """
    recipe = prepared_state(model).recipe
    torchao.refuse_unheld(recipe)
    specs = trained_specs(model)
    ignore = find_float_linears(model, specs)
    state = model.state_dict()
    ends = find_ends(model)
    table = next((end.weight for end in ends if end.role == "embedding"), None)
    tensors: dict[str, Tensor] = {}
    for name, spec in specs.items():
        weight = {name: QuantizedWeight.from_state(state, name, spec)}
        tensors |= torchao.int8_tensors(weight, recipe, table, state[name].dtype)
    for difference in differences(recipe):
        warnings.warn(difference, stacklevel=2)
    restore(model)
    tied = are_tied(ends) and any(end.weight in tensors for end in ends)
    for name, tensor in tensors.items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, nn.Parameter(tensor, requires_grad=False))
    if is_transformers_model(model):
        _tell_transformers(model, torchao.quantization_config(recipe, ignore), tied)
    return model.eval()


def _tell_transformers(model: Any, config: Any, was_tied: bool) -> None:
    """Set what ``from_pretrained`` sets, by which ``save_pretrained`` writes torchao's layout."""
    from transformers.quantizers.auto import AutoHfQuantizer

    if was_tied:
        untie(model.config)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.config.quantization_config = config

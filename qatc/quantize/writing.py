"""The last stage of a run: the output is written, held against what was trained, and reported."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from qatc.divided.hold import gathered
from qatc.errors import PassError
from qatc.evaluation.parity import verify
from qatc.machine.device import release_memory
from qatc.machine.world import current
from qatc.models.preparation import restore
from qatc.models.scales import of_attention, of_weight
from qatc.output import Output, QuantizedWeight, loads_elsewhere, open_output, write_output
from qatc.output.model_card import write_card
from qatc.quantize.given import Setting
from qatc.quantize.pair import Pair
from qatc.quantize.settings import as_options
from qatc.quantize.stages import Figures, Training
from qatc.report.markdown import write_report
from qatc.report.usage import decoding_report, kernel_report, memory
from qatc.runtime.model import load
from qatc.storage.directories import complete_directory
from qatc.storage.files import read_json, write_json
from qatc.training.blockwise import RECORDS


@dataclass(frozen=True, eq=False)
class Trained:
    """All that is left of a run once its models are gone.

    Attributes:
        output: what is to be written.
        masters: what its codes were made from, by name.
        tokenizer: to be written beside it.
        figures: of all models.
        training: how it went.
    """

    output: Output
    masters: Mapping[str, Tensor]
    tokenizer: Any
    figures: Figures
    training: Training


def take_output(
    setting: Setting, pair: Pair, metadata: Mapping[str, Any]
) -> tuple[Output, dict[str, Tensor]]:
    """The output of a trained student, which is a plain model afterwards, and its masters.

    What is written lies in the host's memory, and weight after weight goes there. Of a divided
    student, the first process has all of it, and others nothing: there is one whole weight at a
    time, and none is kept that is not to be verified.
    """
    state = pair.student.state_dict()
    model = restore(pair.student)
    if setting.divided:
        weights, floats, masters = _gather(setting, pair, state)
        return _output(setting, model, weights, floats, metadata), masters
    masters = {name: state.pop(name) for name in [*pair.quantized, *filter(of_weight, state)]}
    floats = {
        name: value.to("cpu", pair.stored)
        if value.is_floating_point() and not of_attention(name)
        else value.cpu()
        for name, value in state.items()
    }
    weights = {
        name: QuantizedWeight.from_state(masters, name, spec).cpu()
        for name, spec in pair.quantized.items()
    }
    return _output(setting, model, weights, floats, metadata), masters


def _output(
    setting: Setting,
    model: Any,
    weights: Mapping[str, QuantizedWeight],
    floats: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
) -> Output:
    config, generation = model.config, model.generation_config
    recipe, trust = setting.config.recipe, setting.config.trust_remote_code
    return Output(config, recipe, weights, floats, metadata, generation, trust)


def _gather(
    setting: Setting, pair: Pair, state: Mapping[str, Tensor]
) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor], dict[str, Tensor]]:
    """Codes, floats and masters of a divided student, one whole tensor after the other."""
    weights: dict[str, QuantizedWeight] = {}
    floats: dict[str, Tensor] = {}
    masters: dict[str, Tensor] = {}

    def take(name: str, tensor: Tensor) -> None:
        if not current().first:
            return
        spec = pair.quantized.get(name)
        if spec is None:
            dtype = pair.stored if tensor.is_floating_point() else tensor.dtype
            floats[name] = tensor.to("cpu", dtype)
            return
        weights[name] = QuantizedWeight.from_float(tensor, spec).cpu()
        if setting.config.verify:
            masters[name] = tensor.cpu()

    for name, own in state.items():
        take(name, gathered(own))
    return weights, floats, masters


def write(setting: Setting, trained: Trained) -> None:
    """Write the output of a run; it appears in one piece, once it is verified.

    Raises:
        CheckpointError: it cannot be written.
        ParityError: it does not compute what was trained.
    """
    config, observer = setting.config, setting.observer
    with complete_directory(config.output, overwrite=config.overwrite) as staging:
        write_output(staging, trained.output, tokenizer=trained.tokenizer)
        if not loads_elsewhere(staging):
            observer.note(
                "its inputs are rotated while it runs, so that qatc alone loads it"
                if config.recipe.rotate_inputs
                else "head and embedding are stored as qatc alone loads them; for transformers:"
                " qatc export"
            )
        training = trained.training
        for name, steps in (("metrics.jsonl", training.history), (RECORDS, training.layers)):
            if steps:
                shutil.copyfile(config.partial / name, staging / name)
        if (options := as_options(config)) is not None:
            (staging / "run.yaml").write_text(yaml.safe_dump(options, sort_keys=False), "utf-8")
        found = _verify(setting, staging, trained.masters)
        write_json(staging / "qatc.json", read_json(staging / "qatc.json") | found)
        write_card(staging)
        metadata = {**trained.output.metadata, **found}
        write_report(staging, metadata, trained.figures, training.history, training.layers)


def _verify(setting: Setting, staging: Path, masters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Hold what was written against what was trained, before it is called complete."""
    observer, device = setting.observer, setting.device
    if not setting.config.verify:
        reason = "--no-verify asked for it"
        observer.note(f"not verified, as {reason}")
        return {"parity": {"passed": None, "reason": reason}}
    observer.stage("Verifying that the integer model computes what was trained")
    release_memory(device)  # two more models are about to be loaded
    output = open_output(staging, trust_remote_code=setting.config.trust_remote_code)
    try:
        report = verify(output, trained=masters, device=device)
        release_memory(device)
        model = load(output, device=device, compile=False)
    except PassError as error:
        observer.note(f"not verified, as it does not run on integers: {error}")
        return {"parity": {"passed": None, "reason": str(error)}}
    report.require(str(setting.config.output))
    observer.note(f"{len(report.checks)} checks passed")
    return {
        "parity": report.to_dict(),
        "memory": asdict(memory(model)),
        "kernels": [asdict(use) for use in kernel_report(model)],
        "decoding": decoding_report(model),
    }

"""The stage of a run behind its corpus: bits of single weights are chosen, if it has a budget."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qatc.data.corpus import Rows
from qatc.quantize.given import Setting
from qatc.quantize.pair import Pair, plain_student, prepare_again
from qatc.quantize.settings import QuantizeConfig
from qatc.recipe.weight_bits import describe
from qatc.sensitivity.answers import probe_rows
from qatc.sensitivity.budget import BitChoice, fit_budget
from qatc.storage.files import read_json, write_json


def choose_weight_bits(setting: Setting, pair: Pair, rows: Rows) -> tuple[Setting, Pair]:
    """The run with the chosen bits in its recipe and no budget any more, and its student so.

    What was chosen is kept with the run, which goes on with it.

    Args:
        setting: the run.
        pair: whose student has not been changed yet.
        rows: what it is trained on, the first of which are looked at.

    Raises:
        CheckpointError: the choice cannot be kept.
    """
    config = setting.config
    if config.budget is None:
        return setting, pair
    file = _file(config)
    student = plain_student(pair)
    if file.exists():
        kept = read_json(file)
        choice = BitChoice(**{**kept, "weight_bits": tuple(kept["weight_bits"].items())})
    else:
        some = rows[: probe_rows(rows.tokens.shape[1])]
        setting.observer.stage(f"Measuring each weight alone on {len(some)} rows")
        choice = fit_budget(
            student, some, config.recipe, config.budget, batch_size=config.training.batch_size
        )
        write_json(file, {**asdict(choice), "weight_bits": dict(choice.weight_bits)})
    usual, others = config.recipe.weights.bits, describe(choice.weight_bits) or "none"
    setting.observer.note(
        f"weights have {choice.average:.4g} bits on average, an estimated KL of"
        f" {choice.divergence:.4g} for them alone; of other than {usual}: {others}"
    )
    recipe = replace(config.recipe, weight_bits=choice.weight_bits)
    setting = replace(setting, config=replace(config, recipe=recipe, budget=None))
    # Methods come later: weights whose inputs are to be rotated have not been turned yet.
    plain = replace(recipe, rotate_inputs=())
    return setting, prepare_again(setting, pair, student, plain)


def chosen(config: QuantizeConfig) -> dict[str, Any]:
    """What ``qatc.json`` says of the choice of a run: nothing, if there was none."""
    return {"budget": read_json(_file(config))} if _file(config).exists() else {}


def _file(config: QuantizeConfig) -> Path:
    return config.partial / "weight-bits.json"

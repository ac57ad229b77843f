"""The sensitivities of a model at a glance, as ``qatc inspect --sensitivity`` shows them."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qatc.data.config import CorpusConfig
from qatc.data.corpus import Corpus, Rows, require_known
from qatc.data.generate import generate_corpus
from qatc.errors import ConfigError
from qatc.machine.device import pick_device
from qatc.models import LoadedModel, load_model, load_tokenizer
from qatc.models.load import check_length
from qatc.recipe.recipe import Recipe
from qatc.sensitivity.answers import Answers, probe_rows
from qatc.sensitivity.parts import part_sensitivity
from qatc.sensitivity.weights import divergences, find_weights


@dataclass(frozen=True)
class Sensitivity:
    """KL to full precision, nats per token, of a model with one part quantized; nothing is trained.

    Attributes:
        model: name.
        bits: weights-activations-KV.
        tokens: on which it was measured.
        parts: by what is quantized, see :func:`qatc.sensitivity.part_sensitivity`.
        layers: with the weights of only one decoder layer, by its name.
        kinds: with the weights of only one kind of linear, by its name in a layer.
    """

    model: str
    bits: str
    tokens: int
    parts: dict[str, float]
    layers: dict[str, float]
    kinds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure_sensitivity(
    model: Any, rows: Rows, recipe: Recipe, *, name: str = "", batch_size: int = 8
) -> Sensitivity:
    """Measure how much each part of a recipe costs a model, and each layer and kind of weight.

    Args:
        model: a transformers causal LM that is not prepared; it is as it was afterwards.
        rows: some rows of text.
        recipe: what is quantized, and how.
        name: of the model.
        batch_size: rows at a time.

    Raises:
        QatcError: the model cannot be quantized so, or there is no row.
    """
    layers, kinds = {}, {}
    if recipe.weights.quantizes:
        weights, answers = find_weights(model, recipe), Answers(model, rows, batch_size)
        layers = divergences(weights, answers, "layer")
        kinds = divergences(weights, answers, "kind")
    parts = part_sensitivity(model, rows, recipe, batch_size=batch_size)
    return Sensitivity(name, recipe.bits, int(rows.real.sum()), parts, layers, kinds)


def inspect_sensitivity(
    name: str,
    recipe: Recipe,
    *,
    data: Path | None = None,
    rows: int | None = None,
    trust_remote_code: bool = False,
) -> Sensitivity:
    """Load a model, and measure it on the first rows of a corpus, or on some that it writes itself.

    Args:
        name: hub name or directory of the model.
        recipe: what is quantized, and how.
        data: a corpus; ``None``: the model writes a few sequences.
        rows: how many, ``None`` for about 1,024 tokens.
        trust_remote_code: run code that comes with the model.

    Raises:
        QatcError: the model or the corpus cannot be read or do not fit, or the model cannot be
            quantized so.
    """
    if rows is not None and rows < 1:
        raise ConfigError(f"sensitivity is measured on at least 1 row; got {rows}")
    loaded = load_model(
        name,
        dtype=torch.float32,
        device=pick_device("auto"),
        trust_remote_code=trust_remote_code,
    )
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    if data is None:
        found = _written(loaded, tokenizer, rows)
    else:
        corpus = Corpus.open(data)
        corpus.require_tokenizer(tokenizer)
        length = int(corpus.manifest["max_length"])
        check_length(name, loaded.model.config, length)
        found = corpus.rows(length, answers_only=False)
        found = found[: probe_rows(length) if rows is None else rows]
        require_known(found.tokens, tokenizer, loaded.model, what=f"the corpus {data}", name=name)
    return measure_sensitivity(loaded.model, found, recipe, name=name)


def _written(loaded: LoadedModel, tokenizer: Any, rows: int | None) -> Rows:
    """Rows that the model writes, kept nowhere."""
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    length = min(CorpusConfig.max_length, limit or CorpusConfig.max_length)
    count = probe_rows(length) if rows is None else rows
    with tempfile.TemporaryDirectory() as place:
        config = CorpusConfig(sequences=count, max_length=length, batch_size=min(count, 16))
        corpus = generate_corpus(loaded, tokenizer, Path(place) / "rows", config, compile=False)
        return corpus.rows(length)

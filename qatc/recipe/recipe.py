"""The recipe: what is quantized and how, as plain frozen data that travels with the model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qatc.errors import ConfigError
from qatc.recipe.checks import check
from qatc.recipe.exceptions import Exceptions
from qatc.recipe.patterns import matches
from qatc.recipe.spec import FLOAT_BITS, KVSite, QuantSpec
from qatc.recipe.targets import Target, find_target, target_name
from qatc.recipe.weight_bits import WeightBits, first_match
from qatc.storage.files import read_yaml

DEFAULT_SKIP = ("*lm_head*", "*embed*")
"""Parameters that stay in full precision, as in the paper: the output head and the embeddings.

The ``head`` and ``embedding`` of a recipe, where they quantize, go before it."""

PRESETS = ("paper", "best")
"""What :meth:`Recipe.from_bits` can be asked for by name."""

_SPECS = {
    "weights": "weights",
    "activations": "activations",
    "kv": "kv",
    "head": "weights",
    "embedding": "weights",
}
"""The fields of a recipe that are specs, and the rules of a target that each follows."""


def _unquantized() -> QuantSpec:
    return QuantSpec(bits=FLOAT_BITS)


@dataclass(frozen=True)
class Recipe:
    """What is quantized, and how.

    Args:
        weights: weights of linear layers, one scale per output channel (or per group of inputs);
            their scales are rounded to bf16, or so that fp16 holds them too.
        activations: inputs of linear layers, one scale per token.
        kv: keys and values, see ``kv_site``.
        kv_site: ``"cache"``: keys after the rotary embedding and values, one scale per token and
            head, which is what a server stores. ``"projection"``: the outputs of the K and V
            projections, one scale per token over all heads, as in the paper's code.
        skip: patterns (``fnmatch``) of parameter names, such as ``*.layers.0.*``, whose linear
            layers stay in full precision, weights and inputs alike.
        weight_bits: weights of layers with other bits than ``weights``, as pairs of a pattern
            (``fnmatch``) of parameter names and bits; the first that matches holds. 16 bits leave a
            linear layer in full precision, as ``skip`` does, which goes before it. In YAML a
            mapping, in order.
        value_bits: bits of the values in the cache, 2 to 8, or ``None`` for those of ``kv``, which
            the keys have: they lose by other amounts, and may be worth other bits.
        head: the weight of the output head, one scale per token of the vocabulary; its input is
            quantized like that of every linear. 16 bits, as in the paper, by default.
        embedding: the table of the token embedding, one scale per token of the vocabulary. If
            head and embedding are one tied weight, equal specs make them one stored weight.
        center_keys: take a constant vector per head off the keys before they are quantized, their
            mean over some rows of the corpus. It moves all scores of a query alike, which softmax
            does not see, and leaves smaller keys to quantize; K of most models is far from 0.
        rotate_inputs: patterns of names of weights, such as ``*.down_proj.weight``, whose
            linear layers read their input through a Hadamard transform, at run time as well: it
            spreads outliers over all channels before they are quantized (QuaRot, arXiv
            2404.00456). The weights have to be turned alike, see :func:`qatc.ptq.rotate_inputs`.
        rotate_keys: turn queries and keys behind the rotary embedding by a Hadamard transform of
            every head. Their products stay as they are, and a key's outliers spread over its head
            before it is quantized.
        target: the runtime whose rules were taken for what is left open, see
            :data:`qatc.recipe.targets.TARGETS`; :meth:`from_bits` and :meth:`from_dict` take them.

    Raises:
        ConfigError: a value is not valid.
    """

    weights: QuantSpec = field(default_factory=lambda: QuantSpec(bits=4))
    activations: QuantSpec = field(default_factory=lambda: QuantSpec(bits=8))
    kv: QuantSpec = field(default_factory=lambda: QuantSpec(bits=4))
    kv_site: KVSite = "cache"
    skip: tuple[str, ...] = DEFAULT_SKIP
    weight_bits: WeightBits = ()
    value_bits: int | None = None
    head: QuantSpec = field(default_factory=_unquantized)
    embedding: QuantSpec = field(default_factory=_unquantized)
    center_keys: bool = False
    rotate_inputs: tuple[str, ...] = ()
    rotate_keys: bool = False
    target: str = "qatc"

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", target_name(self.target))  # of several names, one
        check(self)

    @classmethod
    def from_bits(
        cls,
        bits: str,
        *,
        group_size: int | None = None,
        head_bits: int = FLOAT_BITS,
        embedding_bits: int = FLOAT_BITS,
        target: str = "qatc",
        preset: str = "paper",
        kv_range: str | None = None,
        **changes: Any,
    ) -> Recipe:
        """A recipe from ``"W-A-KV"`` bits, such as ``"4-8-4"``.

        Args:
            bits: weight, activation and KV bits joined by dashes; each 2 to 8, or 16 for none.
            group_size: group size of the weights, or ``None`` for one scale per output channel
                (or what the target has).
            head_bits, embedding_bits: of the output head and of the token embedding.
            target: the runtime to train for.
            preset: ``paper`` for symmetric MinMax everywhere; ``best`` for what lost least at
                equal bits: all levels, signed, of weights, keys and values, learned scales, and
                centered keys. Of K and V it leaves to another target than ``qatc`` what that
                computes.
            kv_range: of keys and values, in the place of what preset and target have.
            changes: any other field of the recipe.
        """
        match = re.fullmatch(r"(\d+)-(\d+)-(\d+)", bits.strip())
        if match is None:
            raise ConfigError(
                f"--bits takes weight, activation and KV bits joined by dashes, such as 4-8-4;"
                f" got {bits!r}"
            )
        rules = find_target(target)
        weights, activations, kv = (
            QuantSpec(int(b), **rules.rules(site, int(b)))
            for b, site in zip(match.groups(), ("weights", "activations", "kv"), strict=True)
        )
        if preset not in PRESETS:
            raise ConfigError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
        if preset == "best":
            own: dict[str, Any] = {"range": "signed", "clip": "learned"}
            weights = dataclasses.replace(weights, **(own if weights.quantizes else {}))
            if target == "qatc" and kv.quantizes and changes.get("kv_site", "cache") == "cache":
                kv = dataclasses.replace(kv, **own)
                changes.setdefault("center_keys", True)
        if kv_range is not None:
            if not kv.quantizes:
                raise ConfigError(
                    f"kv_range (--kv-range) is {kv_range!r}, and {bits} leaves K and V at 16 bits;"
                    " leave it out"
                )
            kv = dataclasses.replace(kv, range=kv_range)  # type: ignore[arg-type]  # checked there
        if group_size is not None:
            weights = dataclasses.replace(weights, group_size=group_size)
        for name, own_bits in (("head", head_bits), ("embedding", embedding_bits)):
            if own_bits != FLOAT_BITS:
                changes[name] = QuantSpec(own_bits, **rules.rules("weights", own_bits))
        return cls(weights=weights, activations=activations, kv=kv, target=target, **changes)

    @property
    def bits(self) -> str:
        """The ``"W-A-KV"`` spelling of the bits.

        W is ``mixed`` where weights have several, and KV is such as ``K8V4`` where keys and values
        differ.
        """
        return self.bits_spelled("mixed" if self.weight_bits else f"{self.weights.bits}")

    def bits_spelled(self, weights: str) -> str:
        """The same with ``weights`` in the place of W."""
        return f"{weights}-{self.activations.bits}-{self.kv_bits}"

    @property
    def kv_bits(self) -> str:
        """The bits of the KV cache: one number, or such as ``K8V4``."""
        keys, values = self.kv.bits, self.values.bits
        return f"{keys}" if keys == values else f"K{keys}V{values}"

    @property
    def values(self) -> QuantSpec:
        """How values are quantized; ``kv`` says it of the keys."""
        bits = self.value_bits
        return self.kv if bits is None else dataclasses.replace(self.kv, bits=bits)

    @property
    def quantizes(self) -> bool:
        """Whether anything is quantized at all."""
        return any(getattr(self, name).quantizes for name in _SPECS)

    def skips(self, parameter_name: str) -> bool:
        """Whether the parameter of this (full) name stays in full precision."""
        if matches(parameter_name, self.skip):
            return True
        return first_match(self.weight_bits, parameter_name) == FLOAT_BITS

    def weights_of(self, parameter_name: str) -> QuantSpec:
        """How the weight of this (full) name is quantized in a layer that does not skip it."""
        bits = first_match(self.weight_bits, parameter_name)
        return self.weights if bits is None else dataclasses.replace(self.weights, bits=bits)

    def exceptions(self, layer: str, parameters: Iterable[str]) -> Exceptions:
        """What it says of single parameters of a layer.

        Args:
            layer: its full name.
            parameters: their names, relative to it.
        """
        full = {name: f"{layer}.{name}" if layer else name for name in parameters}
        skip = tuple(name for name in full if self.skips(full[name]))
        bits = ((name, self.weights_of(full[name]).bits) for name in full if name not in skip)
        return Exceptions(
            skip,
            tuple((name, own) for name, own in bits if own != self.weights.bits),
            tuple(name for name in full if self.rotates(full[name])),
        )

    def rotates(self, parameter_name: str) -> bool:
        """Whether the linear of this (full) weight name reads its input through a rotation."""
        return matches(parameter_name, self.rotate_inputs) and not self.skips(parameter_name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: strings, numbers, lists and dictionaries.

        Bits of single weights and of values, and rotations, are there if there are some, so that
        older versions read all others.
        """
        plain = dataclasses.asdict(self)
        for key in ("skip", "rotate_inputs"):
            plain[key] = list(plain[key])
        plain["weight_bits"] = dict(self.weight_bits)
        later = ("value_bits", "weight_bits", "rotate_inputs", "rotate_keys")
        return {key: value for key, value in plain.items() if value or key not in later}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Recipe:
        """The inverse of :meth:`to_dict`; unknown keys are refused and the valid ones listed."""
        values = dict(plain)
        _refuse_unknown(values, cls, "recipe")
        rules = find_target(values.get("target", "qatc"))
        for key, site in _SPECS.items():
            if key in values or getattr(rules, site):
                plain_spec = values.get(key, {"bits": getattr(cls(), key).bits})
                values[key] = _spec_from_dict(plain_spec, f"recipe.{key}", rules, site)
        for key in ("skip", "rotate_inputs"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        if isinstance(values.get("weight_bits"), Mapping):
            values["weight_bits"] = tuple(values["weight_bits"].items())
        return cls(**values)

    def to_yaml(self) -> str:
        """The recipe as YAML text."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe file."""
        keys = ", ".join(f.name for f in dataclasses.fields(cls))
        otherwise = f"must be a mapping with the keys {keys}"
        return cls.from_dict(read_yaml(Path(path), "the recipe", otherwise))


def _spec_from_dict(plain: Any, where: str, target: Target, site: str) -> QuantSpec:
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{where} must be a mapping such as {{bits: 4}}; got {plain!r}")
    _refuse_unknown(plain, QuantSpec, where)
    bits = plain.get("bits", FLOAT_BITS)
    rules = target.rules(site, bits) if isinstance(bits, int) else {}
    return QuantSpec(**(dict(rules) | dict(plain)))


def _refuse_unknown(plain: Mapping[str, Any], cls: type, where: str) -> None:
    valid = [f.name for f in dataclasses.fields(cls)]
    unknown = [str(key) for key in plain if key not in valid]
    if unknown:
        raise ConfigError(
            f"unknown key {', '.join(map(repr, unknown))} in {where}; valid keys:"
            f" {', '.join(valid)}"
        )

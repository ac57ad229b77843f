from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from qatc.errors import PassError
from qatc.passes import (
    Canonicalize,
    Edits,
    GraphPass,
    PassRecord,
    Pipeline,
    QuantizeKV,
    QuantizeLinearInputs,
    QuantizeWeights,
    pass_records,
)
from qatc.recipe.spec import QuantSpec


@dataclass(frozen=True)
class DoNothing(GraphPass):
    """Matches ``matched`` places and edits none."""

    matched: int = 0
    requires: ClassVar = (QuantizeWeights, QuantizeKV)

    def edit(self, gm: GraphModule) -> Edits:
        return Edits(self.matched, 0)


def test_passes_are_values() -> None:
    assert QuantizeWeights(QuantSpec(4)) == QuantizeWeights() != QuantizeWeights(QuantSpec(8))
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizeWeights().skip = ()  # type: ignore[misc]


def test_silence_is_failure(plain: Any) -> None:
    with pytest.raises(PassError, match="DoNothing found nothing to work on in GraphModule"):
        DoNothing()(plain.graph)
    assert not DoNothing(matched=1)(plain.graph).modified


def test_a_pipeline_lists_every_violation_at_once() -> None:
    with pytest.raises(PassError) as raised:
        Pipeline((QuantizeKV(), DoNothing(), Canonicalize(), QuantizeWeights()))
    assert str(raised.value) == (
        "QuantizeKV needs Canonicalize before it; DoNothing needs QuantizeWeights before it"
    )


def test_a_pipeline_runs_in_order_and_keeps_a_record(llama_layer: Any) -> None:
    gm = llama_layer.graph
    pipeline = Pipeline(
        (Canonicalize(), QuantizeLinearInputs(QuantSpec(8)), QuantizeWeights(skip=("mlp.*",)))
    )
    result = pipeline(gm)
    assert result.modified and result.graph_module is gm
    canonicalize, *others = pass_records(gm)
    assert canonicalize.name == "Canonicalize" and canonicalize.edited > 0
    spec: dict[str, Any] = {
        "bits": 8,
        "group_size": None,
        "range": "restricted",
        "scale_dtype": "bfloat16",
    }
    spec |= {"rounding": "division", "clip": "none"}
    assert others == [
        PassRecord("QuantizeLinearInputs", {"spec": spec, "skip": ()}, 4, 4),
        PassRecord(
            "QuantizeWeights",
            {"spec": spec | {"bits": 4}, "skip": ("mlp.*",), "other_bits": ()},
            4,
            4,
        ),
    ]
    assert not pipeline(gm).modified


def test_a_pipeline_takes_any_callable(plain: Any) -> None:
    seen = []
    replaced = plain.graph

    def look(gm: GraphModule) -> None:
        seen.append(gm)

    def replace(gm: GraphModule) -> PassResult:
        return PassResult(replaced, True)

    result = Pipeline((look, replace, look))(plain.graph)
    assert result.graph_module is replaced and result.modified
    assert seen[1] is replaced is not seen[0]


def test_passes_run_in_the_pass_manager_of_torch(llama_layer: Any) -> None:
    manager = PassManager(passes=[Canonicalize(), QuantizeWeights(), QuantizeKV()])
    edited = manager(llama_layer.graph).graph_module
    nodes = [n for n in edited.graph.nodes if n.target is torch.ops.qatc.fake_quantize.default]
    assert len(nodes) == 9

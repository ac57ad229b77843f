"""What Inductor writes for a GPU that is not there, and what Triton's compiler makes of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule

_KERNEL = re.compile(r"async_compile\.triton\('([^']+)', '''(.*?)'''", re.DOTALL)


def source_of(graph: GraphModule, inputs: Sequence[Tensor]) -> str:
    """Inductor's Python for a lowered graph and FakeTensors, as the runtime compiles it."""
    from torch._inductor.compile_fx import compile_fx
    from torch.fx.experimental.proxy_tensor import make_fx

    from qatc.numerics import minmax
    from qatc.runtime.cuda.compiled import options_of, with_few_launches

    options: Any = minmax.COMPILE_OPTIONS | options_of(graph)
    flat = make_fx(with_few_launches(graph), tracing_mode="real")(*inputs)
    with _kept_source() as found:
        compile_fx(flat, list(inputs), config_patches=options)
    return "\n".join(found)


@contextlib.contextmanager
def _kept_source() -> Iterator[list[str]]:
    """Inside the block, Inductor's source is kept, and neither built nor run."""
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.graph import GraphLowering
    from torch.utils import _triton

    found: list[str] = []

    def keep(self: Any) -> Any:
        wrapper, _ = self.codegen()
        found.append(wrapper.value)
        nothing: Any = mock.Mock()
        nothing.call = lambda *args: None
        return nothing

    folder = joint_graph.UniformValueConstantFolder
    deduce = folder._deduce_value

    def on_the_cpu(self: Any, node: Any) -> Any:
        """Constants of one element are computed, where they are."""
        kept = node.kwargs
        if str(kept.get("device")).startswith("cuda"):
            node.kwargs = {**kept, "device": torch.device("cpu")}
        try:
            return deduce(self, node)
        finally:
            node.kwargs = kept

    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(GraphLowering, "compile_to_module", keep),
            mock.patch.object(folder, "_deduce_value", on_the_cpu),
            mock.patch.object(_triton, "has_triton", lambda *_: True),
            mock.patch.object(_triton, "triton_backend", lambda: None),
            mock.patch.object(_triton, "triton_hash_with_backend", lambda: "fake"),
            mock.patch("torch._inductor.scheduler.has_triton", lambda *_: True, create=True),
            mock.patch("torch._inductor.utils.has_triton", lambda *_: True, create=True),
        ):
            stack.enter_context(patch)
        yield found


def kernels_of(source: str) -> dict[str, str]:
    """The sources of the Triton kernels in Inductor's Python, by name."""
    return dict(_KERNEL.findall(source))


def ptx_of(name: str, source: str) -> str:
    """What Triton's compiler makes of a kernel, in the first of its configurations."""
    from torch._inductor.codecache import PyCodeCache

    kernel = getattr(PyCodeCache.load(source), name)
    kernel.configs = kernel.configs[:1]
    launcher = ("use_static_triton_launcher", "use_static_cuda_launcher")  # of later and earlier
    for option in filter(lambda name: hasattr(torch._inductor.config, name), launcher):
        setattr(torch._inductor.config, option, False)  # which keeps no PTX
    kernel.precompile(warm_cache_only=True)
    return str(kernel.compile_results[0].kernel.asm["ptx"])

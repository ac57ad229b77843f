"""Two GPUs that are not there: what torch has to be told to trace and compile for them.

Only FakeTensors may be on them, so that a block runs under a FakeTensorMode: shapes, dtypes and
devices are real, values are not, and an operation that would wait for a value raises. It patches
private parts of torch, in a process of its own: see :mod:`tests.cuda.on_fake_gpu`.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

H100 = types.SimpleNamespace(
    name="NVIDIA H100 (fake)", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    warp_size=32, L2_cache_size=50 << 20, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, gcnArchName="",
)  # fmt: skip

GPUS = 2


class _Stream:
    """A stream on which nothing happens."""

    cuda_stream = 0
    device = torch.device("cuda", 0)

    def __init__(self, *args: object, **options: object) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, other: object) -> None: ...


def _place_anew(self: Any, fn: Any, recurse: bool = True) -> Any:
    """``Module._apply`` without what it does in place, which FakeTensors refuse."""
    known: dict[int, Any] = {}
    for child in self.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    with torch.no_grad():
                        placed = torch.nn.Parameter(fn(parameter), parameter.requires_grad)
                    known[id(parameter)] = (parameter, placed)
                child._parameters[name] = known[id(parameter)][1]
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = fn(buffer)
    return self


def _driver(properties: Any) -> Any:
    """Triton's driver of the GPU, for which it can compile but not launch."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):  # type: ignore[misc]
        def __init__(self) -> None: ...

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", properties.major * 10 + properties.minor, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: object = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_benchmarker(self) -> None: ...

        def get_device_interface(self) -> Any:
            return torch.cuda

    return Driver()


@contextlib.contextmanager
def fake_gpus(properties: Any = H100) -> Iterator[None]:
    """Inside the block, :mod:`torch.cuda` has two GPUs, and Triton compiles for them."""
    import torch._dynamo.device_interface as interface
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._subclasses import fake_tensor

    of_torch = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: GPUS,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "is_bf16_supported": lambda including_emulation=True: properties.major >= 8,
        "current_stream": lambda device=None: _Stream(),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "mem_get_info": lambda device=None: (properties.total_memory, properties.total_memory),
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *args, **options: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
    }
    of_dynamo: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: GPUS,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "synchronize": lambda device=None: None,
        "exchange_device": lambda device: 0,
        "maybe_exchange_device": lambda device: 0,
        "is_bf16_supported": lambda including_emulation=True: True,
    }
    known, place = interface.caching_worker_device_properties, {"cuda": 0}
    mode = fake_tensor.FakeTensorMode
    patches = [
        mock.patch.object(mode, "avoid_device_init", property(lambda self: True)),
        mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None, create=True),
        mock.patch.object(torch.nn.Module, "_apply", _place_anew),
        mock.patch.object(torch.version, "cuda", "13.0"),
        mock.patch.dict(known, {"cuda": [properties] * GPUS}),
        mock.patch.dict(interface.caching_worker_current_devices, place),
        *(mock.patch.object(torch.cuda, name, value) for name, value in of_torch.items()),
        *(
            mock.patch.object(interface.CudaInterface, name, staticmethod(value))
            for name, value in of_dynamo.items()
        ),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)  # type: ignore[arg-type]
        DeviceProperties.create.cache_clear()
        stack.callback(DeviceProperties.create.cache_clear)
        with contextlib.suppress(ImportError):
            from torch._inductor.runtime import triton_helpers
            from triton.runtime import driver

            stack.enter_context(
                mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None)
            )
            driver.set_active(_driver(properties))
            stack.callback(setattr, driver, "_active", None)
        yield

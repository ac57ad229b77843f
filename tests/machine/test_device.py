"""The choice of device and dtype."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qatc.errors import ConfigError
from qatc.machine import cpu, device
from qatc.machine.device import pick_device, pick_dtype


def test_an_unknown_device_names_the_way_out() -> None:
    assert pick_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="cannot use the device 'nonsense'; try --device cpu"):
        pick_device("nonsense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu() -> None:
    assert pick_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="cannot use the device 'cuda'; try --device cpu"):
        pick_device("cuda")


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("width", "wide"), [(511, False), (512, True)])
def test_auto_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, native: bool, width: int, wide: bool
) -> None:
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: native)
    chosen = pick_dtype("auto", "cpu", SimpleNamespace(hidden_size=width))
    assert chosen is (torch.bfloat16 if native and wide else torch.float32)


def test_what_shares_memory_shares_it_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_at", lambda tensor, device: tensor.clone())
    student, teacher = nn.Linear(3, 3), nn.Linear(3, 3)
    student.weight.data = teacher.weight.data
    student.register_buffer("table", torch.arange(3.0))
    tied = nn.Linear(3, 3)
    tied.weight = student.weight
    tensors = {**student.state_dict(keep_vars=True), "its": teacher.bias}
    before = {name: (id(t), t.data_ptr(), t.clone()) for name, t in tensors.items()}
    device.move((student, teacher, tied), torch.device("cpu"))
    for name, tensor in {**student.state_dict(keep_vars=True), "its": teacher.bias}.items():
        identity, place, value = before[name]
        assert id(tensor) == identity and tensor.data_ptr() != place, name
        assert torch.equal(tensor, value)
    assert student.weight.data_ptr() == teacher.weight.data_ptr()
    assert tied.weight is student.weight


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)]
)
def test_auto_takes_bf16_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    asked: list[object] = []

    def of(device: object) -> tuple[int, int]:
        asked.append(device)
        return capability

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", of)
    assert pick_dtype("auto", "cuda:1", SimpleNamespace(hidden_size=64)) is dtype
    assert asked == [torch.device("cuda", 1)]


def test_auto_on_a_gpu_and_by_name() -> None:
    small = SimpleNamespace(hidden_size=64)
    assert pick_dtype("auto", "cuda", small) is torch.bfloat16
    assert pick_dtype("float32", "cuda", small) is torch.float32
    with pytest.raises(ConfigError, match="dtype must be one of"):
        device.check_dtype("float16")

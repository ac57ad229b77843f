"""Optimizers that take less memory: against fp64, unbiased, the same for any shard and resumed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qatc.errors import ConfigError
from qatc.training import optimizers
from qatc.training.adamw import (
    Scalars,
    block_of,
    decode,
    encode,
    random_bits,
    round_to_bfloat16,
    update_float,
    words,
)
from qatc.training.config import TrainingConfig
from qatc.training.distill import Distiller
from qatc.training.optimizers import RoundingAdamW, make_optimizer
from tests.conftest import make_llama
from tests.training.conftest import CONFIG, VOCABULARY, assert_equal, losses, make_rows, weights

OPTIONS: dict[str, dict[str, Any]] = {
    "8 bits": {"optimizer": "adamw8bit"},
    "bf16 masters": {"master_dtype": "bfloat16"},
    "in backward": {"fused_step": True},
    "offloaded": {"offload": "optimizer"},
    "all": {
        "optimizer": "adamw8bit",
        "master_dtype": "bfloat16",
        "fused_step": True,
        "offload": "optimizer",
    },
}


def bits_of(count: int, step: int = 1, name: str = "w") -> Tensor:
    low, high = map(torch.tensor, words(step, name, 0))
    return random_bits(torch.arange(count), low, high)


class TestRounding:
    @settings(max_examples=25, deadline=None)
    @given(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), st.integers(1, 2**40))
    def test_of_bfloat16_is_unbiased_and_to_a_neighbour(self, value: float, step: int) -> None:
        count = 1 << 14
        x = torch.full((count,), value)
        rounded = round_to_bfloat16(x, bits_of(count, step)).double()
        unit = 2.0 ** (math.frexp(value)[1] - 8) if value else 1.0
        assert float((rounded - value).abs().max()) < unit
        # Five deviations of the mean of that many draws, which are at most half a unit each.
        assert abs(float(rounded.mean()) - value) <= 5 * unit / 2 / math.sqrt(count)

    def test_of_bfloat16_leaves_what_fits_and_what_is_no_number(self) -> None:
        kept = torch.tensor([0.0, -0.0, 1.5, -3.0, math.inf, -math.inf, math.nan])
        for step in range(1, 20):
            found = round_to_bfloat16(kept, bits_of(7, step))
            torch.testing.assert_close(found.float(), kept, rtol=0, atol=0, equal_nan=True)

    @settings(max_examples=25, deadline=None)
    @given(st.floats(0, 1, width=32), st.booleans(), st.integers(1, 2**40))
    def test_of_moments_is_unbiased(self, share: float, signed: bool, step: int) -> None:
        """But for second moments that would be rounded to 0."""
        count = 1 << 14
        x = torch.full((count, 2), 3.0)
        x[:, 0] *= -share if signed else share
        found = decode(*encode(x, bits_of(2 * count, step).view(-1, 2), signed), signed).double()
        assert torch.equal(found[:, 1], x[:, 1].double()), "the greatest of a block is exact"
        levels, power = (127, 2) if signed else (255, 4)
        code = min(int(share ** (1 / power) * levels), levels - 1)
        step_there = 3 * (((code + 1) / levels) ** power - (code / levels) ** power)
        if not signed and code == 0:
            assert float(found[:, 0].min()) >= 3 * min(share, (1 / 255) ** 4) * (1 - 1e-5)
            return
        error = abs(float(found[:, 0].mean() - x[0, 0].double()))
        assert error <= 5 * step_there / 2 / math.sqrt(count) + 1e-5 * 3 * share
        assert float((found[:, 0] - x[0, 0]).abs().max()) <= step_there * (1 + 1e-4) + 1e-6

    def test_a_second_moment_is_never_rounded_to_nothing(self) -> None:
        x = torch.tensor([[1.0, 1e-20, 0.0]]).expand(1000, 3)
        found = decode(*encode(x, bits_of(3000).view(-1, 3), False), False)
        assert (found[:, 1] > 0).all() and (found[:, 2] == 0).all()

    def test_chance_is_uniform_and_of_each_element_its_own(self) -> None:
        bits = bits_of(1 << 16)
        for part in (bits & 0xFFFF, bits >> 16):
            share = part.double() / 65536
            assert abs(float(share.mean()) - 0.5) < 5 / math.sqrt(12 * (1 << 16))
            pair = torch.stack([share[1:], share[:-1]])
            assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / 256
        others = [bits_of(1 << 16, 2), bits_of(1 << 16, name="v")]
        for other in others:
            assert abs(float(torch.corrcoef(torch.stack([bits, other]).double())[0, 1])) < 5 / 256


def reference(steps: list[Tensor], start: Tensor, rate: float) -> list[Tensor]:
    """AdamW by its definition, in float64: the parameter after every step."""
    p, m, v = start.double(), torch.zeros(1), torch.zeros(1)
    found = []
    for t, gradient in enumerate(steps, 1):
        g = gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        p = p - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        found.append(p)
    return found


class TestUpdate:
    def steps(self, shape: tuple[int, ...], count: int = 6) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(0)
        spread = torch.rand(shape, generator=generator)
        made = [torch.randn(shape, generator=generator) * spread for _ in range(count)]
        return made, torch.randn(shape, generator=generator)

    def test_in_float(self) -> None:
        gradients, start = self.steps((64,))
        p, mean, square = start.clone(), torch.zeros(64), torch.zeros(64)
        for t, (gradient, wanted) in enumerate(
            zip(gradients, reference(gradients, start, 1e-2), strict=True), 1
        ):
            s = Scalars.of(1e-2, t, "w")
            numbers = s.rate, s.first, s.second, s.low, s.high
            update_float(
                p, gradient * 4, mean, square, torch.tensor(0.25), torch.tensor(0), *numbers
            )
            torch.testing.assert_close(p.double(), wanted, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_in_8_bits(self, dtype: torch.dtype) -> None:
        """Close to AdamW, and in the mean of many elements as if nothing had been rounded."""
        gradients, start = self.steps((256, 128))
        gradients = [gradient.to(dtype).float() for gradient in gradients]
        start = start.to(dtype).float()
        p = nn.Parameter(start.to(dtype, copy=True))
        run = RoundingAdamW({"w": p}, 1e-2, coded=True)
        for gradient in gradients:
            p.grad = gradient.to(dtype)
            run.step()
        wanted = reference(gradients, start, 1e-2)[-1]
        moved, error = wanted - start.double(), p.detach().double() - wanted
        assert float(error.norm() / moved.norm()) < (0.1 if dtype is torch.float32 else 0.4)
        assert abs(float((error * moved.sign()).mean() / moved.abs().mean())) < 0.02

    def test_steps_far_below_half_a_unit_add_up(self) -> None:
        p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        run = RoundingAdamW({"w": p}, 1e-5)
        for _ in range(50):
            p.grad = torch.ones_like(p)
            run.step()
        assert float(p.detach().double().mean()) == pytest.approx(1 - 50e-5, abs=1e-4)

    @pytest.mark.parametrize("coded", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_shard_of_rows_is_updated_as_in_the_whole(
        self, coded: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And in blocks of any size, compiled or not."""
        gradients, start = self.steps((48, 96), 3)

        def trained(rows: slice, block: int) -> Any:
            monkeypatch.setattr(optimizers, "BLOCK", block)
            monkeypatch.setattr(optimizers, "first_row", lambda p: rows.start or 0)
            monkeypatch.setattr(optimizers, "block_of", lambda shape: 96)
            p = nn.Parameter(start[rows].to(dtype, copy=True))
            run = RoundingAdamW({"w": p}, 1e-2, coded=coded)
            for gradient in gradients:
                p.grad = gradient[rows].to(dtype)
                run.step()
            return [p.detach(), *run.state[p].values()][:-4] + [p.detach()]

        whole = trained(slice(None), 1 << 20)
        for cut, block in ((17, 96 * 5), (30, 100)):
            parts = [trained(slice(0, cut), block), trained(slice(cut, 48), block)]
            assert torch.equal(torch.cat([part[-1] for part in parts]), whole[-1])

    def test_compiled_is_the_same(self) -> None:
        gradients, start = self.steps((64, 96), 2)
        found = []
        for compile in (False, True):
            p = nn.Parameter(start.bfloat16())
            run = RoundingAdamW({"w": p}, 1e-2, coded=True, compile=compile)
            for gradient in gradients:
                p.grad = gradient.bfloat16()
                run.step()
            found.append([p.detach(), *run.state[p].values()])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=1)

    @pytest.mark.parametrize(
        ("shape", "block"),
        [((576, 576), 192), ((64, 4096), 256), ((4096,), None), ((8, 8), None), ((4096, 7), None)],
    )
    def test_blocks_divide_rows(self, shape: tuple[int, ...], block: int | None) -> None:
        assert block_of(torch.Size(shape)) == block


def run_of(directory: Path, config: TrainingConfig) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    student = make_llama(VOCABULARY, 1, tie_word_embeddings=False, **sizes)
    teacher = make_llama(VOCABULARY, 0, tie_word_embeddings=False, **sizes)
    if config.master_dtype == "bfloat16":
        student.bfloat16(), teacher.bfloat16()
    return Distiller(student, teacher, make_rows(), config, directory)


@pytest.mark.parametrize("name", OPTIONS)
def test_resumes_exactly(name: str, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=6, checkpoint_every=3, **OPTIONS[name])
    whole = run_of(tmp_path / "whole", config)
    history = whole.run()

    class Stopped(Exception):
        pass

    def stop(record: Any) -> None:
        if record.step == 4:
            raise Stopped

    with pytest.raises(Stopped):
        run_of(tmp_path / "parts", config).run(stop)
    resumed = run_of(tmp_path / "parts", config)
    assert losses(resumed.run()) == losses(history)
    assert_equal(weights(resumed.student), weights(whole.student))
    for p, q in zip(resumed.trained.values(), whole.trained.values(), strict=True):
        own, other = resumed.optimizer.state[p], whole.optimizer.state[q]
        assert {k: t.dtype for k, t in own.items()} == {k: t.dtype for k, t in other.items()}
        assert_equal(own, other)


@pytest.mark.parametrize("name", OPTIONS)
def test_learns(name: str, tmp_path: Path) -> None:
    usual = run_of(tmp_path / "usual", replace(CONFIG, steps=30)).run()
    history = run_of(tmp_path / "other", replace(CONFIG, steps=30, **OPTIONS[name])).run()
    assert history[-1].kl < 1.3 * usual[-1].kl < 0.8 * usual[0].kl


def test_on_a_cpu_nothing_is_moved_elsewhere(tmp_path: Path) -> None:
    usual, away = (
        run_of(tmp_path / place, replace(CONFIG, steps=2, offload=place))
        for place in ("none", "optimizer")
    )
    usual.run()
    away.run()
    assert_equal(weights(away.student), weights(usual.student))


class TestStepInBackward:
    def test_is_the_step_behind_it_where_nothing_is_clipped(self, tmp_path: Path) -> None:
        config = replace(CONFIG, gradient_clip=1e6, optimizer="adamw8bit")
        behind = run_of(tmp_path / "behind", config)
        within = run_of(tmp_path / "within", replace(config, fused_step=True))
        for a, b in zip(behind.run(), within.run(), strict=True):
            assert (b.loss, b.kl) == (a.loss, a.kl)
            assert b.gradient_norm == pytest.approx(a.gradient_norm, rel=1e-5)
        assert_equal(weights(within.student), weights(behind.student))

    def test_drops_gradients_and_clips_each(self, tmp_path: Path) -> None:
        run = run_of(tmp_path, replace(CONFIG, steps=1, gradient_clip=0.01, fused_step=True))
        norms: list[float] = []
        update = run.optimizer.update

        def watch(parameter: Any, factor: Tensor) -> None:
            norms.append(float((parameter.grad * factor).norm()))
            update(parameter, factor)

        run.optimizer.update = watch
        run.run()
        assert len(norms) == len(run.trained)
        assert max(norms) == pytest.approx(0.01, rel=1e-3)
        assert all(p.grad is None for p in run.trained.values())

    def test_cannot_accumulate(self) -> None:
        with pytest.raises(ConfigError, match="leave out one of --fused-step and --accumulate"):
            TrainingConfig(fused_step=True, accumulate=2)


@pytest.mark.parametrize(
    "wrong", [{"optimizer": "sgd"}, {"master_dtype": "float16"}, {"offload": "disk"}]
)
def test_other_values_are_refused(wrong: dict[str, str]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"{name} must be .* or .*; got '{wrong[name]}'"):
        TrainingConfig(**wrong)  # type: ignore[arg-type]


def test_by_default_it_is_that_of_torch() -> None:
    made = make_optimizer({"w": nn.Parameter(torch.zeros(2))}, CONFIG, 1e-3)
    assert type(made) is torch.optim.AdamW

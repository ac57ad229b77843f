"""The loss and the figures, against their definitions in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qatc.losses.distances import agreements, compiled, negative_log_likelihood, soft_cross_entropy


def log_softmax(x: Any) -> Any:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def random_logits(*shape: int, seed: int = 0) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    student, teacher = random.normal(0, 3, (2, *shape))
    return student, teacher


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def loss(request: pytest.FixtureRequest) -> Any:
    return compiled(soft_cross_entropy, request.param)


class TestSoftCrossEntropy:
    def test_is_the_one_of_the_definition(self, loss: Any) -> None:
        """Of the tokens that count alone; whatever stands in the others."""
        student, teacher = random_logits(7, 30)
        real = np.array([1, 1, 0, 1, 0, 1, 1], dtype=bool)
        p, log_p, log_q = np.exp(log_softmax(teacher)), log_softmax(teacher), log_softmax(student)
        for mask in (real, np.ones(7, dtype=bool)):
            wild = torch.tensor(student).float()
            wild[~torch.tensor(mask)] = 1e30
            found, kl = loss(wild, torch.tensor(teacher).float(), torch.tensor(mask))
            assert float(found) == pytest.approx(-(p * log_q)[mask].sum(), rel=1e-5)
            assert float(kl) == pytest.approx((p * (log_p - log_q))[mask].sum(), rel=1e-4)

    def test_gradient_is_the_difference_of_the_distributions(self, loss: Any) -> None:
        torch.manual_seed(0)
        student = torch.randn(7, 30, requires_grad=True)
        teacher = torch.randn(7, 30, requires_grad=True)
        real = torch.tensor([True, False, True, True, True, False, True])
        loss(student, teacher, real)[0].backward()
        wanted = (student.softmax(-1) - teacher.softmax(-1)) * real.unsqueeze(-1)
        torch.testing.assert_close(student.grad, wanted, rtol=1e-5, atol=1e-6)
        assert teacher.grad is None

    def test_bf16_logits_lose_nothing_on_the_way(self, loss: Any) -> None:
        student, teacher = (torch.tensor(x).bfloat16() for x in random_logits(9, 500))
        real = torch.ones(9, dtype=torch.bool)
        found, kl = loss(student, teacher, real)
        p, log_q = teacher.double().softmax(-1), student.double().log_softmax(-1)
        assert float(found) == pytest.approx(float(-(p * log_q).sum()), rel=1e-5)
        wanted = float((p * (p.log() - log_q)).sum())
        assert float(kl) == pytest.approx(wanted, rel=1e-4)

    def test_a_perfect_student_has_no_divergence(self) -> None:
        logits = torch.randn(7, 30)
        assert float(soft_cross_entropy(logits, logits)[1]) == 0

    def test_one_graph_serves_any_number_of_tokens(self) -> None:
        from torch._dynamo.utils import counters

        function = compiled(soft_cross_entropy, True)
        graphs: list[int] = []
        for count in (8, 24, 40, 56):
            logits = torch.randn(count, 17)
            function(logits, logits + 1, torch.ones(count, dtype=torch.bool))
            graphs.append(counters["stats"]["unique_graphs"])
        assert graphs[0] == graphs[-1]


@pytest.mark.parametrize("compile", [False, True])
def test_likelihood_is_that_of_the_labelled_tokens(compile: bool) -> None:
    logits, _ = random_logits(6, 20)
    following = np.array([3, 19, 0, 7, 7, 2])
    labelled = np.array([1, 0, 1, 1, 0, 1], dtype=bool)
    function: Any = compiled(negative_log_likelihood, compile)
    found: Tensor = function(*map(torch.tensor, (logits, following, labelled)))
    wanted = -log_softmax(logits)[np.arange(6), following][labelled].sum()
    assert float(found) == pytest.approx(wanted, rel=1e-6)


def test_agreements_count_real_tokens_only() -> None:
    one = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 1.0]])
    other = torch.tensor([[0.0, 9.0], [0.0, 1.0], [0.0, 2.0]])
    assert int(agreements(one, other, torch.tensor([True, True, False]))) == 1
    assert int(agreements(one, other, torch.tensor([True, True, True]))) == 2

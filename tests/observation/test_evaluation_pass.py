"""Figures of an evaluation against their definitions, and standard errors against repeated draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mfptq.observation.evaluation_pass as module
from mfptq.observation.evaluation_pass import compare_logits, hidden_error


@pytest.mark.parametrize("elements", [2**24, 100, 1])
def test_sums_are_those_of_the_definitions(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(1)
    source, output = (torch.randn(9, 33, generator=generator) * 3 for _ in range(2))
    ids = np.array([3, 1, 32, 0, 7, 7, 20, 5, 11])
    p, q = source.double().softmax(-1)[:-1], output.double().softmax(-1)[:-1]
    found = compare_logits(source, output, ids)
    rows = torch.arange(8)
    assert found.positions == 8
    assert found.source_loss == pytest.approx(-p[rows, ids[1:]].log().sum().item(), rel=1e-6)
    assert found.loss == pytest.approx(-q[rows, ids[1:]].log().sum().item(), rel=1e-6)
    assert found.divergence == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    assert found.agreed == (p.argmax(-1) == q.argmax(-1)).sum().item()


def test_a_model_does_not_differ_from_itself() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    found = compare_logits(logits, logits, np.arange(5))
    assert (found.divergence, found.agreed) == (0.0, 4)
    assert found.loss == found.source_loss


def test_hidden_error_is_the_sum_of_relative_errors() -> None:
    source = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    output = torch.tensor([[[3.0, 5.0], [0.5, 1.0]]])
    assert hidden_error(source, output) == pytest.approx(1 / 5 + 0.5)

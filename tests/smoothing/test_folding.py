"""Smoothing leaves the unquantized model as it is: to the bit where norms only multiply, up to their rounding where 1 is added."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..calibration.files import stored
from ..conftest import sampled
from ..models import DENSE, MOE
from .models import ADDED, PLAIN, fold, logits, write_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind", sampled(PLAIN[::2], PLAIN[1::2]))
def test_logits_are_equal_to_the_bit(kind: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", kind)
    folded = fold(source, tmp_path / "folded")
    before, after = stored(source), stored(folded)
    changed = {name.rpartition("layers.0.")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed >= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    latent = {"self_attn.q_a_layernorm.weight", "self_attn.q_b_proj.weight"}
    assert changed >= (latent if "deepseek" in kind else {"self_attn.v_proj.weight", "self_attn.o_proj.weight"})
    assert torch.equal(logits(source), logits(folded))


@pytest.mark.parametrize("kind", [*ADDED, DENSE, MOE])
def test_logits_are_equal_up_to_the_rounding_of_norms(kind: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", kind)
    folded = fold(source, tmp_path / "folded")
    exact, found = logits(source, torch.float32), logits(folded, torch.float32)
    assert not torch.equal(exact, found)
    assert (found - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("kind", sampled(ADDED[1::2], ADDED[::2]))
def test_norms_stored_in_float32_hardly_round(kind: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", kind, torch.float32)
    folded = fold(source, tmp_path / "folded")
    exact, found = logits(source), logits(folded)
    assert (found - exact).norm() < 1e-5 * exact.norm()

"""A tiny DeepSeek-V4, whose experts are MXFP4 and the rest FP8 in blocks, converts to what its bfloat16 cast converts to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mfptq

from ..calibration.files import stored
from ..clients.deepseek_v4 import CONFIG, QUANTIZATION, release
from ..conftest import sampled
from .checkpoints import write

HEADS = 4  # the weights of attention are much the largest
SMALL = CONFIG | {"num_attention_heads": HEADS}


@pytest.mark.parametrize(
    ("side", "method"), sampled([(128, "search"), (32, "minmax")], [(128, "minmax"), (32, "search")])
)
def test_a_release_converts_to_what_its_cast_converts_to(side: int, method: str, tmp_path: Path) -> None:
    codes, cast = release((side, side), HEADS)
    said = QUANTIZATION | {"weight_block_size": [side, side]}
    write(tmp_path / "release", codes, config=SMALL | {"quantization_config": said})
    write(tmp_path / "cast", cast, config={key: value for key, value in SMALL.items() if key != "expert_dtype"})
    for kind in ("release", "cast"):
        mfptq.convert(tmp_path / kind, tmp_path / f"{kind}-out", method=method)
    one, other = stored(tmp_path / "release-out"), stored(tmp_path / "cast-out")
    assert one.keys() == other.keys()
    assert [
        name
        for name in one
        if not torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
    ] == []
    configs = [(tmp_path / f"{kind}-out" / "config.json").read_text() for kind in ("release", "cast")]
    assert configs[0] == configs[1]
    assert mfptq.verify(tmp_path / "release-out", tmp_path / "release").ok

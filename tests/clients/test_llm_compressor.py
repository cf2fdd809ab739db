"""The twin that stands for llm-compressor in other tests equals what llm-compressor's `model_free_ptq` writes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("llmcompressor")

import torch

import mfptq
from mfptq.demo import DemoShape, write_demo
from tests.engines.llm_compressor import (
    IGNORE,
    as_served,
    layer_errors,
    read,
    unequal_groups,
    unstacked,
    write_as_llm_compressor,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
SHAPES = {"dense": DemoShape(), "experts": DemoShape(experts=4, intermediate=128)}


@pytest.mark.parametrize("name", SHAPES)
def test_the_twin_and_the_original(name: str, tmp_path: Path) -> None:
    from llmcompressor import model_free_ptq

    source, out = tmp_path / "source", tmp_path / "llmc"
    write_demo(source, SHAPES[name], shards=1)
    model_free_ptq(str(source), str(out), scheme="NVFP4A16", ignore=IGNORE, device="cpu")
    theirs, twin = read(out), read(write_as_llm_compressor(source, tmp_path / "twin"))
    assert theirs.keys() == twin.keys()
    different = [key for key in theirs if not torch.equal(theirs[key].view(torch.uint8), twin[key].view(torch.uint8))]
    assert not different

    found = mfptq.check(out, source=source).findings
    assert {each.code for each in found} == {"unequal-weight-scales"}
    assert sum(each.count for each in found) == len(unequal_groups(theirs))
    mfptq.convert(out, tmp_path / "repaired", like=out)
    assert mfptq.check(tmp_path / "repaired", source=source).findings == ()
    exact, before, after = unstacked(read(source)), as_served(theirs), as_served(read(tmp_path / "repaired"))
    was, now = layer_errors(before, exact), layer_errors(after, exact)
    assert not [layer for layer in was if now[layer] > 1.01 * was[layer]]  # nearly equal scales: rounded a second time

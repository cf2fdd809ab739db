"""Decide whether a model is held in memory or streamed from disk, and how many samples walk through it in step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..calibration.file import InputInfo, Level
from ..checkpoint.folder import Checkpoint
from ..dtypes import DTYPE_BITS
from ..errors import MemoryBudgetError
from ..execution.memory_budget import available_bytes, resident_bytes
from .models import Skeleton
from .sums import sum_elements

USABLE = 0.8  # of what the machine has left, where no limit is given
DEFAULT_BATCH = 16
MAX_BATCH = 64
SLACK = 64 * 2**20
BYTES_PER_ELEMENT = 40  # of the widest activation: what a block holds of one at a time, in several precisions


@dataclass(frozen=True, slots=True)
class Demand:
    """What a calibration needs, in bytes: `sample` for each sample in step, `work` for the one that is being run."""

    model: int
    block: int
    sums: int
    sample: int
    work: int


@dataclass(frozen=True, slots=True)
class Residency:
    """How a model is run; `batch` samples go between two writes of the file."""

    streamed: bool
    batch: int


def measure_demand(
    skeleton: Skeleton, checkpoint: Checkpoint, inputs: Sequence[InputInfo], *, level: Level, length: int
) -> Demand:
    """Return what it takes to run samples of `length` tokens, from names and shapes alone."""
    elements = sum(tensor.info.nbytes * 8 // DTYPE_BITS[tensor.info.dtype] for tensor in checkpoint.tensors())
    stored = checkpoint.tensor_bytes / max(elements, 1)
    item = {"float32": 4.0, "bfloat16": 2.0}.get(skeleton.dtype, stored)
    hidden = skeleton.config.get_text_config().hidden_size
    widest = max(info.columns for info in inputs)
    return Demand(
        model=int(elements * item),
        block=int((item if item == stored else item + stored) * _largest_block(skeleton)),
        sums=8 * sum(sum_elements(info.columns, level) for info in inputs),
        sample=int(length * hidden * item),
        work=length * (widest + 2 * hidden) * BYTES_PER_ELEMENT + SLACK,
    )


def _largest_block(skeleton: Skeleton) -> int:
    from torch import nn

    lists = [module for module in skeleton.model.modules() if isinstance(module, nn.ModuleList)]
    return max((sum(each.numel() for each in block.parameters()) for blocks in lists for block in blocks), default=0)


def choose_residency(demand: Demand, budget: int | None, batch: int | None, device: str) -> Residency:
    """Return how to run a model in `budget` bytes, None for what the machine has.

    Raises MemoryBudgetError, naming the least that works, where not even one block fits.
    """
    held = resident_bytes()
    if budget is None:
        free = available_bytes()
        budget = held + int(USABLE * free) if free is not None else 2**62
    common = held + demand.sums + demand.work
    if device != "cpu":
        return _on_accelerator(demand, batch, device)
    if common + demand.model <= budget:
        return Residency(False, batch or DEFAULT_BATCH)
    free = budget - common - demand.block
    if free < demand.sample * (batch or 1):
        least = -(-(common + demand.block + demand.sample * (batch or 1)) // 10**6)
        raise MemoryBudgetError(
            f"calibration needs about {least} MB here, {budget // 10**6} MB are allowed: raise max_memory, or lower "
            "max_seq_length or batch_size"
        )
    return Residency(True, batch or min(MAX_BATCH, free // demand.sample))


def _on_accelerator(demand: Demand, batch: int | None, device: str) -> Residency:
    import torch

    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else 2**62
    free -= demand.work
    if demand.model <= free:
        return Residency(False, batch or DEFAULT_BATCH)
    fitting = (free - demand.block) // demand.sample
    if fitting < (batch or 1):
        raise MemoryBudgetError(f"a block of the model and its samples do not fit into the memory of {device}")
    return Residency(True, batch or min(MAX_BATCH, fitting))

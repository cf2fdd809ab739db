"""Decide whether a model is held in memory or streamed from disk, and how many samples walk through it in step.

Called by `calibration_pass` and `evaluation_pass`. What is needed is computed from names and shapes; nothing is loaded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..calibration.file import InputInfo, Level
from ..dtypes import DTYPE_BITS
from ..errors import MemoryBudgetError
from ..execution.memory_budget import available_bytes, resident_bytes
from .models import Skeleton
from .sensitivity import ROUNDED_AT_ONCE, TEXTS, TOKENS
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


def measure_demand(skeleton: Skeleton, inputs: Sequence[InputInfo], *, level: Level, length: int) -> Demand:
    """Return what it takes to run samples of `length` tokens, from names and shapes alone."""
    checkpoint = skeleton.checkpoint
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


def with_variants(demand: Demand, variants: int, length: int) -> Demand:
    """Return what a calibration needs that measures this many variants first; `length` is that of its longest sample.

    A hidden state is kept for each variant, twice while a block runs, and the largest block once more, rounded.
    """
    hidden = TEXTS * min(TOKENS, length) * demand.sample // length
    return replace(demand, work=demand.work + demand.block + (2 * variants + 2) * hidden + 32 * ROUNDED_AT_ONCE)


def _largest_block(skeleton: Skeleton) -> int:
    lists = [module for module in skeleton.model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max((sum(each.numel() for each in block.parameters()) for blocks in lists for block in blocks), default=0)


class Room(NamedTuple):
    """Memory of a device, in bytes: what may be taken, and what the process holds there."""

    device: str
    free: int
    held: int

    @classmethod
    def on(cls, device: str, budget: int | None) -> Room:
        """Return the room on a device, of a `budget` for the process, None for what is left there."""
        if device.startswith("cuda"):
            return cls(device, int(torch.cuda.mem_get_info(device)[0]), 0)
        held = resident_bytes()
        if budget is not None:
            return cls(device, budget - held, held)
        free = available_bytes()
        return cls(device, int(USABLE * free) if free is not None else 2**62, held)

    def check(self, what: str, least: int, smaller: str) -> None:
        """Raise MemoryBudgetError if `least` bytes are not free; `smaller` names what needs less memory if it is lowered."""
        if least > self.free:
            advice = f"lower {smaller}" if self.device.startswith("cuda") else f"raise max_memory, or lower {smaller}"
            needed, allowed = -(-(self.held + least) // 10**6), (self.held + self.free) // 10**6
            raise MemoryBudgetError(
                f"{what} needs about {needed} MB on {self.device}, {allowed} MB are allowed: {advice}"
            )


def choose_residency(demand: Demand, budget: int | None, batch: int | None, device: str) -> Residency:
    """Return how to run a model in `budget` bytes, None for what the device has left.

    Raises MemoryBudgetError, naming the least that works, where not even one block fits.
    """
    room = Room.on(device, budget)
    fixed = demand.work + (0 if device.startswith("cuda") else demand.sums)  # sums stay in the host's memory
    if fixed + demand.model <= room.free:
        return Residency(False, batch or DEFAULT_BATCH)
    least = fixed + demand.block + demand.sample * (batch or 1)
    room.check("calibration", least, "max_seq_length or batch_size")
    return Residency(True, batch or min(MAX_BATCH, (room.free - fixed - demand.block) // demand.sample))

"""Run a source model and its quantized output in step, block by block, with one model in memory or on disk.

Called by `evaluate`. The output's weights take the place of the source's while its turn lasts, so memory holds one model, or
one block of it, and one block decoded. Hidden states of all windows are kept, two for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..calibration.file import InputInfo
from ..checkpoint.folder import Checkpoint
from ..errors import MemoryBudgetError, SourceError
from ..execution.memory_budget import available_bytes, resident_bytes
from .models import Skeleton
from .quantized import DECODED_AT_ONCE, QuantizedCheckpoint
from .residency import USABLE, measure_demand
from .streaming import Runner, StreamingRunner, floats
from .substitution import Substitution, find_substitution
from .texts import TokenIds

if TYPE_CHECKING:
    from torch import nn

Both = tuple[torch.Tensor, torch.Tensor]
Tick = Callable[[], None]
LOGIT_COPIES = 6  # of a window, float32: both models', their logarithms, and what the model holds meanwhile
DECODING_BYTES = 32  # for each weight that is decoded at once


@dataclass(slots=True)
class SideBySide:
    """Both models at one block; `given` is what the last one gave for each window, the source's and the output's."""

    runner: Runner
    output: QuantizedCheckpoint
    substitution: Substitution = field(init=False)
    head: str = field(init=False)
    given: list[tuple[Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        runner = self.runner
        self.substitution = find_substitution(runner.model, self.output)
        self.head = _module_name(runner.model, runner.model.get_output_embeddings())  # type: ignore[operator]
        self.substitution.keep_only([*runner.blocks, self.head])
        if isinstance(runner, StreamingRunner) and runner.stream is not None:
            runner.stream.take_over([self.head])

    @property
    def dtype(self) -> str:
        """The dtype of the computation."""
        first = self.runner.model.get_submodule(self.runner.blocks[0])
        return str(next(iter(first.parameters())).dtype).removeprefix("torch.")

    def run_block(self, name: str, windows: Sequence[TokenIds], tick: Tick) -> Iterator[Both]:
        """Run one block for all windows; yield the hidden states behind it, the source's and the output's."""
        runner = self.runner
        runner.stage = runner.blocks.index(name)
        before = self.given or [(None, None)] * len(windows)
        with self._weights(name):
            source = [self._step(ids, given, tick) for ids, (given, _) in zip(windows, before, strict=True)]
            with self.substitution.lent(runner.model, name):
                output = [self._step(ids, given, tick) for ids, (_, given) in zip(windows, before, strict=True)]
        self.given = list(zip(source, output, strict=True))
        for exact, found in self.given:
            yield next(floats(exact)), next(floats(found))

    def run_head(self, windows: Sequence[TokenIds], tick: Tick, *, first: int = 0) -> Iterator[Both]:
        """Run what follows the last block; yield the logits `[L, V]` of each window from `first` on, the source's and the output's."""
        self.runner.stage = len(self.runner.blocks)
        with self._weights(self.head):
            for ids, (exact, found) in zip(windows[first:], self.given[first:], strict=True):
                source = self._logits(ids, exact, tick)
                with self.substitution.lent(self.runner.model, self.head):
                    output = self._logits(ids, found, tick)
                yield source, output

    def _step(self, ids: TokenIds, given: Any, tick: Tick) -> Any:
        self.runner.given = given
        self.runner.forward(ids)
        tick()
        return self.runner.given

    def _logits(self, ids: TokenIds, given: Any, tick: Tick) -> torch.Tensor:
        self.runner.given = given
        logits = getattr(self.runner.forward(ids), "logits", None)
        if not isinstance(logits, torch.Tensor):
            raise SourceError("the model predicts no tokens: it gives no logits")
        tick()
        return logits[0]

    @contextmanager
    def _weights(self, name: str) -> Iterator[None]:
        """Hold a module's weights in memory inside the block, where the model lies on disk."""
        with ExitStack() as stack:
            if isinstance(self.runner, StreamingRunner) and self.runner.stream is not None:
                stack.enter_context(self.runner.stream.block(name))
            yield


def _module_name(model: nn.Module, wanted: Any) -> str:
    """Return the name of one of a model's modules; raises SourceError if it has none, as models without a head."""
    found: str | None = next((name for name, module in model.named_modules() if module is wanted), None)
    if found is None:
        raise SourceError("the model predicts no tokens: it has no output embeddings")
    return found


def decoder_blocks(model: nn.Module, layers: int) -> tuple[str, ...]:
    """Return the names of the blocks that text goes through: the list of `layers` modules beside the embedding table.

    Raises SourceError where there is no such list, or several.
    """
    beside = _module_name(model, model.get_input_embeddings()).rpartition(".")[0]  # type: ignore[operator]
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and name.rpartition(".")[0] == beside and len(module) == layers
    ]
    if len(lists) != 1:
        raise SourceError(f"the model has {len(lists)} lists of {layers} blocks beside its embeddings, expected one")
    return tuple(f"{lists[0]}.{number}" for number in range(layers))


@dataclass(frozen=True, slots=True)
class EvaluationDemand:
    """What an evaluation needs, in bytes: `common` whichever way the model is run."""

    model: int
    block: int
    common: int

    def is_streamed(self, budget: int | None, device: str) -> bool:
        """Return whether the model has to be read block by block in `budget` bytes, None for what there is.

        Raises MemoryBudgetError, naming the least that works, where not even a block fits.
        """
        free, held = _free(budget, device)
        if self.common + self.block + self.model <= free:
            return False
        if self.common + 2 * self.block <= free:
            return True
        least = -(-(held + self.common + 2 * self.block) // 10**6)
        raise MemoryBudgetError(
            f"the evaluation needs about {least} MB on {device}, {(held + free) // 10**6} MB are allowed: raise max_memory, "
            "or lower samples or max_seq_length"
        )


def _free(budget: int | None, device: str) -> tuple[int, int]:
    """Return the bytes that may be taken on a device, and those that the process holds there."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0]), 0
    held = resident_bytes()
    if budget is not None:
        return budget - held, held
    free = available_bytes()
    return (int(USABLE * free) if free is not None else 2**62), held


def measure(
    skeleton: Skeleton, checkpoints: tuple[Checkpoint, QuantizedCheckpoint], windows: Sequence[TokenIds]
) -> EvaluationDemand:
    """Return what it takes to run both models over the windows, from names and shapes alone."""
    source, output = checkpoints
    length = max(len(ids) for ids in windows)
    infos = [InputInfo(each.module, each.columns, (each.module,)) for each in output.weights.values()]
    demand = measure_demand(skeleton, source, infos, level="amax", length=length)
    hidden = 2 * sum(len(ids) for ids in windows) * demand.sample // length
    vocabulary = skeleton.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    logits = LOGIT_COPIES * 4 * length * vocabulary
    head = demand.model * skeleton.model.get_input_embeddings().weight.numel() // _elements(skeleton.model)  # type: ignore[operator]
    return EvaluationDemand(
        demand.model,
        max(demand.block, head),
        hidden + demand.work + logits + DECODING_BYTES * DECODED_AT_ONCE,
    )


def _elements(model: nn.Module) -> int:
    return max(1, sum(parameter.numel() for parameter in model.parameters()))

"""Run a model over text, one sample at a time: the whole of it, or block by block for many samples.

Called by `calibration_pass`, `side_by_side` and `sensitivity`; `streaming` makes the runner of a model that lies on disk.

Stage k runs block k for every sample, from what block k - 1 gave for it. The model's own forward pass decides what a
block is called with: it begins anew at every stage, blocks before k stand aside and give back what is known. Were a
block to look further back than its predecessor, it would find NaN there, and the run would stop instead of being wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..errors import MemoryBudgetError, ScaleError
from .texts import TokenIds

if TYPE_CHECKING:
    from torch import nn

    from .streaming import Stream


TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class _LeftError(Exception):
    """The forward pass is over as far as it is needed."""


@dataclass(slots=True)
class Runner:
    """A model in memory; unless `to_end`, a pass ends behind the last block, so that no output head is computed.

    `tick` is called behind every block that is run. `entered` counts the blocks that the present pass has come to, `stage` is the
    one that alone is run, None for all, and `given` what the last one gave.
    """

    model: nn.Module
    blocks: Sequence[str]
    device: str
    tick: Callable[[], object] = lambda: None
    to_end: bool = False
    entered: int = 0
    stage: int | None = None
    given: Any = None

    @contextmanager
    def engaged(self) -> Iterator[None]:
        """Stand between the model and its blocks inside the block."""
        modules = [self.model.get_submodule(name) for name in self.blocks]
        originals = [module.forward for module in modules]
        for place, module in enumerate(modules):
            module.forward = partial(self._enter, place, originals[place])
        try:
            yield
        finally:
            for module, original in zip(modules, originals, strict=True):
                module.forward = original

    def run(self, samples: Sequence[TokenIds]) -> None:
        """Run samples through the whole model, one after the other."""
        for ids in samples:
            self.forward(ids)

    def forward(self, ids: TokenIds) -> Any:
        """Run one sample `[length]`, alone: no padding, and no attention mask but the model's own.

        Returns what the model gives, None unless the pass goes `to_end`.
        """
        self.entered = 0
        try:
            with torch.no_grad():
                output = self.model(input_ids=torch.from_numpy(ids)[None].to(self.device))
        except _LeftError:
            return None
        except torch.cuda.OutOfMemoryError:
            raise MemoryBudgetError(
                f"a sample of {len(ids)} tokens does not fit into the memory of {self.device}: lower max_seq_length"
            ) from None
        if self.to_end and self.entered == len(self.blocks):
            return output
        raise ScaleError("the model ended before its last block: it cannot be run by reading text")

    @contextmanager
    def only(self, stage: int, module: str) -> Iterator[None]:
        """Run nothing but one stage inside the block: block `stage`, or behind the last one the head; `module` is its name."""
        self.stage = stage
        try:
            with self.weights(module):
                yield
        finally:
            self.stage = self.given = None

    def step(self, ids: TokenIds, given: Any) -> Any:
        """Run the present stage's block for one sample, from what the block before gave; return what it gives."""
        self.given = given
        self.forward(ids)
        return self.given

    def weights(self, _module: str) -> AbstractContextManager[None]:
        """Hold a module's weights in memory inside the block: here they always are."""
        return nullcontext()

    def _enter(self, place: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if place != self.entered:
            raise ScaleError(
                f"the model runs block {place} where {self.entered} was expected: it cannot be run in order"
            )
        self.entered += 1
        if self.stage is not None and place < self.stage:
            return self.given if place == self.stage - 1 else _poisoned(self.given)
        if self.stage is not None and self.stage > 1 and _has_nan((args, kwargs)):
            raise ScaleError("a block looks further back than the one before it: raise max_memory to hold the model")
        output = original(*args, **kwargs)
        self.tick()
        if self.stage is not None:
            self.given = output
        if place == self.stage or (place == len(self.blocks) - 1 and not self.to_end):
            raise _LeftError
        return output


@dataclass(slots=True, kw_only=True)
class StreamingRunner(Runner):
    """A model on disk: each block is read once for all the samples of a pass."""

    stream: Stream

    def run(self, samples: Sequence[TokenIds]) -> None:
        """Run samples through the model block by block; what each block gave for each sample is kept for the next."""
        given: list[Any] = [None] * len(samples)
        for stage, name in enumerate(self.blocks):
            with self.only(stage, name):
                for number, ids in enumerate(samples):
                    given[number] = self.step(ids, given[number])

    def weights(self, module: str) -> AbstractContextManager[None]:
        """Hold a module's weights in memory inside the block: they are read from disk."""
        return self.stream.block(module)


def swap_parameter(module: Any, name: str, values: torch.Tensor, stack: ExitStack) -> None:
    """Give a module other values for one of its parameters until the stack ends."""
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, torch.nn.Parameter(values, requires_grad=False))


def floats(values: Any) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors in what a block is called with or gives, in their order."""
    if isinstance(values, torch.Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from floats(value)
    elif isinstance(values, dict):
        yield from floats(list(values.values()))


def _has_nan(values: Any) -> bool:
    return any(bool(tensor.isnan().any()) for tensor in floats(values))


def _poisoned(values: Any) -> Any:
    """Return a block's output with NaN in place of every float; it takes no memory."""
    if isinstance(values, torch.Tensor):
        return values.new_full((1,), torch.nan).expand(values.shape) if values.is_floating_point() else values
    if isinstance(values, (list, tuple)):
        return type(values)(_poisoned(value) for value in values)
    return values

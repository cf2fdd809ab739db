"""Run a model that is larger than memory: its repeated blocks are read one at a time, once for many samples.

Stage k runs block k for every sample, from what block k - 1 gave for it. The model's own forward pass decides what a
block is called with: it begins anew at every stage, blocks before k stand aside and give back what is known. Were a
block to look further back than its predecessor, it would find NaN there, and the run would stop instead of being wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checkpoint.folder import Checkpoint
from ..checkpoint.weights import StoredTensor
from ..errors import MemoryBudgetError, ScaleError
from .texts import TokenIds

if TYPE_CHECKING:
    from torch import nn

TABLE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
Tick = Callable[[], None]


class _LeftError(Exception):
    """The forward pass is over as far as it is needed."""


def _no_tick() -> None:
    """Take no notice of a step."""


@dataclass(slots=True)
class Runner:
    """A model in memory; unless `to_end`, a pass ends behind the last block, so that no output head is computed."""

    model: nn.Module
    blocks: Sequence[str]
    device: str
    tick: Tick = _no_tick
    to_end: bool = False
    order: int = 0
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
        self.order = 0
        try:
            with torch.no_grad():
                output = self.model(input_ids=torch.from_numpy(ids)[None].to(self.device))
        except _LeftError:
            return None
        except torch.cuda.OutOfMemoryError:
            raise MemoryBudgetError(
                f"a sample of {len(ids)} tokens does not fit into the memory of {self.device}: lower max_seq_length"
            ) from None
        if self.to_end and self.order == len(self.blocks):
            return output
        raise ScaleError("the model ended before its last block: it cannot be run by reading text")

    def _enter(self, place: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if place != self.order:
            raise ScaleError(f"the model runs block {place} where {self.order} was expected: it cannot be run in order")
        self.order += 1
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


@dataclass(slots=True)
class StreamingRunner(Runner):
    """A model on disk: each block is read once for all the samples of a pass."""

    stream: Stream | None = None

    def run(self, samples: Sequence[TokenIds]) -> None:
        """Run samples through the model block by block; what each block gave for each sample is kept for the next."""
        assert self.stream is not None
        given: list[Any] = [None] * len(samples)
        for stage, name in enumerate(self.blocks):
            self.stage = stage
            with self.stream.block(name):
                for number, ids in enumerate(samples):
                    self.given = given[number]
                    self.forward(ids)
                    given[number] = self.given
        self.given = None


@dataclass(slots=True)
class Stream:
    """Lends blocks their weights, through the index that accelerate's disk offload keeps of them."""

    model: nn.Module
    device: str
    loader: Any = field(init=False)

    def __post_init__(self) -> None:
        self.loader = _offloaded_weights(self.model)

    def convert(self, dtype: str) -> None:
        """Give the weights this dtype when they are read; until then it changes nothing but their description."""
        for entry in self.loader.index.values():
            entry["dtype"] = dtype
        wanted = getattr(torch, dtype)
        for module in self.model.modules():
            for own, tensor in module.named_parameters(recurse=False):
                if tensor.device.type == "meta" and tensor.is_floating_point():
                    setattr(module, own, torch.nn.Parameter(tensor.to(wanted), requires_grad=False))

    def take_over(self, blocks: Sequence[str]) -> None:
        """Remove accelerate's hooks from blocks: their weights come and go with `block` alone."""
        from accelerate.hooks import remove_hook_from_module

        for name in blocks:
            remove_hook_from_module(self.model.get_submodule(name), recurse=True)
        for module in self.model.modules():
            for hook in _hooks(module):
                hook.execution_device = self.device
            for own, buffer in module.named_buffers(recurse=False):
                setattr(module, own, buffer.to(self.device))

    @contextmanager
    def block(self, name: str) -> Iterator[None]:
        """Hold a block's weights in memory inside the block."""
        from accelerate.utils import set_module_tensor_to_device

        module = self.model.get_submodule(name)
        names = [own for own, tensor in module.state_dict(keep_vars=True).items() if tensor.device.type == "meta"]
        try:
            for own in names:
                set_module_tensor_to_device(module, own, self.device, value=self.loader[f"{name}.{own}"])
            yield
        finally:
            for own in names:
                set_module_tensor_to_device(module, own, "meta")


def open_stream(
    model: nn.Module, blocks: Sequence[str], checkpoint: Checkpoint, *, device: str, dtype: str = "auto"
) -> StreamingRunner:
    """Return what runs a model that lies on disk, in the dtype of its weights (`auto`) or in another."""
    stream = Stream(model, device)
    if dtype != "auto":
        stream.convert(dtype)
    stream.take_over(blocks)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    own = next(name for name, module in model.named_modules() if module is embedding)
    stored = stream.loader.index[f"{own}.weight"]["weight_name"]
    table = next((tensor for tensor in checkpoint.tensors() if tensor.info.name == stored), None)
    if table is not None and table.info.dtype in TABLE_DTYPES:
        EmbeddingRows(embedding, checkpoint, table)
    return StreamingRunner(model, blocks, device, stream=stream)


def _offloaded_weights(model: nn.Module) -> Any:
    """Return the mapping from parameter names to weights on disk that accelerate's hooks share."""
    maps = (getattr(hook, "weights_map", None) for module in model.modules() for hook in _hooks(module))
    weights = next(each for each in maps if each is not None)
    return getattr(weights, "dataset", weights)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return accelerate's hooks of one module."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


class EmbeddingRows:
    """Reads the rows of an embedding table that a sample needs, in place of the whole table."""

    def __init__(self, module: nn.Module, checkpoint: Checkpoint, table: StoredTensor) -> None:
        from accelerate.hooks import remove_hook_from_module

        self.module: Any = remove_hook_from_module(module)
        self.checkpoint = checkpoint
        self.table = table
        self.dtype = TABLE_DTYPES[table.info.dtype]
        self.module.padding_idx = None
        self.forward = self.module.forward
        self.meta = self.module.weight
        self.module.forward = self.look_up

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what the embedding gives for token ids, computed by itself from the rows alone."""
        wanted, places = torch.unique(ids, return_inverse=True)
        self.module.weight = torch.nn.Parameter(self._rows(wanted.tolist()).to(ids.device), requires_grad=False)
        try:
            found: torch.Tensor = self.forward(places)
            return found
        finally:
            self.module.weight = self.meta

    def _rows(self, wanted: Sequence[int]) -> torch.Tensor:
        info = self.table.info
        row = info.nbytes // info.shape[0]
        data = np.empty((len(wanted), row), np.uint8)
        for place, number in enumerate(wanted):
            self.checkpoint.source.read_into(
                self.table.shard, self.table.offset + number * row, memoryview(data[place])
            )
        return torch.from_numpy(data).view(self.dtype).to(self.meta.dtype)


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

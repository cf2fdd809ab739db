"""Lend a model that lies on disk its weights: one block at a time, and the rows of the embedding table that a sample needs.

Called by `calibration_pass` and `evaluation_pass`, which run what `load_runner` lends. The rest of the model is read module by
module by accelerate's hooks, as transformers sets them up. Nothing here decides what is streamed: `residency` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import models
from .forward_options import ForwardOptions
from .runner import TORCH_DTYPES, Runner, StreamingRunner

if TYPE_CHECKING:
    from torch import nn

    from ..checkpoint.folder import Checkpoint
    from ..checkpoint.weights import StoredTensor

# accelerate is imported where it is used: that it is installed is checked before (`models.require_extra`).
OFFLOAD = ".mfptq-"  # folders of weights that are rearranged while a model is streamed


@dataclass(slots=True)
class Stream:
    """Lends blocks their weights, through the index that accelerate's disk offload keeps of them."""

    model: nn.Module
    device: str
    loader: Any = field(init=False)

    def __post_init__(self) -> None:
        self.loader = _offloaded_weights(self.model)

    def prepare(self, blocks: Sequence[str], checkpoint: Checkpoint, dtype: str) -> None:
        """Take over blocks and the embedding table, and compute in the dtype of the weights (`auto`) or in another."""
        if dtype != "auto":
            self._convert(dtype)
        self.take_over(blocks)
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        own = next(name for name, module in self.model.named_modules() if module is embedding)
        stored = self.loader.index[f"{own}.weight"]["weight_name"]
        table = next((tensor for tensor in checkpoint.tensors() if tensor.info.name == stored), None)
        if table is not None and table.info.dtype in TORCH_DTYPES:
            EmbeddingRows(embedding, checkpoint, table)

    def _convert(self, dtype: str) -> None:
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


@contextmanager
def load_runner(
    skeleton: models.Skeleton, blocks: Sequence[str], options: ForwardOptions, *, stream_in: Path | None
) -> Iterator[Runner]:
    """Load a model and lend what runs it: whole, or block by block where a folder is given for weights to be rearranged in."""
    with ExitStack() as stack:
        if stream_in is None:
            runner = Runner(models.load_whole(skeleton, options.device), blocks, options.device)
        else:
            offload = stack.enter_context(TemporaryDirectory(prefix=OFFLOAD, dir=stream_in))
            stream = Stream(models.load_on_disk(skeleton, Path(offload)), options.device)
            stream.prepare(blocks, skeleton.checkpoint, options.dtype)
            runner = StreamingRunner(stream.model, blocks, options.device, stream=stream)
        stack.enter_context(runner.engaged())
        yield runner


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
        self.dtype = TORCH_DTYPES[table.info.dtype]
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

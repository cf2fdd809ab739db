"""Run a source model and its quantized output in step, block by block, with one model in memory or on disk.

Called by `evaluation_pass`. The output's weights take the place of the source's while its turn lasts, so memory holds one model, or
one block of it, and one block decoded. Hidden states of all windows are kept, two for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SourceError
from .runner import Runner, StreamingRunner, floats
from .substitution import Substitution, find_substitution
from .texts import TokenIds

if TYPE_CHECKING:
    from torch import nn

    from .quantized import QuantizedCheckpoint

Both = tuple[torch.Tensor, torch.Tensor]


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
        runner.to_end = True
        if isinstance(runner, StreamingRunner):
            runner.stream.take_over([self.head])

    @property
    def dtype(self) -> str:
        """The dtype of the computation."""
        first = self.runner.model.get_submodule(self.runner.blocks[0])
        return str(next(iter(first.parameters())).dtype).removeprefix("torch.")

    def run_block(self, name: str, windows: Sequence[TokenIds]) -> Iterator[Both]:
        """Run one block for all windows; yield the hidden states behind it, the source's and the output's."""
        runner = self.runner
        before = self.given or [(None, None)] * len(windows)
        with runner.only(runner.blocks.index(name), name):
            source = [runner.step(ids, given) for ids, (given, _) in zip(windows, before, strict=True)]
            with self.substitution.lent(runner.model, name):
                output = [runner.step(ids, given) for ids, (_, given) in zip(windows, before, strict=True)]
        self.given = list(zip(source, output, strict=True))
        for exact, found in self.given:
            yield next(floats(exact)), next(floats(found))

    def run_head(self, windows: Sequence[TokenIds], *, first: int = 0) -> Iterator[Both]:
        """Run what follows the last block; yield the logits `[L, V]` of each window from `first` on, the source's and the output's."""
        with self.runner.only(len(self.runner.blocks), self.head):
            for ids, (exact, found) in zip(windows[first:], self.given[first:], strict=True):
                source = self._logits(ids, exact)
                with self.substitution.lent(self.runner.model, self.head):
                    output = self._logits(ids, found)
                yield source, output

    def _logits(self, ids: TokenIds, given: Any) -> torch.Tensor:
        self.runner.given = given
        logits = getattr(self.runner.forward(ids), "logits", None)
        if not isinstance(logits, torch.Tensor):
            raise SourceError("the model predicts no tokens: it gives no logits")
        self.runner.tick()
        return logits[0]


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

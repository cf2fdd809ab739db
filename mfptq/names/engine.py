"""Name the layers that engines build for a tensor: for `ignore`, `targets`, checks of an output, and input scales.

Called by every stage that asks what an expert is. Engines build routed experts under `<experts>.<number>.<projection>`, however
a checkpoint stores them. What they rename by a table of their own (`model.language_model.` to `language_model.model.`) they
rename in config.json too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from .wrappers import logical

WEIGHT_SUFFIX = ".weight"
EXPERTS = "experts"
GATE_UP = ("gate_proj", "up_proj")
DOWN = ("down_proj",)

# Last part of a stack's name -> the projections of each expert that it holds.
STACKED: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "gate_up_proj": GATE_UP, "input_linear": GATE_UP, "w13_weight": GATE_UP, "w13": GATE_UP, "fc1": GATE_UP,
    "gate_proj": ("gate_proj",), "w1": ("gate_proj",), "up_proj": ("up_proj",), "w3": ("up_proj",), "v1": ("up_proj",),
    "down_proj": DOWN, "output_linear": DOWN, "w2_weight": DOWN, "w2": DOWN, "fc2": DOWN,
})  # fmt: skip
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_SHARED = {"w13": "gate_up_proj", "w2": "down_proj"}


def experts_module(name: str, shape: tuple[int, ...]) -> str:
    """Return the routed-experts module that an engine builds for a stack of experts, or "" if the tensor is none.

    A stack is 3-D, or 2-D without `.weight` below `experts` (DBRX, whose experts lie one below the other).
    """
    parent, _, leaf = name.removesuffix(WEIGHT_SUFFIX).rpartition(".")
    parts = parent.split(".")
    is_flat = len(shape) == 2 and EXPERTS in parts and not name.endswith(WEIGHT_SUFFIX)
    if leaf not in STACKED or not (len(shape) == 3 or is_flat) or any(part.startswith("shared") for part in parts):
        return ""
    if EXPERTS in parts:
        return ".".join(parts[: len(parts) - parts[::-1].index(EXPERTS)])
    return f"{parent}.{EXPERTS}" if parent else EXPERTS


def built_modules(name: str, shape: tuple[int, ...]) -> Iterator[str]:
    """Yield the names of the layers that engines may build for a tensor; none for what is no matrix.

    Of experts that lie in one flat matrix only the first is named: engines ask for no other. Shared experts in a stack are
    one layer, of its name.
    """
    experts, leaf = experts_module(name, shape), name.removesuffix(WEIGHT_SUFFIX).rpartition(".")[2]
    if experts:
        for number in range(shape[0] if len(shape) == 3 else 1):
            yield from (f"{experts}.{number}.{projection}" for projection in STACKED[leaf])
    elif (name.endswith(WEIGHT_SUFFIX) and len(shape) >= 2) or (len(shape) == 3 and leaf in STACKED):
        yield name.removesuffix(WEIGHT_SUFFIX)


def stack_names(module: str) -> tuple[str, ...]:
    """Return the names of the stacks that an expert's projection may be a slice of; none for any other module."""
    experts = experts_parent(logical(module))
    if experts is None:
        return ()
    leaf = module.rpartition(".")[2]
    projection = _PROJECTIONS.get(leaf, leaf)
    leaves = dict.fromkeys((leaf, *(name for name, held in STACKED.items() if projection in held)))
    parents = (experts, experts.removesuffix(f".{EXPERTS}"))
    return tuple(f"{parent}.{name}" for parent in parents for name in leaves)


def built_leaves(module: str) -> tuple[str, ...]:
    """Return further last names under which engines may build a layer of an expert that is called w1, w2 or w3.

    Routed experts are asked for as gate, up and down projections whatever a checkpoint calls them; shared ones are built so by
    classes that have one MLP for all (DeepSeek-V4: `shared_experts.down_proj`).
    """
    parent, _, leaf = module.rpartition(".")
    names = _PROJECTIONS if experts_parent(module) is not None else _SHARED if "expert" in parent else {}
    return (names[leaf],) if leaf in names else ()


def experts_parent(module: str) -> str | None:
    """Return the routed-experts module that owns this projection (`...mlp.experts` for `...mlp.experts.3.up_proj`).

    An engine gives all projections of a layer's routed experts one scheme, so they are quantized or kept together.
    """
    parent, _, _ = module.rpartition(".")
    experts, _, number = parent.rpartition(".")
    return experts if number.isdigit() and experts.rpartition(".")[2] == EXPERTS else None

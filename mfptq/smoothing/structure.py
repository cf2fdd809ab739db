"""Find what makes the input of each linear layer, and all that reads it, where the structure is certain of both.

Called by `planning.smoothed_inputs` and `comparison.pairing`. Certain means: the model's type is known, a block of its decoder holds no tensor of an unknown
name, and shapes agree with config.json. Everything else is left alone, and the reason told.

Four things make inputs: a norm feeds attention or DeltaNet, another one the MLP with its experts and routers; the rows of
v_proj are o_proj's input, averaged by attention; those of up_proj are down_proj's, times the activation of gate_proj; and norms
inside attention feed DeltaNet's out_proj, whose heads share the norm, and the second step of latent attention.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..checkpoint.weights import StoredTensor
from ..names.norms import BEFORE_ATTENTION, Norms, known_norms
from ..names.structure import block_of

Channels = npt.NDArray[np.int64]

_PART = r"(?:experts\.\d+|shared_experts?)\."  # of an MLP
_KNOWN = re.compile(
    r"(input|post_attention|pre_feedforward|post_feedforward)_layernorm\.weight|"
    r"self_attn\.(([qkvo]|q_a|q_b|kv_b)_proj|kv_a_proj_with_mqa)\.(weight|bias)|"
    r"self_attn\.((q|k)_norm\.weight|(q|kv)_a_layernorm\.weight|rotary_emb\.inv_freq)|"
    r"linear_attn\.((in_proj_(qkv|z|a|b|qkvz|ba)|conv1d|norm|out_proj)\.weight|A_log|dt_bias)|"
    rf"mlp\.({_PART})?(gate|up|down)_proj\.(weight|bias)|mlp\.gate\.e_score_correction_bias|"
    r"mlp\.(experts\.(gate_up_proj|down_proj)|(gate|shared_expert_gate)\.weight)|"
    r"block_sparse_moe\.(gate|experts\.\d+\.w[123])\.weight"
)
_READS_ATTENTION_NORM = re.compile(
    r"self_attn\.([qkv]_proj|q_a_proj|kv_a_proj_with_mqa)\.weight|linear_attn\.in_proj_\w+\.weight"
)
_READS_MLP_NORM = re.compile(
    rf"mlp\.({_PART})?(gate|up)_proj\.weight|mlp\.experts\.gate_up_proj|"
    r"(mlp|block_sparse_moe)\.gate\.weight|mlp\.shared_expert_gate\.weight|block_sparse_moe\.experts\.\d+\.w[13]\.weight"
)
_DOWN = re.compile(rf"(mlp\.(?:{_PART})?)down_proj\.weight|(block_sparse_moe\.experts\.\d+\.)w2\.weight")
_LATENT = {  # norms of latent attention
    "self_attn.q_a_layernorm.weight": "self_attn.q_b_proj.weight",
    "self_attn.kv_a_layernorm.weight": "self_attn.kv_b_proj.weight",
}


class Maker(NamedTuple):
    """A tensor whose outputs are an input's channels: elements of a vector, or rows of a matrix, from `first` on."""

    tensor: str
    first: int = 0


class Reader(NamedTuple):
    """A tensor that reads an input by its columns; of a stack, slice `expert` of `experts`. All slices where that is -1."""

    tensor: str
    expert: int = -1
    experts: int = 1


@dataclass(frozen=True, slots=True)
class Link:
    """An input: what makes its channels, and all that reads them.

    `channels` `[K]` says which channel each column of a reader takes; there are `count` of them. `offset` is what a norm adds
    to its weight before it multiplies.
    """

    name: str
    makers: tuple[Maker, ...]
    readers: tuple[Reader, ...]
    channels: Channels
    count: int
    offset: float = 0.0


class Block(NamedTuple):
    """The tensors of one decoder block by their names inside it."""

    prefix: str
    tensors: Mapping[str, StoredTensor]

    def width(self, name: str) -> int:
        """Return the last dimension of a tensor, 0 if there is none."""
        return self.tensors[name].info.shape[-1] if name in self.tensors else 0

    def maker(self, name: str, first: int = 0) -> Maker:
        """Return a tensor of the block as what makes an input."""
        return Maker(self.prefix + name, first)


class Facts(NamedTuple):
    """What config.json tells of attention: 0 where it does not."""

    norms: Norms
    heads: int
    kv_heads: int


@dataclass(frozen=True, slots=True)
class Structure:
    """The inputs that are certain, and why blocks are not, by the beginning of their tensors' names, in the order of names."""

    links: tuple[Link, ...]
    unknown: Mapping[str, str]


def find_links(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], outside: Callable[[str], str]
) -> Structure:
    """Return the inputs of all decoder blocks; `outside` says why a module lies in none, "" where it does."""
    norms = known_norms(config)
    if norms is None:
        return Structure((), {"": "the model's type is none whose blocks are known"})
    text = config.get("text_config", config)
    facts = Facts(norms, *(_count(text, key) for key in ("num_attention_heads", "num_key_value_heads")))
    blocks: defaultdict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        place = block_of(name)
        if place is not None and not outside(name.removesuffix(".weight")):
            blocks[f"{place.stack}.{place.number}."][place.rest] = tensor
    links: list[Link] = []
    unknown: dict[str, str] = {}
    for prefix, inner in blocks.items():
        strange = sorted(name for name in inner if not _KNOWN.fullmatch(name))
        if strange:
            unknown[prefix] = f"its block holds tensors that are not known, such as {strange[0]}"
        else:
            links += _links(Block(prefix, inner), facts)
    return Structure(tuple(links), unknown)


@cache
def _each(count: int) -> Channels:
    """Return the channels of columns that take one each; one array for all experts."""
    return np.arange(count)


def _count(config: Any, key: str) -> int:
    value = config.get(key) if isinstance(config, dict) else None
    return value if type(value) is int and value > 0 else 0


def _links(block: Block, facts: Facts) -> Iterator[Link]:
    yield from _norm(block, BEFORE_ATTENTION, _READS_ATTENTION_NORM, facts)
    yield from _norm(block, facts.norms.before_mlp, _READS_MLP_NORM, facts)
    yield from _values(block, facts)
    yield from _small_norms(block)
    for name in block.tensors:
        if found := _DOWN.fullmatch(name):
            yield from _up(block, found[1] or found[2], name)
    yield from _stacked_up(block)


def _norm(block: Block, norm: str, reads: re.Pattern[str], facts: Facts) -> Iterator[Link]:
    name = f"{norm}.weight"
    readers = [each for each in block.tensors if reads.fullmatch(each)]
    width = block.width(name)
    if readers and name in block.tensors and all(block.width(each) == width for each in readers):
        yield Link(
            block.prefix + norm,
            (block.maker(name),),
            tuple(Reader(block.prefix + each) for each in readers),
            _each(width),
            width,
            facts.norms.offset,
        )


def _values(block: Block, facts: Facts) -> Iterator[Link]:
    """Yield attention's output: the heads that share a KV head read the same rows of v_proj."""
    value, output = "self_attn.v_proj.weight", "self_attn.o_proj.weight"
    if value not in block.tensors or output not in block.tensors or not facts.heads or not facts.kv_heads:
        return
    rows, columns = block.tensors[value].info.shape[0], block.width(output)
    size = rows // facts.kv_heads
    if rows == size * facts.kv_heads and columns == size * facts.heads and facts.heads % facts.kv_heads == 0:
        shared = np.broadcast_to(
            np.arange(rows).reshape(facts.kv_heads, 1, size), (facts.kv_heads, facts.heads // facts.kv_heads, size)
        )
        name = block.prefix + "self_attn.v_proj"
        yield Link(name, _with_bias(block, value), (Reader(block.prefix + output),), shared.reshape(-1), rows)


def _small_norms(block: Block) -> Iterator[Link]:
    """Yield the inputs that norms inside attention feed: DeltaNet's, the same for all heads, and those of latent attention."""
    for norm, output in {"linear_attn.norm.weight": "linear_attn.out_proj.weight", **_LATENT}.items():
        size, columns = block.width(norm), block.width(output)
        if size and columns and (columns % size == 0 if norm not in _LATENT else columns == size):
            channels = np.tile(_each(size), columns // size)
            name = block.prefix + norm.removesuffix(".weight")
            yield Link(name, (block.maker(norm),), (Reader(block.prefix + output),), channels, size)


def _up(block: Block, parent: str, down: str) -> Iterator[Link]:
    up = parent + ("up_proj" if down.endswith("down_proj.weight") else "w3")
    weight, columns = block.tensors.get(f"{up}.weight"), block.width(down)
    if weight is not None and weight.info.shape[0] == columns:
        readers = (Reader(block.prefix + down),)
        yield Link(block.prefix + up, _with_bias(block, f"{up}.weight"), readers, _each(columns), columns)


def _stacked_up(block: Block) -> Iterator[Link]:
    """Yield the input of each expert's down_proj where experts lie in stacks: the second half of each slice's rows makes it."""
    stacks = [block.tensors.get(f"mlp.experts.{leaf}") for leaf in ("gate_up_proj", "down_proj")]
    shapes = [each.info.shape for each in stacks if each is not None]
    if len(shapes) < 2 or any(len(shape) != 3 for shape in shapes):
        return
    (experts, rows, _), (others, _, columns) = shapes
    if others != experts or rows != 2 * columns:
        return
    for number in range(experts):
        maker = block.maker("mlp.experts.gate_up_proj", number * rows + columns)
        reader = Reader(f"{block.prefix}mlp.experts.down_proj", number, experts)
        name = f"{block.prefix}mlp.experts.{number}.up_proj"
        yield Link(name, (maker,), (reader,), _each(columns), columns)


def _with_bias(block: Block, weight: str) -> tuple[Maker, ...]:
    bias = weight.removesuffix("weight") + "bias"
    return (block.maker(weight), *([block.maker(bias)] if bias in block.tensors else []))

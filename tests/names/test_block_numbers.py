"""A checkpoint whose blocks are not those of its config is told so; one whose blocks are, is not."""

import pytest

from mfptq.names import block_numbers
from mfptq.names.structure import Structure
from tests.names.test_structure import CONFIG, HIDDEN, stack, structure

DRAFT = {"model.layers.3.eh_proj.weight": (HIDDEN, 2 * HIDDEN)}


def block_warnings(found: Structure) -> tuple[str, ...]:
    """Return the warnings of a model of which everything is quantized."""
    return block_numbers.block_warnings(found, [f"{stack}.0.attn.q_proj" for stack in found.decoders()])


def without(number: int, blocks: int) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in stack("model.layers", blocks).items() if f".{number}." not in name}


def test_a_block_that_is_missing() -> None:
    (found,) = block_warnings(structure(without(1, 3), CONFIG))
    assert found.startswith("'model.layers' has blocks 0 to 2, but no tensor of block 1: ")
    many = {name: shape for name, shape in stack("h", 9).items() if name.startswith(("h.0", "h.8"))}
    assert "no tensor of blocks 1, 2, 3, ...:" in block_warnings(structure(many, {}))[0]


def test_fewer_blocks_than_the_config_tells() -> None:
    (found,) = block_warnings(structure(stack("model.layers", 2), CONFIG))
    assert found == "config.json tells 3 blocks, 'model.layers' has 2: engines do not load such a model"


def test_blocks_behind_the_last_that_nothing_calls_drafts() -> None:
    (found,) = block_warnings(structure(stack("model.layers", 4), CONFIG))
    assert found == "config.json tells 3 blocks, 'model.layers' has 4: block 3 is kept as a draft layer"
    (found,) = block_warnings(structure(stack("model.layers", 5), {**CONFIG, "num_nextn_predict_layers": 1}))
    assert found.endswith("blocks 3, 4 are kept as draft layers")


@pytest.mark.parametrize(
    ("shapes", "config"),
    [
        (stack("model.layers", 3), CONFIG),
        (stack("model.layers", 3), {}),
        (stack("model.layers", 4) | DRAFT, CONFIG),
        (stack("model.layers", 4), {**CONFIG, "num_nextn_predict_layers": 1}),
        (stack("model.layers", 3) | stack("mtp.layers", 1), CONFIG),
        (stack("encoder.block", 4) | stack("decoder.block", 2), {"num_layers": 4, "num_decoder_layers": 2}),
        (stack("model.layers", 3) | stack("model.visual.blocks", 7), CONFIG),
        ({"a.weight": (HIDDEN, HIDDEN)}, CONFIG),
    ],
    ids=["told", "not told", "marked draft", "counted draft", "own draft", "encoder and decoder", "tower", "no blocks"],
)
def test_blocks_of_the_config_need_no_warning(shapes: dict[str, tuple[int, ...]], config: dict) -> None:
    assert block_warnings(structure(shapes, config)) == ()


def test_a_stack_of_which_nothing_is_quantized_is_none_that_the_config_speaks_of() -> None:
    assert block_numbers.block_warnings(structure(without(1, 3), CONFIG), ["other.layers.0.attn.q_proj"]) == ()

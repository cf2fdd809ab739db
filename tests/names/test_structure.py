"""Where modules lie: decoders, draft layers and towers are found from names, shapes and config.json."""

import pytest

from mfptq.names.config_sizes import read_sizes
from mfptq.names.structure import DRAFTER, OUTSIDE, Structure, block_of

HIDDEN = 64


def stack(prefix: str, blocks: int, hidden: int = HIDDEN) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{n}.attn.q_proj.weight": (hidden, hidden) for n in range(blocks)}


def structure(shapes: dict[str, tuple[int, ...]], config: dict | None = None) -> Structure:
    return Structure(shapes.items(), config or {})


CONFIG = {"num_hidden_layers": 3, "hidden_size": HIDDEN}


def test_blocks_of_the_length_in_the_config_are_the_decoder() -> None:
    found = structure(stack("model.layers", 3) | stack("model.unheard_of", 5) | {"fc.weight": (HIDDEN, HIDDEN)}, CONFIG)
    assert not found.outside("model.layers.2.attn.q_proj")
    assert found.outside("model.unheard_of.0.attn.q_proj")
    assert found.outside("fc") == OUTSIDE


def test_a_stack_of_another_width_is_not_the_decoder() -> None:
    found = structure(stack("model.layers", 3) | stack("part.blocks", 3, hidden=48), CONFIG)
    assert found.outside("part.blocks.0.attn.q_proj")


@pytest.mark.parametrize(
    "prefix", ["model.visual.blocks", "vision_tower.encoder.layers", "model.audio_tower.layers", "vit.blocks",
               "model.qformer.layer", "talker.model.layers", "model.sam_model.blocks", "model.spatial_projectors",
               "model.diffusion_head.layers", "vqmodel.decoder.up"],
)  # fmt: skip
@pytest.mark.parametrize("config", [CONFIG, {}], ids=["told", "not told"])
def test_towers_as_deep_as_the_decoder_are_kept(prefix: str, config: dict) -> None:
    found = structure(stack("model.language_model.layers", 3) | stack(prefix, 3), config)
    assert found.outside(f"{prefix}.0.attn.q_proj") == "other modality"
    assert not found.outside("model.language_model.layers.0.attn.q_proj")


def test_an_encoder_beside_a_nested_text_model_is_another_modality() -> None:
    shapes = stack("encoder.layers", 3) | stack("language_model.model.layers", 3)
    assert structure(shapes, {"text_config": CONFIG}).outside("encoder.layers.0.attn.q_proj")
    both = structure(stack("encoder.block", 3) | stack("decoder.block", 3), {"num_layers": 3, "d_model": HIDDEN})
    assert not both.outside("encoder.block.0.attn.q_proj")
    assert not both.outside("decoder.block.0.attn.q_proj")


def test_an_encoder_of_images_beside_a_decoder_with_encoder_in_its_name_is_kept() -> None:
    config = {"encoder": {**CONFIG, "image_size": 32}, "decoder": CONFIG}
    found = structure(stack("encoder.encoder.layer", 3) | stack("decoder.bert.encoder.layer", 3), config)
    assert found.outside("encoder.encoder.layer.0.attn.q_proj")
    assert not found.outside("decoder.bert.encoder.layer.0.attn.q_proj")


def test_a_stack_that_lies_apart_from_the_embedding_table_is_not_the_decoder() -> None:
    config = {**CONFIG, "vocab_size": 160}
    shapes = stack("model.layers", 3) | stack("flow.layers", 3) | {"model.embed_tokens.weight": (160, HIDDEN)}
    assert structure(shapes, config).outside("flow.layers.0.attn.q_proj")
    assert not structure(shapes, config).outside("model.layers.0.attn.q_proj")
    inner = stack("bert.encoder.layer", 3) | {"bert.embeddings.word_embeddings.weight": (160, HIDDEN)}
    assert not structure(inner, config).outside("bert.encoder.layer.0.attn.q_proj")
    beside = stack("h", 3) | stack("blocks", 3) | {"wte.weight": (160, HIDDEN)}
    assert not structure(beside, config).outside("blocks.0.attn.q_proj")  # the table tells nothing apart here


def test_a_language_model_that_encodes_images_inside_of_another_is_not_the_decoder() -> None:
    shapes = stack("model.layers", 3) | stack("model.qwen2_model.model.layers", 3) | stack("model.mtp_layers", 1)
    found = structure(shapes | {"model.embed_tokens.weight": (160, HIDDEN)}, {**CONFIG, "vocab_size": 160})
    assert found.outside("model.qwen2_model.model.layers.0.attn.q_proj")
    assert not found.outside("model.layers.0.attn.q_proj")
    both = structure(
        stack("model.encoder.layers", 3) | stack("model.decoder.layers", 3) | {"model.shared.weight": (160, HIDDEN)},
        {**CONFIG, "vocab_size": 160},
    )
    assert not both.outside("model.encoder.layers.0.attn.q_proj")


def test_vision_blocks_beside_a_text_model_at_the_root_are_told_by_their_layers() -> None:
    vision = {f"blocks.{n}.mlp.linear_fc1.weight": (128, HIDDEN) for n in range(3)}
    shapes = stack("layers", 3) | stack("blocks", 3) | vision | {"embed_tokens.weight": (160, HIDDEN)}
    found = structure(shapes, {**CONFIG, "vocab_size": 160})
    assert found.outside("blocks.0.attn.q_proj") == "other modality"
    assert not found.outside("layers.0.attn.q_proj")


def test_towers_as_engines_name_them_that_leave_out_their_own_name() -> None:
    towers = [
        "vision_model.encoder.layers", "visual.blocks", "model.vision_tower.vision_model.encoder.layers", "vision.a.b",
    ]  # fmt: skip
    shapes = stack("model.layers", 3)
    for tower in towers:
        shapes |= stack(tower, 3)
    assert structure(shapes, CONFIG).tower_tails() == ("a.b", "encoder.layers")


def test_stacks_of_recurrent_models_have_lengths_of_their_own() -> None:
    config = {"num_hidden_layers": 2, "num_layers_per_stack": 5, "hidden_size": HIDDEN}
    found = structure(stack("model.H_module.layers", 5) | stack("model.L_module.layers", 5), config)
    assert not found.outside("model.H_module.layers.4.attn.q_proj")
    assert not found.outside("model.L_module.layers.4.attn.q_proj")


def test_encoder_and_decoder_may_differ_in_length() -> None:
    config = {"encoder_layers": 2, "decoder_layers": 4, "d_model": HIDDEN}
    found = structure(stack("model.encoder.layers", 2) | stack("model.decoder.layers", 4), config)
    assert not found.outside("model.decoder.layers.3.attn.q_proj")
    assert not found.outside("model.encoder.layers.1.attn.q_proj")


def test_layers_behind_the_last_are_drafts() -> None:
    shapes = stack("model.layers", 4) | {"model.layers.3.eh_proj.weight": (HIDDEN, 2 * HIDDEN)}
    for config in (CONFIG, {}):
        found = structure(shapes, config)
        assert found.outside("model.layers.3.attn.q_proj") == DRAFTER
        assert not found.outside("model.layers.2.attn.q_proj")
        assert found.draft_numbers() == (3,)


def test_layers_that_only_the_config_calls_drafts() -> None:
    found = structure(stack("model.layers", 5), {**CONFIG, "num_nextn_predict_layers": 2})
    assert found.draft_numbers() == (3, 4)


@pytest.mark.parametrize("name", ["model.mtp_block", "model.mtp_layers", "model.mtp"])
def test_drafts_under_names_of_their_own_get_the_numbers_of_engines(name: str) -> None:
    found = structure(
        stack("model.layers", 3) | stack(name, 1) | {"model.mtp_linear_proj.0.weight": (HIDDEN, 128)}, CONFIG
    )
    assert found.outside(f"{name}.0.attn.q_proj") == DRAFTER
    assert found.outside("model.mtp_linear_proj.0") == DRAFTER
    assert found.draft_numbers() == (3,)


def test_drafts_below_a_leading_mtp_keep_their_names() -> None:
    found = structure(stack("model.layers", 3) | stack("mtp.layers", 1), CONFIG)
    assert found.outside("mtp.layers.0.attn.q_proj") == DRAFTER
    assert found.draft_numbers() == ()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_names_of_training_tools_change_nothing(prefix: str) -> None:
    shapes = {prefix + name: shape for name, shape in stack("model.layers", 3).items()}
    assert not structure(shapes, CONFIG).outside(f"{prefix}model.layers.0.attn.q_proj")


def test_without_any_number_there_is_no_structure() -> None:
    found = structure({"a.weight": (HIDDEN, HIDDEN)}, CONFIG)
    assert not found.has_blocks
    assert not found.outside("a")


def test_a_config_that_fits_nothing_tells_nothing() -> None:
    assert not structure(stack("encoder.groups", 1), {"num_hidden_layers": 12}).outside("encoder.groups.0.attn.q_proj")


def test_blocks() -> None:
    assert block_of("model.layers.12.mlp.experts.3.up_proj") == ("model.layers", 12, "mlp.experts.3.up_proj")
    assert block_of("lm_head") is None
    assert block_of("h.0") is None


def test_sizes_of_nested_configs() -> None:
    sizes = read_sizes({
        "thinker_config": {"text_config": {"num_hidden_layers": 7, "hidden_size": 32, "num_attention_heads": 4}},
        "talker_config": {"text_config": {"num_hidden_layers": 2, "hidden_size": 16}}, "tie_word_embeddings": True,
    })  # fmt: skip
    assert (sizes.depths, sizes.hidden, sizes.is_nested, sizes.is_tied) == ({7}, {32}, True, True)
    types = read_sizes({"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}).model_types
    assert types == {"vision-encoder-decoder", "gpt2"}
    assert read_sizes({"num_hidden_layers": True, "hidden_size": "x"}).depths == frozenset()

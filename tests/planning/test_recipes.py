"""Recipes: strict to read, exact to write, the same decisions as the options they stand for."""

import itertools
import json
from pathlib import Path

import pytest

import mfptq
from mfptq.errors import RuleError, UsageError
from mfptq.planning.recipes import load_recipe, parse_recipe, recipe_text, shipped, with_recipe
from mfptq.planning.settings import Decisions
from tests.conftest import command, sampled
from tests.models import DENSE, MOE, write_checkpoint
from tests.planning.test_formats import chosen

SHIPPED = ["attention-fp8", "deltanet-bf16", "deltanet-fp8", "experts-only", "full", "nvidia-qwen3.5"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_checkpoint(folder / kind, kind) for kind in (DENSE, MOE)}


def formats(folder: Path, **decisions: object) -> dict[str, set[str]]:
    """Return the formats of each part of the decoder: which projections have which."""
    found: dict[str, set[str]] = {}
    for name, target in chosen(folder, **decisions).items():
        parts = name.split(".")
        if parts[-1].endswith(("_proj", "in_proj_qkv", "in_proj_z", "lm_head")) and parts[0] in ("model", "lm_head") and "visual" not in parts:  # fmt: skip
            found.setdefault(parts[4] if len(parts) > 4 else parts[0], set()).add(target)
    return found


def scales(folder: Path, model: Path) -> Path:
    modules = [row.name.removesuffix(".weight") for row in mfptq.plan(model, targets=["lm_head"]).tensors if row.format]
    (folder / "scales.json").write_text(json.dumps({f"{name}.input_global_scale": 99.0 for name in modules}))
    return folder / "scales.json"


def test_the_shipped_ones_say_when_to_use_them() -> None:
    assert shipped() == SHIPPED
    for name in shipped():
        assert len(load_recipe(name).description) > 40
        assert load_recipe(name).decisions.keys() <= Decisions.__annotations__.keys()


@pytest.mark.parametrize(("name", "kind", "expected"), [
    ("full", DENSE, {"mlp": {"nvfp4a16"}, "self_attn": {"nvfp4a16"}, "linear_attn": {"nvfp4a16"}, "lm_head": {"keep"}}),
    ("deltanet-bf16", DENSE, {"mlp": {"nvfp4a16"}, "self_attn": {"nvfp4a16"}, "linear_attn": {"keep"}, "lm_head": {"keep"}}),
    ("deltanet-fp8", DENSE, {"mlp": {"nvfp4a16"}, "self_attn": {"nvfp4a16"}, "linear_attn": {"fp8-dynamic"}, "lm_head": {"keep"}}),
    ("attention-fp8", MOE, {"mlp": {"nvfp4a16"}, "self_attn": {"fp8-dynamic"}, "linear_attn": {"fp8-dynamic"}, "lm_head": {"keep"}}),
    ("experts-only", MOE, {"mlp": {"nvfp4a16", "keep"}, "self_attn": {"keep"}, "linear_attn": {"keep"}, "lm_head": {"keep"}}),
    ("nvidia-qwen3.5", DENSE, {"mlp": {"nvfp4a16"}, "self_attn": {"fp8-static"}, "linear_attn": {"fp8-static"}, "lm_head": {"nvfp4a16"}}),
    ("nvidia-qwen3.5", MOE, {"mlp": {"nvfp4a16"}, "self_attn": {"fp8-static"}, "linear_attn": {"fp8-static"}, "lm_head": {"nvfp4a16"}}),
])  # fmt: skip
def test_what_the_shipped_ones_do(
    name: str, kind: str, expected: dict, models: dict[str, Path], tmp_path: Path
) -> None:
    given = {"input_scales": scales(tmp_path, models[kind])} if "nvidia" in name else {}
    found = formats(models[kind], recipe=name, **given)
    assert {part: found[part] - ({"keep"} if part == "linear_attn" and len(found[part]) > 1 else set()) for part in expected} == expected  # fmt: skip


OFTEN = [
    ("experts-only", DENSE),
    ("experts-only", MOE),
    ("attention-fp8", MOE),
    ("deltanet-fp8", DENSE),
    ("nvidia-qwen3.5", MOE),
]
REST = sorted({*itertools.product(SHIPPED, (DENSE, MOE))} - {*OFTEN})


@pytest.mark.parametrize(("name", "kind"), sampled(OFTEN, REST))
def test_the_shipped_ones_convert(name: str, kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    if (name, kind) == ("experts-only", DENSE):
        with pytest.raises(RuleError, match="nothing is left to quantize"):
            mfptq.plan(models[kind], recipe=name)
        return
    given = {"input_scales": scales(tmp_path, models[kind])} if "nvidia" in name else {}
    mfptq.convert(models[kind], tmp_path / "out", recipe=name, **given)
    assert mfptq.verify(tmp_path / "out", models[kind]).ok
    assert (tmp_path / "out" / "mfptq_recipe.toml").read_text() == load_recipe(name).text
    assert f"recipe `{name}`" in (tmp_path / "out" / "README.md").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert bool(config["kv_cache_scheme"]) == ("nvidia" in name)


def test_no_recipe_no_file(models: dict[str, Path], tmp_path: Path) -> None:
    mfptq.convert(models[DENSE], tmp_path / "out")
    assert not (tmp_path / "out" / "mfptq_recipe.toml").exists()


@pytest.mark.parametrize(("text", "message"), [
    ("formats = [", "is not TOML"),
    ("format = []", "key 'format' is unknown, .*did you mean formats"),
    ("ignore = 're:x'", "ignore is 're:x', expected a list of strings"),
    ("ignore = [1]", "expected a list of strings"),
    ("default_ignore = 1", "expected true or false"),
    ("kv_cache = 'int8'", "kv_cache is 'int8', expected fp8"),
    ("formats = ['fp9=x']", "format 'fp9' is unknown"),
    ("formats = ['fp8-dynamic']", "write FORMAT=PATTERN"),
])  # fmt: skip
def test_what_is_not_understood_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recipe(text, "mine")


def test_a_pattern_that_does_not_compile_is_refused() -> None:
    with pytest.raises(RuleError, match="unterminated"):
        parse_recipe("ignore = ['re:(a']", "mine")


def test_a_name_that_is_nearly_one() -> None:
    with pytest.raises(UsageError, match=r"there is no recipe 'atention-fp8'.*did you mean attention-fp8\?"):
        load_recipe("atention-fp8")


def test_what_the_caller_decides_comes_first() -> None:
    recipe = parse_recipe("method = 'minmax'\nformats = ['bf16=a']\nkv_cache = 'fp8'\ndefault_ignore = false", "mine")
    found = with_recipe(
        {"formats": ["fp8-dynamic=b"], "kv_cache": None, "method": "search", "default_ignore": True}, recipe
    )
    assert found == {
        "formats": ["fp8-dynamic=b", "bf16=a"],
        "kv_cache": "fp8",
        "method": "search",
        "default_ignore": False,
    }


def test_written_and_read_again() -> None:
    decisions = {
        "scheme": "NVFP4A16", "method": "minmax", "kv_cache": "fp8", "default_ignore": False,
        "ignore": [r"re:.*a\.b$", "it's", "tab\there", 'quo"te\\'], "targets": ["lm_head"], "formats": ["fp8-dynamic=re:.*x"],
    }  # fmt: skip
    found = parse_recipe(recipe_text(decisions, "what for"), "mine")
    assert found.decisions == decisions
    assert found.description == "what for"
    assert parse_recipe(recipe_text({"ignore": [], "method": None, "default_ignore": True}), "mine").decisions == {}


def test_from_the_command_line(models: dict[str, Path], tmp_path: Path) -> None:
    saved = tmp_path / "mine.toml"
    options = ("--recipe", "deltanet-fp8", "--fp8", r"re:.*self_attn\..*", "--kv-cache", "fp8")
    done = command("convert", models[DENSE], tmp_path / "one", "-q", *options, "--save-recipe", saved)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_recipe(saved).decisions == {
        "kv_cache": "fp8", "formats": [r"fp8-dynamic=re:.*self_attn\..*", r"fp8-dynamic=re:.*linear_attn\..*"],
    }  # fmt: skip
    assert command("convert", models[DENSE], tmp_path / "two", "-q", "--recipe", saved).returncode == 0
    for path in (tmp_path / "one").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()
    listed = command("recipe", "list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == SHIPPED
    assert command("recipe", "show", "attention-fp8").stdout == load_recipe("attention-fp8").text
    assert "bits per weight" in command("recipe", "check", saved, models[DENSE]).stdout
    assert command("recipe", "check", "nowhere").returncode == 2

"""Input scales: every kind and container, names bridged, experts filled, and whatever is wrong refused in one line."""

import json
import math
import os
import pickle
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from compressed_tensors.quantization.utils import generate_gparam
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mfptq.errors import ScaleError, UsageError
from mfptq.limits import MAX_SCALES_BYTES
from mfptq.names.bridge import PREFIXES, bridge_names, split_name
from mfptq.names.fusion import FusedGroup, fused_groups
from mfptq.scales import reading
from mfptq.scales.assignment import assign_input_scales
from mfptq.scales.input_scales import InputScales
from mfptq.scales.reading import read_input_scales
from mfptq.scales.values import ScaleConvention

LAYER = "model.language_model.layers.3"
ATTENTION = [f"{LAYER}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")]
LEAVES = ("gate_proj", "up_proj", "down_proj")
NVFP4_CONFIG = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}


def expert(number, leaf, layer=LAYER):
    return f"{layer}.mlp.experts.{number}.{leaf}"


def experts(count, layer=LAYER):
    return [expert(number, leaf, layer) for number in range(count) for leaf in LEAVES]


def f32(value):
    return float(np.float32(value))


def tensor(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype)


def write_json(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def write_safetensors(path, tensors):
    save_file(tensors, path)
    return path


def write_folder(path, tensors, config=None, hf_quant_config=None):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    write_json(path / "config.json", config or {})
    if hf_quant_config is not None:
        write_json(path / "hf_quant_config.json", hf_quant_config)
    return path


def scales_of(divisors):
    return InputScales(divisors, "scales.json")


def assign(divisors, modules, kept=()):
    return assign_input_scales(scales_of(divisors), fused_groups(modules), kept=kept)


def refused(path, kind=None):
    """Return the message of the ScaleError that reading must end in."""
    with pytest.raises(ScaleError) as caught:
        read_input_scales(path, kind)
    return one_line(caught.value, path)


def refused_assignment(divisors, modules, kept=()):
    with pytest.raises(ScaleError) as caught:
        assign(divisors, modules, kept)
    return one_line(caught.value, "scales.json")


def one_line(error, path):
    text = str(error)
    assert error.exit_code == 4
    assert "\n" not in text
    assert text.isprintable()
    assert text.startswith(f"input scales {str(path)!r}: ")
    return text


# Reading: containers and kinds


@pytest.mark.parametrize(("kind", "value"), [("amax", 3.2), ("input_scale", 3.2 / 2688), ("input_global_scale", 840.0)])
def test_typed_json_is_converted_by_its_kind(tmp_path, kind, value):
    path = write_json(tmp_path / "s.json", {"kind": kind, "values": {"a.q_proj": value}})
    assert read_input_scales(path).global_scales["a.q_proj"] == pytest.approx(840.0, rel=1e-6)


@given(st.floats(2.0**-110, 2.0**110, width=32))
@example(448.0)  # where 2688 / amax, rounded once, is another number
@example(1.0)
def test_an_amax_becomes_what_compressed_tensors_computes(amax):
    expected = generate_gparam(torch.tensor([-amax / 2]), torch.tensor([amax])).item()
    assert ScaleConvention("amax").global_scale("m", None, amax) == expected


@given(st.floats(2.0**-110, 2.0**110, width=32))
def test_an_input_scale_becomes_its_correctly_rounded_reciprocal(value):
    assert ScaleConvention("input_scale").global_scale("m", None, value) == float(np.float32(1) / np.float32(value))


def test_bare_json_takes_its_kind_from_the_caller(tmp_path):
    path = write_json(tmp_path / "S.JSON", {"a": 2, "b": [4.0]})
    assert read_input_scales(path, "amax").global_scales == {"a": 1344.0, "b": 672.0}
    assert "give it, one of input_global_scale, input_scale, amax" in refused(path)


@pytest.mark.parametrize(
    ("suffix", "divisor"),
    [
        (".input_global_scale", 4.0), ("_input_global_scale", 4.0), (".input_amax", 672.0), ("_input_amax", 672.0),
        (".amax", 672.0), (".input_quantizer._amax", 672.0), ("_input_quantizer._amax", 672.0),
    ],
)  # fmt: skip
def test_suffixes_tell_the_kind_in_every_container(tmp_path, suffix, divisor):
    as_json = write_json(tmp_path / "s.json", {f"m.q{suffix}": 4.0})
    as_tensors = write_safetensors(tmp_path / "s.safetensors", {f"m.q{suffix}": tensor([4.0])})
    assert read_input_scales(as_json).global_scales == {"m.q": divisor}
    assert read_input_scales(as_tensors).global_scales == {"m.q": divisor}


def test_a_suffix_alone_is_a_name():
    assert split_name(".amax") == (".amax", None)


def test_other_quantizers_of_a_state_dict_are_no_input_scales(tmp_path):
    tensors = {
        "m.input_quantizer._amax": tensor(4.0),
        "m.weight_quantizer._amax": tensor(9.0),
        "m.k_scale": tensor(1.0),
    }
    assert read_input_scales(write_safetensors(tmp_path / "s.safetensors", tensors)).global_scales == {"m": 672.0}


def test_plain_names_in_safetensors_need_a_kind(tmp_path):
    path = write_safetensors(tmp_path / "s.safetensors", {"m.q": tensor(4.0)})
    assert read_input_scales(path, "amax").global_scales == {"m.q": 672.0}
    assert "give it, one of input_global_scale, input_scale, amax" in refused(path)


def test_input_scale_in_a_single_file_needs_a_kind(tmp_path):
    path = write_safetensors(tmp_path / "s.safetensors", {"m.q.input_scale": tensor(0.25)})
    assert read_input_scales(path, "input_scale").global_scales == {"m.q": 4.0}
    assert "amax/2688 in NVFP4 and amax/448 in FP8" in refused(path)


def test_links_to_files_elsewhere_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "links").mkdir()
    for suffix in ("json", "safetensors"):
        blob = tmp_path / "blobs" / f"0123{suffix}"
        if suffix == "json":
            write_json(blob, {"m.input_global_scale": 4.0})
        else:
            write_safetensors(blob, {"m.input_global_scale": tensor(4.0)})
        link = tmp_path / "links" / f"s.{suffix}"
        link.symlink_to(blob)
        assert read_input_scales(link).global_scales == {"m": 4.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scalars_of_every_dtype_are_read_exactly(tmp_path, dtype, shape):
    value = torch.full(shape, 3.1415926, dtype=dtype)
    path = write_safetensors(tmp_path / "s.safetensors", {"m.input_global_scale": value})
    assert read_input_scales(path).global_scales == {"m": value.float().item()}


def test_only_scalars_of_a_sibling_checkpoint_are_read(tmp_path, monkeypatch):
    from mfptq.checkpoint.source import FolderSource

    tensors = {f"{m}.input_global_scale": tensor([float(100 + i)]) for i, m in enumerate(ATTENTION)}
    tensors |= {f"{m}.weight_packed": torch.zeros(64, 64, dtype=torch.uint8) for m in ATTENTION}
    folder = write_folder(tmp_path / "sibling", tensors)
    sizes, read_into = [], FolderSource.read_into
    monkeypatch.setattr(
        FolderSource, "read_into", lambda self, n, o, b: sizes.append(len(b)) or read_into(self, n, o, b)
    )
    scales = read_input_scales(folder)
    assert scales.global_scales == {module: 100.0 + i for i, module in enumerate(ATTENTION)}
    assert scales.origin == str(folder)
    header = struct.unpack("<Q", (folder / "model.safetensors").read_bytes()[:8])[0]
    assert sum(sizes) <= len(b"{}") + 8 + 1 + header + 4 * len(ATTENTION)  # config.json, header, one number each


@pytest.mark.parametrize(
    ("config", "hf_quant_config", "divisor"),
    [
        (NVFP4_CONFIG, None, 4.0),
        ({"text_config": NVFP4_CONFIG}, None, 4.0),
        ({}, {"producer": {}, "quantization": {"quant_algo": "NVFP4"}}, 4.0),
        ({"quantization_config": {"quant_method": "modelopt"}}, {"quantization": {"quant_algo": "FP8"}}, 24.0),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, None, 24.0),
        ({"quantization_config": {"quant_algo": "W4A8_NVFP4_FP8"}}, None, 24.0),
        ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}, None, 24.0),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {
                        "group_0": {"input_activations": {"num_bits": 4, "type": "float"}},
                        "group_1": {"input_activations": {"num_bits": 8, "type": "float"}},
                        "group_2": {"input_activations": None},
                    },
                }
            },
            None,
            24.0,
        ),
    ],
)
def test_the_config_tells_nvfp4_from_fp8(tmp_path, config, hf_quant_config, divisor):
    folder = write_folder(tmp_path / "m", {"m.q.input_scale": tensor(0.25)}, config, hf_quant_config)
    assert read_input_scales(folder).global_scales == {"m.q": divisor}
    assert read_input_scales(folder, "input_scale").global_scales == {"m.q": divisor}


@pytest.mark.parametrize(
    ("config", "hf_quant_config"),
    [
        ({}, None),
        ({"quantization_config": None}, {"quantization": None}),
        ({"quantization_config": {"quant_algo": "NVFP4_AWQ"}}, None),
        ({"quantization_config": {"quant_algo": 4, "quantized_layers": []}}, None),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": []}}, None),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {
                        "group_0": {"input_activations": {"num_bits": 8, "type": "int"}},
                        "group_1": None,
                    },
                }
            },
            None,
        ),
    ],
)
def test_a_config_that_does_not_tell_is_an_error_unless_the_kind_is_given(tmp_path, config, hf_quant_config):
    folder = write_folder(tmp_path / "m", {"m.q.input_scale": tensor(0.25)}, config, hf_quant_config)
    assert "give the kind, input_scale, if it is the former" in refused(folder)
    assert read_input_scales(folder, "input_scale").global_scales == {"m.q": 4.0}


def test_mixed_precision_is_told_layer_by_layer(tmp_path):
    layers = {
        f"{LAYER}.self_attn.q_proj": {"quant_algo": "FP8"},
        f"{LAYER}.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
        f"{LAYER}.self_attn.o_proj": "not an object",
    }
    config = {"quantization_config": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    tensors = {f"{name}.input_scale": tensor(0.25) for name in (ATTENTION[0], expert(7, "up_proj"))}
    divisors = read_input_scales(write_folder(tmp_path / "a", tensors, config)).global_scales
    assert divisors == {ATTENTION[0]: 24.0, expert(7, "up_proj"): 4.0}
    tensors = {f"{ATTENTION[3]}.input_scale": tensor(0.25)}
    assert "'MIXED_PRECISION'" in refused(write_folder(tmp_path / "b", tensors, config))


def test_scales_of_transformed_inputs_are_refused(tmp_path):
    config = {"quantization_config": {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}}}
    assert "transform_config" in refused(write_folder(tmp_path / "m", {"m.input_global_scale": tensor(9.0)}, config))


def test_an_unset_fp8_scale_marks_no_calibration(tmp_path):
    config = {"quantization_config": {"quant_method": "fp8"}}
    folder = write_folder(tmp_path / "m", {"m.input_scale": tensor(1.0)}, config)
    assert read_input_scales(folder).global_scales == {"m": 1.0}


@pytest.mark.parametrize(("kind", "marks"), [("input_global_scale", "0 nan inf 1"), ("input_scale", "inf nan 0 1")])
def test_marks_of_no_calibration_survive_reading(tmp_path, kind, marks):
    values = [float(mark) for mark in marks.split()]
    as_json = write_json(tmp_path / "s.json", {"kind": kind, "values": {str(i): v for i, v in enumerate(values)}})
    tensors = {f"{i}.{kind}": tensor(v) for i, v in enumerate(values)}
    as_tensors = write_safetensors(tmp_path / "s.safetensors", tensors)
    for path in (as_json, as_tensors):
        divisors = read_input_scales(path, kind).global_scales
        assert [divisors[str(i)] for i in range(4)] == [0.0, pytest.approx(math.nan, nan_ok=True), math.inf, 1.0]


def test_an_amax_of_zero_marks_no_calibration_and_one_does_not(tmp_path):
    path = write_json(tmp_path / "s.json", {"kind": "amax", "values": {"a": 0, "b": 1.0, "c": 1e-40}})
    assert read_input_scales(path).global_scales == {"a": math.inf, "b": 2688.0, "c": math.inf}


def test_an_unknown_kind_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="'max' is unknown, expected one of input_global_scale, input_scale, amax"):
        read_input_scales(tmp_path / "s.json", "max")


def test_kinds_that_contradict_each_other_are_refused(tmp_path):
    typed = write_json(tmp_path / "a.json", {"kind": "amax", "values": {"m": 1.0}})
    assert "says kind amax, but the kind given is input_scale" in refused(typed, "input_scale")
    assert read_input_scales(typed, "amax").global_scales == {"m": 2688.0}
    named = write_json(tmp_path / "b.json", {"m.input_global_scale": 1.0})
    assert "stored as input_global_scale, but the kind given is amax" in refused(named, "amax")


# Bad input


class Bomb:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("name", ["s.pt", "s.pkl", "s.bin", "s.npy", "s.npz", "s", "s.safetensors.pth"])
@pytest.mark.case(71)
def test_other_files_are_refused_unopened(tmp_path, name):
    path, sentinel = tmp_path / name, tmp_path / "ran"
    path.write_bytes(pickle.dumps(Bomb(sentinel)))
    path.chmod(0)
    accessed = path.stat().st_atime_ns
    assert "use .json or .safetensors" in refused(path, "amax")
    assert not sentinel.exists()
    assert path.stat().st_atime_ns == accessed


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.case(71)
def test_a_pickle_under_a_false_name_is_not_run(tmp_path, suffix):
    path, sentinel = tmp_path / f"s.{suffix}", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Bomb(sentinel)))
    refused(path, "amax")
    assert not sentinel.exists()


@pytest.mark.parametrize("kind", ["amax", "input_scale", "input_global_scale"])
@pytest.mark.parametrize(
    "value", ["NaN", "0", "-0.0", "-1", "-1e-9", "Infinity", "-Infinity", "true", "false", '"3.2"', "null", "[]",
              "[1, 2]", "[[1]]", "{}", "1e-46", "1e39", "1e999", "1" * 30]
)  # fmt: skip
@pytest.mark.case(72)
def test_values_that_are_no_scale(tmp_path, kind, value):
    path = write_json(tmp_path / "s.json", f'{{"kind": "{kind}", "values": {{"{ATTENTION[3]}": {value}}}}}')
    with pytest.raises(ScaleError) as caught:
        assign_input_scales(read_input_scales(path), fused_groups([ATTENTION[3]]))
    one_line(caught.value, path)


@pytest.mark.parametrize("value", [1e-46, 1e39, -2.0, -math.inf])
@pytest.mark.case(72)
def test_values_in_tensors(tmp_path, value):
    tensors = {"m.input_amax": tensor(value, torch.float64)}
    message = refused(write_safetensors(tmp_path / "s.safetensors", tensors))
    assert "expected a positive number" in message if value < 0 else "float32 cannot hold" in message


@pytest.mark.parametrize("mark", [math.nan, 0.0, math.inf, 1.0])
@pytest.mark.case(72)
def test_uncalibrated_modules_are_counted(mark):
    divisors = dict.fromkeys(ATTENTION, mark)
    message = refused_assignment(divisors, ATTENTION)
    assert ": 4 scales are marks of no calibration" in message
    assert f"'{ATTENTION[1]} = {mark}'" in message
    assert message.count(" = ") == 3
    assert ", ...;" in message


@pytest.mark.parametrize("value", [0.999, 0.0004, 1e-30, -5.0])
@pytest.mark.case(72)
def test_implausible_scales(value):
    message = refused_assignment({ATTENTION[3]: value}, ATTENTION[3:])
    assert f": 1 input_global_scale (2688/amax) is below 1: '{ATTENTION[3]} = {value:.3g}'" in message
    assert assign({ATTENTION[3]: 1.0001}, ATTENTION[3:]).global_scales == {ATTENTION[3]: 1.0001}


@pytest.mark.case(72)
def test_an_implausible_expert_is_no_source_to_fill_from():
    divisors = dict.fromkeys(experts(2), 900.0) | {expert(0, "down_proj"): 0.0004}
    assert ": 1 input_global_scale (2688/amax) is below 1" in refused_assignment(divisors, experts(3))


@pytest.mark.case(73)
def test_unknown_modules():
    divisors = dict.fromkeys([*ATTENTION, *(f"other.{i}" for i in range(5))], 100.0)
    message = refused_assignment(divisors, ATTENTION)
    assert (
        ": 5 names belong to no module of the source: 'other.0', 'other.1', 'other.2', ...; is it of another model?"
        in message
    )


@pytest.mark.case(73)
def test_an_expert_too_many():
    message = refused_assignment(dict.fromkeys(experts(5), 100.0), experts(4))
    assert f": 3 names belong to no module of the source: '{expert(4, 'gate_proj')}'" in message


@pytest.mark.case(73)
def test_names_with_control_characters_stay_off_the_terminal():
    message = refused_assignment({"\x1b[31mred\n": 100.0, ATTENTION[3]: 9.0}, ATTENTION[3:])
    assert r"\x1b[31mred\n" in message


@pytest.mark.case(74)
def test_missing_modules():
    message = refused_assignment({ATTENTION[0]: 100.0}, ATTENTION)
    assert ": 3 modules are missing: " in message
    assert all(repr(name) in message for name in ATTENTION[1:])
    assert "..." not in message


@pytest.mark.case(74)
def test_no_expert_of_a_layer_is_calibrated():
    divisors = {name: 100.0 for name in experts(3) if not name.endswith("down_proj")}
    message = refused_assignment(divisors, experts(3))
    assert f": 3 fused groups of experts have no scale: '{expert(0, 'down_proj')}'" in message


@pytest.mark.case(75)
def test_duplicate_keys(tmp_path):
    path = write_json(tmp_path / "s.json", '{"kind": "amax", "values": {"m": 1.0, "m": 2.0}}')
    assert "key 'm' appears twice" in refused(path)


@pytest.mark.case(75)
def test_two_names_for_one_module(tmp_path):
    path = write_json(tmp_path / "s.json", {"m": 3.0, "m.amax": 3.0})
    assert "'m' has two input scales, one of them 'm.amax'" in refused(path, "amax")
    tensors = {"m.amax": tensor(3.0), "m.input_global_scale": tensor(3.0)}
    assert "'m' has two input scales" in refused(write_safetensors(tmp_path / "s.safetensors", tensors))


@pytest.mark.parametrize(
    "value",
    [torch.ones(2), torch.ones(0), torch.ones(1, 1), tensor(3, torch.int64), torch.ones(1, dtype=torch.uint8),
     torch.ones(1).to(torch.float8_e4m3fn)],
)  # fmt: skip
@pytest.mark.case(76)
def test_wrong_shape_or_dtype(tmp_path, value):
    tensors = {"m.input_global_scale": value}
    for path in (write_safetensors(tmp_path / "s.safetensors", tensors), write_folder(tmp_path / "m", tensors)):
        assert "expected a scalar or [1] in F64, F32, F16, BF16" in refused(path)


@pytest.mark.case(77)
def test_members_that_differ_share_the_smallest_and_warn():
    divisors = dict(zip(ATTENTION, (120.0, 100.0, 150.0, 7.0), strict=True))
    assigned = assign(divisors, ATTENTION)
    assert assigned.global_scales == {f"{LAYER}.self_attn.qkv_proj": 100.0, ATTENTION[3]: 7.0}
    (warning,) = assigned.warnings
    assert "disagree inside 1 fused group, by up to 1.5 times" in warning
    assert f"'{LAYER}.self_attn.qkv_proj'" in warning


@pytest.mark.parametrize("mark", [None, 0.0, math.nan, 1.0])
def test_partners_that_calibration_never_saw_take_the_scale_of_their_group(mark):
    divisors = {ATTENTION[0]: 120.0, ATTENTION[3]: 7.0} | ({} if mark is None else {ATTENTION[1]: mark})
    assigned = assign(divisors, ATTENTION)
    assert assigned.global_scales == {f"{LAYER}.self_attn.qkv_proj": 120.0, ATTENTION[3]: 7.0}
    (warning,) = assigned.warnings
    assert warning.startswith("2 modules have no scale of their own")
    assert ATTENTION[2] in warning


@pytest.mark.case(78)
def test_a_huge_json_is_refused_by_its_size(tmp_path):
    path = tmp_path / "s.json"
    with path.open("wb") as file:
        file.truncate(2**30)
    tracemalloc.start()
    try:
        assert f"is {2**30} bytes, expected at most {MAX_SCALES_BYTES}" in refused(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20  # nothing of it was read
    finally:
        tracemalloc.stop()


@pytest.mark.case(78)
def test_the_limit_is_exact(tmp_path, monkeypatch):
    path = tmp_path / "s.json"
    monkeypatch.setattr(reading, "MAX_SCALES_BYTES", 1000)
    path.write_text('{"m.amax": 2}'.ljust(1000))
    assert read_input_scales(path).global_scales == {"m": 1344.0}
    path.write_text('{"m.amax": 2}'.ljust(1001))
    refused(path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", "\xff", "{}", '{"kind": "amax", "values": {}}', '{"kind": "max", "values": {"m": 1}}',
     '{"kind": ["amax"], "values": {"m": 1}}', '{"values": {"m": 1}}', '{"kind": "amax", "values": {"m": 1}, "a": 0}',
     '{"kind": "amax", "values": [1]}', "[" * 200_000, '{"metadata": {}, "weight_map": {"a": "b"}}']
)  # fmt: skip
def test_json_that_holds_no_scales(tmp_path, content):
    path = tmp_path / "s.json"
    path.write_bytes(content.encode("latin-1"))
    refused(path)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 99) + b"{}"])
def test_safetensors_that_hold_no_scales(tmp_path, content):
    path = tmp_path / "s.safetensors"
    path.write_bytes(content)
    refused(path, "amax")


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_files_that_are_not_there_or_no_files(tmp_path, suffix):
    path = tmp_path / f"s.{suffix}"
    assert "missing" in refused(path)
    os.mkfifo(path)
    assert "not a regular file" in refused(path)


def test_folders_that_are_no_calibrated_checkpoint(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in refused(empty)
    weights = write_folder(tmp_path / "weights", {"m.weight": torch.ones(2, 2)})
    assert "it holds no input scale, expected names like '<module>.input_global_scale'" in refused(weights)


# Assigning


def test_fused_partners_share_and_the_rest_stands_alone():
    assigned = assign(dict.fromkeys(ATTENTION, 100.0), ATTENTION)
    assert assigned.global_scales == {f"{LAYER}.self_attn.qkv_proj": 100.0, ATTENTION[3]: 100.0}
    assert (assigned.warnings, assigned.filled) == ((), 0)


@pytest.mark.parametrize("written", [*PREFIXES, ""])
@pytest.mark.parametrize("source", [*PREFIXES, ""])
def test_prefixes_are_bridged(written, source):
    names = ["layers.0.self_attn.o_proj", "layers.1.self_attn.o_proj"]
    assigned = assign({written + name: 10.0 + i for i, name in enumerate(names)}, [source + name for name in names])
    assert assigned.global_scales == {source + name: 10.0 + i for i, name in enumerate(names)}


def test_equal_names_come_before_bridged_ones():
    source = ["model.layers.0.o_proj", "model.language_model.layers.0.o_proj"]
    assert assign({source[0]: 10.0, source[1]: 20.0}, source).global_scales == {source[0]: 10.0, source[1]: 20.0}
    assert assign({source[0]: 10.0, "layers.0.o_proj": 20.0}, source).global_scales == {
        source[0]: 10.0,
        source[1]: 20.0,
    }


def test_a_name_that_could_be_two_modules_is_refused():
    source = ["model.layers.0.o_proj", "model.language_model.layers.0.o_proj"]
    assert ": 1 name could belong to several modules: 'layers.0.o_proj'" in refused_assignment(
        {"layers.0.o_proj": 9.0}, source
    )


def test_two_names_that_could_be_one_module_are_refused():
    divisors = {"model.layers.0.o_proj": 10.0, "language_model.layers.0.o_proj": 20.0}
    assert ": 2 names could belong to several modules" in refused_assignment(divisors, ["layers.0.o_proj"])


@given(st.lists(st.sampled_from([p + n for p in (*PREFIXES, "") for n in "ab"]), unique=True),
       st.lists(st.sampled_from([p + n for p in (*PREFIXES, "") for n in "ab"]), unique=True))  # fmt: skip
def test_no_written_name_is_lost_or_used_twice(written, modules):
    bridge = bridge_names(written, modules)
    assert sorted([*bridge.written.values(), *bridge.ambiguous, *bridge.unknown]) == sorted(written)
    assert set(bridge.written) <= set(modules)
    assert all(bridge.written[name] == name for name in set(written) & set(modules))


def test_scales_of_kept_modules_are_ignored_with_one_line():
    kept = ["lm_head", "mtp.fc", *experts(2, "mtp.layers.0"), "model.visual.blocks.0.attn.qkv"]
    written = ["lm_head", *experts(2, "mtp.layers.0"), "visual.blocks.0.attn.qkv", ATTENTION[3]]
    assigned = assign(dict.fromkeys(written, 0.0) | {ATTENTION[3]: 9.0}, ATTENTION[3:], kept)
    assert assigned.global_scales == {ATTENTION[3]: 9.0}
    (warning,) = assigned.warnings
    assert warning.startswith("8 input scales of modules that are kept are ignored: 'lm_head', ")


@pytest.mark.parametrize("mark", [None, 0.0, math.nan, math.inf, 1.0])
def test_experts_without_calibration_take_their_layers_smallest(mark):
    other = "model.language_model.layers.4"
    divisors = dict.fromkeys([*experts(4), *experts(4, other)], 500.0)
    divisors |= {expert(2, "up_proj"): 300.0, expert(2, "gate_proj"): 300.0, expert(3, "down_proj"): 40.0}
    divisors |= {expert(3, "gate_proj", other): 20.0, expert(3, "up_proj", other): 20.0}
    for leaf in LEAVES:
        divisors[expert(1, leaf)] = mark
    divisors[expert(0, "down_proj")] = mark
    divisors = {name: value for name, value in divisors.items() if value is not None}
    assigned = assign(divisors, [*experts(4), *experts(4, other)])
    assert assigned.global_scales[expert(1, "gate_up_proj")] == 300.0
    assert assigned.global_scales[expert(1, "down_proj")] == 40.0
    assert assigned.global_scales[expert(0, "down_proj")] == 40.0
    assert assigned.global_scales[expert(0, "gate_up_proj")] == 500.0
    assert assigned.global_scales[expert(0, "gate_up_proj", other)] == 500.0
    assert assigned.filled == 2
    assert assigned.warnings == ()


def test_an_expert_with_one_calibrated_partner_takes_its_scale():
    divisors = dict.fromkeys(experts(2), 500.0) | {expert(0, "gate_proj"): 1.0, expert(0, "up_proj"): 700.0}
    assigned = assign(divisors, experts(2))
    assert assigned.global_scales[expert(0, "gate_up_proj")] == 700.0
    assert assigned.filled == 0


@pytest.mark.parametrize("gate_up", ["gate_up_proj", "gate_proj"])
def test_a_stacks_scale_holds_for_each_of_its_experts(gate_up):
    stack = f"language_model.model.layers.3.mlp.experts.{gate_up}"
    divisors = {stack: 60.0, f"{LAYER}.mlp.experts.down_proj": 70.0, expert(1, "down_proj"): 50.0}
    divisors |= {expert(2, "down_proj"): 0.0}
    assigned = assign(divisors, experts(3))
    assert [assigned.global_scales[expert(e, "gate_up_proj")] for e in range(3)] == [60.0] * 3
    assert [assigned.global_scales[expert(e, "down_proj")] for e in range(3)] == [70.0, 50.0, 70.0]
    assert (assigned.filled, assigned.warnings) == (0, ())


def test_a_kept_stacks_scale_is_ignored():
    kept = ["mtp.layers.0.mlp.experts.gate_up_proj", *experts(2, "mtp.layers.0")]
    assigned = assign({kept[0]: 60.0, ATTENTION[3]: 9.0}, ATTENTION[3:], kept)
    assert len(assigned.warnings) == 1


def test_names_of_mixtral_are_experts_too():
    modules = [f"model.layers.0.block_sparse_moe.experts.{e}.w{i}" for e in range(2) for i in (1, 2, 3)]
    divisors = {modules[0]: 30.0, modules[1]: 40.0, modules[2]: 30.0}
    assigned = assign(divisors, modules)
    assert assigned.global_scales["model.layers.0.block_sparse_moe.experts.1.w13"] == 30.0
    assert assigned.global_scales["model.layers.0.block_sparse_moe.experts.1.w2"] == 40.0
    assert assigned.filled == 1


def test_shared_experts_are_not_filled():
    modules = [f"{LAYER}.mlp.shared_expert.{leaf}" for leaf in LEAVES]
    divisors = dict.fromkeys([*experts(2), *modules[:2]], 100.0)
    assert f": 1 module is missing: '{modules[2]}'" in refused_assignment(divisors, [*experts(2), *modules])


def test_the_digest_follows_the_assignment_alone():
    divisors = dict(zip(ATTENTION, (120.0, 100.0, 150.0, 7.0), strict=True))
    digest = assign(divisors, ATTENTION).digest
    backwards = {name.removeprefix("model."): value for name, value in reversed(divisors.items())}
    groups = reversed(fused_groups(ATTENTION))
    assert assign_input_scales(scales_of(backwards), groups).digest == digest
    assert assign(divisors | {ATTENTION[1]: math.nextafter(100.0, 101)}, ATTENTION).digest != digest
    assert len(bytes.fromhex(digest)) == 32


def test_no_groups_need_no_scales():
    assert assign_input_scales(scales_of({"a": 3.0}), [], kept=["a"]).global_scales == {}
    assert assign_input_scales(scales_of({"a": 3.0}), iter([FusedGroup("a", ("a",))])).global_scales == {"a": 3.0}


def test_work_grows_with_the_experts_and_no_faster():
    def calls(count):
        layers = [f"model.language_model.layers.{layer}" for layer in range(4)]
        modules = [name for layer in layers for name in experts(count, layer)]
        divisors = {"language_model.model." + name.removeprefix("model.language_model."): 300.0 for name in modules}
        made = 0

        def profile(_frame, event, _argument):
            nonlocal made
            made += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            assigned = assign(divisors, modules)
        finally:
            sys.setprofile(None)
        assert len(assigned.global_scales) == 4 * count * 2
        return made

    assert calls(128) < 4.4 * calls(32)


ANY_KEY = st.sampled_from(["kind", "values", "a", "a.amax", "model.a", "a.input_scale"])
ANY_ATOM = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["amax", "input_scale", ""])
ANY_VALUE = st.recursive(
    ANY_ATOM,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_KEY, inner, max_size=4),
    max_leaves=8,
)
ANY_JSON = st.binary(max_size=60) | ANY_VALUE.map(lambda value: json.dumps(value).encode())


@settings(deadline=None)
@given(ANY_JSON, st.sampled_from([None, "amax", "input_scale"]))
def test_any_json_is_read_or_refused_by_our_error(tmp_path_factory, content, kind):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    try:
        divisors = read_input_scales(path, kind).global_scales
    except ScaleError:
        return
    assert all(math.isnan(value) or (value >= 0 and f32(value) == value) for value in divisors.values())

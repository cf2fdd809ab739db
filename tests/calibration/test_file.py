"""Calibration files: what is written is read, merging is pooling, and whatever cannot be is refused in one line."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import mfptq
from mfptq.calibration.checks import check_statistics
from mfptq.calibration.file import (
    LEVELS,
    CalibrationContents,
    Description,
    InputInfo,
    InputStatistics,
    check_output,
    write_calibration,
)
from mfptq.calibration.merge import merge_calibrations, pooled
from mfptq.calibration.methods import importance, local_hessian, shrinkage
from mfptq.calibration.reading import load_calibration
from mfptq.errors import ScaleError, UsageError
from mfptq.storage.digest import file_sha256

from ..conftest import command, sampled
from .files import ABOUT, calibrate, described, random_inputs, statistics_of, write_file

INFO = InputInfo("layers.0.qkv.input", 32, ("layers.0.q_proj", "layers.0.k_proj"))
OTHER = InputInfo("layers.1.down.input", 48, ("layers.1.down_proj",))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "demo.calibration.safetensors"


def two_inputs(path: Path, seed: int = 0, tokens: int = 300, about: Description = ABOUT, **more) -> Path:
    level = about.statistics
    found = {info: statistics_of(random_inputs(info.columns, tokens, seed), level) for info in (INFO, OTHER)}
    return write_file(path, found, about, **more)


def equal(one: InputStatistics, two: InputStatistics) -> bool:
    parts = (one.second_moment, two.second_moment), (one.hessian, two.hessian), (one.factors, two.factors)
    return (one.amax, one.tokens) == (two.amax, two.tokens) and all(
        a is b is None or np.array_equal(a, b) for a, b in parts
    )


# Writing and reading


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_written_is_read(level, path):
    counts = {"layers.0.experts": np.array([7, 0, 2**40])}
    calibration = load_calibration(two_inputs(path, about=described(level), routed=counts))
    assert calibration.description == described(level)
    assert calibration.inputs == {INFO.name: INFO, OTHER.name: OTHER}
    for info in (INFO, OTHER):
        assert equal(calibration.read(info), statistics_of(random_inputs(info.columns), level))
    assert calibration.routed()["layers.0.experts"].tolist() == [7, 0, 2**40]
    fd = os.open(path, os.O_RDONLY)
    assert calibration.digest == file_sha256(fd, path.stat().st_size)
    os.close(fd)
    calibration.close()


def test_the_safetensors_library_reads_the_documented_tensors(path):
    two_inputs(path, about=described("factors"))
    with safe_open(path, "numpy") as file:
        metadata, names = file.metadata(), set(file.keys())
        assert file.get_tensor(f"{INFO.name}.factors").shape == (32, 32)
        assert file.get_tensor(f"{INFO.name}.hessian").shape == (2, 16, 16)
        assert file.get_tensor(f"{INFO.name}.second_moment").shape == (32,)
        assert file.get_tensor(f"{INFO.name}.amax").dtype == np.float32
        assert file.get_tensor(f"{INFO.name}.tokens").tolist() == [300]
    assert names == {
        f"{i.name}.{kind}" for i in (INFO, OTHER) for kind in ("amax", "tokens", "second_moment", "hessian", "factors")
    }
    assert metadata["model"] == "demo"
    assert json.loads(metadata["inputs"])[INFO.name] == {"columns": 32, "modules": list(INFO.modules)}
    assert not any(word in str(metadata) for word in ("date", "time", "host"))


def test_writing_twice_gives_the_same_bytes(path, tmp_path):
    assert two_inputs(path).read_bytes() == two_inputs(tmp_path / "again.safetensors").read_bytes()


def test_a_failed_write_leaves_nothing(path):
    def read(info: InputInfo) -> InputStatistics:
        raise ScaleError("no statistics")

    with pytest.raises(ScaleError):
        write_calibration(path, CalibrationContents(ABOUT, (INFO,), read, {}))
    assert list(path.parent.iterdir()) == []


def test_output_names_are_checked(path, tmp_path):
    check_output(path, overwrite=False)
    for bad in (tmp_path / "a.json", tmp_path / "missing" / path.name):
        with pytest.raises(UsageError):
            check_output(bad, overwrite=True)
    path.touch()
    check_output(path, overwrite=True)
    with pytest.raises(UsageError, match="exists: choose another name, or overwrite it"):
        check_output(path, overwrite=False)


# What the kernels are given


def test_statistics_are_made_once_and_only_the_latest_are_kept(path):
    calibration = load_calibration(two_inputs(path))
    first = calibration.statistics("layers.0.q_proj", "hessian")
    assert calibration.statistics("layers.0.k_proj", "hessian") is first  # they share the input
    calibration.statistics("layers.1.down_proj", "hessian")
    calibration.statistics("layers.1.down_proj", "weighted")
    again = calibration.statistics("layers.0.q_proj", "hessian")
    assert again is not first
    assert np.array_equal(again.values, first.values)
    assert calibration.statistics("layers.0.q_proj", "search") is None
    calibration.close()


@pytest.mark.parametrize("tokens", [100, 1_000, 10_000])
def test_a_local_hessian_is_made_block_by_block(tokens):
    blocks = statistics_of(random_inputs(16 * 50)).hessian
    whole = local_hessian(blocks, tokens)
    assert np.array_equal(whole, np.concatenate([local_hessian(block[None], tokens) for block in blocks]))
    assert np.linalg.eigvalsh(whole.astype(np.float64)).min() > 0
    assert np.array_equal(whole, whole.transpose(0, 2, 1))


def test_little_text_shrinks_correlations_and_leaves_the_diagonal():
    blocks = statistics_of(random_inputs(64)).hessian
    assert [round(shrinkage(tokens), 2) for tokens in (1, 500, 2_000, 20_000)] == [1.0, 0.55, 0.36, 0.17]
    few, many = local_hessian(blocks, 500), local_hessian(blocks, 10**15)
    ratio = (few / many)[:, ~np.eye(16, dtype=bool)]
    assert np.allclose(ratio, 1 - shrinkage(500), rtol=1e-3)
    assert np.allclose(np.diagonal(few, axis1=1, axis2=2), np.diagonal(many, axis1=1, axis2=2), rtol=1e-6)


def test_channels_that_never_spoke_count_alike():
    assert np.allclose(importance(np.zeros(16, np.float32)), 1)
    assert np.allclose(local_hessian(np.zeros((1, 16, 16), np.float32), 10)[0], np.eye(16))


# Merging


def pooled_directly(*parts):
    return statistics_of(np.concatenate(parts))


def test_merging_is_what_one_pass_over_all_the_text_records(tmp_path):
    paths = [
        two_inputs(tmp_path / f"{seed}.safetensors", seed, 100 * (seed + 1), described(dataset=str(seed)))
        for seed in range(3)
    ]
    merge_calibrations(paths, tmp_path / "all.safetensors")
    merged = load_calibration(tmp_path / "all.safetensors")
    assert merged.description == described(samples=6, requested=6, dataset="0+1+2")
    for info in (INFO, OTHER):
        found = merged.read(info)
        direct = pooled_directly(*(random_inputs(info.columns, 100 * (seed + 1), seed) for seed in range(3)))
        assert (found.amax, found.tokens) == (direct.amax, 600)
        assert np.allclose(found.second_moment, direct.second_moment, rtol=1e-6)
        assert np.allclose(found.hessian, direct.hessian, rtol=1e-6, atol=1e-6 * direct.hessian.max())
    merged.close()


@pytest.mark.parametrize("rank", [32, 20])  # all that two files know, and the most of it
def test_merged_factors_are_the_largest_directions_of_all(rank, tmp_path):
    whole = np.concatenate([random_inputs(32, 100 * (seed + 1), seed) for seed in range(2)])
    parts = []
    for seed in range(2):
        part = statistics_of(random_inputs(32, 100 * (seed + 1), seed), "factors")
        parts.append(replace(part, factors=part.factors[:rank]))
    found = pooled(parts)
    check_statistics(INFO, found)
    assert found.factors.shape == (rank, 32)
    square = whole.T @ whole / len(whole)
    left = square - found.factors.T.astype(np.float64) @ found.factors
    beyond = np.sort(np.linalg.eigvalsh(square))[: 32 - rank].sum()
    assert np.trace(left) <= 1.2 * beyond + 1e-5 * np.trace(square)


def test_what_only_one_file_knows_is_kept(tmp_path):
    one = write_file(tmp_path / "1.safetensors", {INFO: statistics_of(random_inputs(32))}, described(dataset="1"))
    two = write_file(tmp_path / "2.safetensors", {OTHER: statistics_of(random_inputs(48))}, described(dataset="2"))
    merge_calibrations([one, two], tmp_path / "all.safetensors")
    merged = load_calibration(tmp_path / "all.safetensors")
    assert equal(merged.read(INFO), statistics_of(random_inputs(32)))
    assert equal(merged.read(OTHER), statistics_of(random_inputs(48)))
    merged.close()


def test_routed_tokens_are_added(tmp_path):
    paths = [
        two_inputs(tmp_path / f"{n}.safetensors", about=described(dataset=str(n)), routed={"e": np.array([n, 10])})
        for n in range(2)
    ]
    merge_calibrations(paths, tmp_path / "all.safetensors")
    merged = load_calibration(tmp_path / "all.safetensors")
    assert merged.routed()["e"].tolist() == [1, 20]
    merged.close()


@pytest.mark.parametrize(
    ("about", "problem"),
    [
        (described(dataset="b", model="another"), "has model 'another'"),
        (described(dataset="b", revision="dev"), "has revision 'dev'"),
        (described(), "made from text that another of the files was made from too"),
    ],
)
def test_files_that_do_not_belong_together_are_not_merged(tmp_path, about, problem):
    one, two = two_inputs(tmp_path / "1.safetensors"), two_inputs(tmp_path / "2.safetensors", about=about)
    with pytest.raises(ScaleError, match=problem):
        merge_calibrations([one, two], tmp_path / "all.safetensors")
    assert not (tmp_path / "all.safetensors").exists()


def test_inputs_and_experts_of_other_shapes_are_not_merged(tmp_path):
    one = two_inputs(tmp_path / "1.safetensors", routed={"e": np.array([1, 2])})
    two = two_inputs(tmp_path / "2.safetensors", about=described(dataset="b"), routed={"e": np.array([1, 2, 3])})
    three = write_file(
        tmp_path / "3.safetensors",
        {replace(INFO, columns=48): statistics_of(random_inputs(48))},
        described(dataset="c"),
    )
    for paths, problem in (([one, two], "has 3 experts, not 2"), ([one, three], "has other columns or modules")):
        with pytest.raises(ScaleError, match=problem):
            merge_calibrations(paths, tmp_path / "all.safetensors")


def test_modules_with_inputs_of_other_names_are_not_merged(tmp_path):
    paths = []
    for name in ("experts.gate_up_proj", "experts.0.gate_proj"):  # of all tokens, and of the router's choice
        info = InputInfo(name, 32, ("experts.0.gate_proj",))
        statistics = statistics_of(random_inputs(32))
        paths.append(write_file(tmp_path / f"{name}.safetensors", {info: statistics}, described(dataset=name)))
    with pytest.raises(ScaleError, match="has other columns or modules"):
        merge_calibrations(paths, tmp_path / "all.safetensors")
    assert not (tmp_path / "all.safetensors").exists()


def test_one_file_is_nothing_to_merge(path, tmp_path):
    with pytest.raises(UsageError, match="at least two"):
        merge_calibrations([two_inputs(path)], tmp_path / "all.safetensors")


# Bad input


def tampered(path: Path, change, metadata=None) -> Path:
    """Rewrite a file with the safetensors library after `change` was made to its tensors."""
    with safe_open(path, "numpy") as file:
        about = {**file.metadata(), **(metadata or {})}
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {key: value for key, value in about.items() if value is not None})
    return path


def replacing(kind: str, index, value):
    """Return a change to one entry of every input's tensor of that kind."""

    def change(tensors):
        for name in [name for name in tensors if name.endswith(f".{kind}")]:
            tensors[name] = tensors[name].copy()
            tensors[name][index] = value

    return change


def indefinite(tensors):
    """Make one block's off-diagonal entries larger than its diagonal allows: symmetric, but no second moments."""
    name = next(name for name in tensors if name.endswith(".hessian"))
    block = tensors[name][1]
    block[2, 3] = block[3, 2] = 1.01 * np.sqrt(block[2, 2] * block[3, 3])


def removing(kind: str):
    return lambda tensors: tensors.pop(next(name for name in tensors if name.endswith(f".{kind}")))


def listing(inputs) -> dict[str, str]:
    return {"inputs": inputs if isinstance(inputs, str) else json.dumps(inputs)}


def unchanged(tensors):
    pass


BAD = {
    "moment is NaN": (replacing("second_moment", 3, np.nan), {}, "second_moment .* is nan at 3"),
    "moment is negative": (replacing("second_moment", 3, -1.0), {}, "second_moment .* is -1 at 3"),
    "moment is infinite": (replacing("second_moment", 3, np.inf), {}, "second_moment .* is inf at 3"),
    "moment above amax": (replacing("amax", 0, 1e-3), {}, "more than the square of its amax"),
    "amax is NaN": (replacing("amax", 0, np.nan), {}, "amax .* is nan"),
    "amax is negative": (replacing("amax", 0, -2), {}, "amax .* is -2"),
    "amax is infinite": (replacing("amax", 0, np.inf), {}, "amax .* is inf"),
    "zero tokens": (replacing("tokens", 0, 0), {}, "has 0 tokens, expected at least one"),
    "negative tokens": (replacing("tokens", 0, -5), {}, "has -5 tokens"),
    "hessian not PSD": (indefinite, {}, "not positive semi-definite: block 1 has eigenvalue -"),
    "hessian not symmetric": (replacing("hessian", (0, 2, 5), 1e6), {}, "is not symmetric"),
    "hessian is NaN": (replacing("hessian", (0, 2, 5), np.nan), {}, "is not finite"),
    "hessian with another diagonal": (replacing("hessian", (0, 2, 2), 1e9), {}, "another diagonal"),
    "factors are NaN": (replacing("factors", (1, 5), np.nan), {}, "factors .* are not finite"),
    "factors above the hessian": (
        replacing("factors", (1, 21), 1e3),
        {},
        "larger than its hessian: in block 1 by [0-9]",
    ),
    "factors missing": (removing("factors"), {}, "factors' is missing"),
    "hessian missing": (removing("hessian"), {}, "hessian' is missing"),
    "tokens missing": (removing("tokens"), {}, "tokens' is missing"),
    "of another shape": (
        lambda tensors: tensors.update({n: tensors[n][:-1] for n in tensors if n.endswith("second_moment")}),
        {},
        "second_moment' is F32 .*, expected F32",
    ),
    "of another dtype": (
        lambda tensors: tensors.update({n: tensors[n].astype(np.float64) for n in tensors if n.endswith("amax")}),
        {},
        "amax' is F64",
    ),
    "a tensor too many": (
        lambda tensors: tensors.update({"more": np.zeros(3, np.float32)}),
        {},
        "'more' belongs to no input",
    ),
    "no calibration file": (unchanged, {"mfptq_calibration": None}, "no calibration file: `mfptq calibrate` makes one"),
    "another version": (unchanged, {"mfptq_calibration": "2"}, "version '2', this mfptq reads version 1"),
    "unknown statistics": (unchanged, {"statistics": "all"}, "statistics are 'all'"),
    "samples no number": (unchanged, {"samples": "-1"}, "samples is '-1', expected a whole number"),
    "inputs no JSON": (unchanged, listing("{"), "list of inputs"),
    "inputs empty": (unchanged, listing({}), "lists no inputs"),
    "input without modules": (unchanged, listing({"a": {"columns": 32, "modules": []}}), "input 'a': expected"),
    "columns a boolean": (unchanged, listing({"a": {"columns": True, "modules": ["m"]}}), "input 'a': expected"),
    "columns no multiple": (unchanged, listing({"a": {"columns": 40, "modules": ["m"]}}), "not a multiple of 16"),
    "module twice": (
        unchanged,
        listing({name: {"columns": 32, "modules": ["m"]} for name in ("a", "b")}),
        "module 'm' has two inputs",
    ),
    "extracted hessians": (unchanged, {"origin": "extract"}, "cannot have statistics factors"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_before_anything_is_written(name, source, path, tmp_path):
    change, metadata, problem = BAD[name]
    tampered(calibrate(source, path, described("factors")), change, metadata)
    output = tmp_path / "output"
    with pytest.raises(ScaleError, match=problem) as caught:
        mfptq.convert(source, output, calibration=path)
    text = str(caught.value)
    assert caught.value.exit_code == 4
    assert text.isprintable()
    assert text.startswith(f"calibration {str(path)!r}: ")
    assert not output.exists()


def test_the_command_says_it_in_one_line_with_the_code_of_scales(source, path, tmp_path):
    tampered(calibrate(source, path), indefinite)
    done = command("convert", source, tmp_path / "output", "--calibration", path)
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.startswith(f"mfptq: error: calibration {str(path)!r}: hessian of ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "output").exists()


def test_a_missing_file_and_a_folder_are_refused(source, tmp_path):
    for bad in (tmp_path / "missing.safetensors", source):
        with pytest.raises(ScaleError, match=f"calibration {str(bad)!r}: "):
            mfptq.convert(source, tmp_path / "output", calibration=bad)
    assert not (tmp_path / "output").exists()


def test_a_file_cut_anywhere_is_refused(path, tmp_path):
    whole = two_inputs(path).read_bytes()
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ScaleError) as caught:
            load_calibration(path)
        assert str(caught.value).startswith(f"calibration {str(path)!r}: ")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[Path, bytes]:
    path = two_inputs(tmp_path_factory.mktemp("fuzz") / "a.calibration.safetensors")
    return path, path.read_bytes()


@pytest.mark.parametrize("count", sampled([40], [150]))
def test_damaged_bytes_are_read_or_refused_never_anything_else(shared, count):
    path, whole = shared

    @settings(max_examples=count, deadline=None)
    @given(changes=st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=3))
    def read_or_refused(changes):
        damaged = bytearray(whole)
        for position, byte in changes:
            damaged[position] = byte
        path.write_bytes(damaged)
        with contextlib.suppress(ScaleError):
            load_calibration(path).close()

    read_or_refused()


# Of another model


def test_names_of_another_model_are_refused(source, path):
    calibrate(source, path)
    calibration = load_calibration(path)
    weights = {module: info.columns for info in calibration.inputs.values() for module in info.modules}
    first = next(iter(weights))
    renamed = {name.replace("layers.0", "layers.9"): columns for name, columns in weights.items()}
    with pytest.raises(ScaleError, match=r"belong to no module of the source: .*; is it of another model\?"):
        calibration.of_model(renamed)
    with pytest.raises(ScaleError, match=f"{first} has 128 columns, its statistics 64"):
        calibration.of_model({**weights, first: 128})
    with pytest.raises(ScaleError, match=r"1 module is missing: 'one\.more'"):
        calibration.of_model({**weights, "one.more": 64})
    calibration.of_model({name: columns for name, columns in weights.items() if name != first}, kept=[first])
    calibration.close()


def test_prefixes_that_differ_between_tools_are_bridged(source, path):
    calibrate(source, path)
    calibration = load_calibration(path)
    weights = {module: info.columns for info in calibration.inputs.values() for module in info.modules}
    short = {name.replace("model.language_model.", "model."): columns for name, columns in weights.items()}
    assert short.keys() != weights.keys()
    bridged = calibration.of_model(short)
    for name, other in zip(short, weights, strict=True):
        assert (
            bridged.statistics(name, "hessian").values.tolist()
            == calibration.statistics(other, "hessian").values.tolist()
        )
    calibration.close()


def test_experts_may_be_missing_and_a_tied_head_may_be_there(path):
    head = InputInfo("lm_head.input", 32, ("lm_head",))
    found = {info: statistics_of(random_inputs(info.columns)) for info in (INFO, head)}
    calibration = load_calibration(write_file(path, found))
    model = calibration.of_model({**dict.fromkeys(INFO.modules, 32), "layers.0.experts.3.up_proj": 32})
    assert model.method("layers.0.experts.3.up_proj") == "search"
    assert model.method("layers.0.experts.3.up_proj", "minmax") == "minmax"
    assert model.method("layers.0.q_proj") == "hessian+"
    calibration.close()

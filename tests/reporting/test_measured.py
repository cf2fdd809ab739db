"""What `report --source` and `compare --source` measure, held against the reports of conversions and plain numpy."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mfptq
from mfptq.output.measured import BINS, STEP, Measured, quantile
from mfptq.reporting.compare import compare, with_measured
from mfptq.reporting.data import by_kind, csv_text, read_report
from mfptq.verification import measure
from tests.calibration.files import calibrate, described, layers_of, random_inputs, stored
from tests.clients.dequantize import write_twin
from tests.conftest import command
from tests.smoothing.models import fold, smoothed_file


def test_errors_are_those_that_the_conversion_found(moe_source: Path, tmp_path: Path) -> None:
    mfptq.convert(moe_source, tmp_path / "out")
    found, noted = measure(tmp_path / "out", moe_source), read_report(tmp_path / "out")
    assert found.keys() == {row.name for row in noted.layers}
    for row in noted.layers:
        each = found[row.name]
        assert each.relative_error == pytest.approx(row.relative_error, rel=1e-4)
        assert each.relative_output_error is None
        worst = max(number for number, count in enumerate(each.blocks) if count)
        assert worst == min(int(row.worst_block / STEP), BINS - 1)
        assert row.elements // 16 - row.zero_blocks <= sum(each.blocks) <= row.elements // 16


@pytest.mark.parametrize("statistics", ["moments", "hessian"])
def test_errors_of_outputs_are_what_the_inputs_let_expect(statistics: str, source: Path, tmp_path: Path) -> None:
    """Held against the inputs themselves: with moments, columns count each alone, with Hessians blocks of 16 of them."""
    calibration = calibrate(source, tmp_path / "c.safetensors", described(statistics))
    mfptq.convert(source, tmp_path / "out", calibration=calibration, smooth=False)
    found = measure(tmp_path / "out", source, calibration=calibration)
    before = stored(source)
    write_twin(tmp_path / "out", source, tmp_path / "twin", stacked=False)
    after = stored(tmp_path / "twin")
    for seed, (columns, members) in enumerate(layers_of(source).values()):
        inputs = random_inputs(columns, seed=seed)
        width = 16 if statistics == "hessian" else 1
        for name in members:
            exact, rounded = (tensors[f"{name}.weight"].double().numpy() for tensors in (before, after))
            error, norm = (_outputs(inputs, values, width) for values in (rounded - exact, exact))
            assert found[name].relative_output_error == pytest.approx((error / norm) ** 0.5, rel=0.02), name


def test_smoothed_weights_meet_the_divided_inputs(moe_source: Path, tmp_path: Path) -> None:
    """As in the plain conversion of the folded model, with statistics of its own inputs."""
    calibration = calibrate(moe_source, tmp_path / "c.safetensors")
    mfptq.convert(moe_source, tmp_path / "out", calibration=calibration, method="search", smooth=True)
    folded = fold(moe_source, tmp_path / "folded", calibration=calibration)
    own = smoothed_file(moe_source, calibration, tmp_path / "own.safetensors")
    mfptq.convert(folded, tmp_path / "plain", calibration=own, method="search")
    found = measure(tmp_path / "out", moe_source, calibration=calibration)
    expected = measure(tmp_path / "plain", folded, calibration=own)
    assert found.keys() == expected.keys()
    for name, each in found.items():
        assert each.relative_output_error == pytest.approx(expected[name].relative_output_error, rel=1e-4), name


def _outputs(inputs: np.ndarray, weights: np.ndarray, width: int) -> float:
    """Return the mean square of outputs, the columns in groups of a width that do not know of each other."""
    parts = (slice(start, start + width) for start in range(0, weights.shape[1], width))
    return sum(float(np.square(inputs[:, part] @ weights[:, part].T).sum()) for part in parts) / len(inputs)


def test_a_calibrated_method_lowers_the_errors_of_outputs(source: Path, tmp_path: Path) -> None:
    calibration = calibrate(source, tmp_path / "c.safetensors")
    for method in ("search", "hessian"):
        mfptq.convert(source, tmp_path / method, calibration=calibration, method=method)
    plain, better = (measure(tmp_path / each, source, calibration=calibration) for each in ("search", "hessian"))
    assert all(better[name].relative_output_error < plain[name].relative_output_error for name in plain)
    assert sum(better[name].relative_error > plain[name].relative_error for name in plain) > len(plain) / 2
    found = replace(read_report(tmp_path / "hessian"), measured=better)
    assert found.has_output_errors
    rows = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert all(float(row["output_error"]) > 0 for row in rows)
    assert all(row.outputs and row.outputs[0] <= row.outputs[1] <= row.outputs[2] for row in by_kind(found))


def test_the_report_says_what_was_measured(source: Path, tmp_path: Path) -> None:
    calibration = calibrate(source, tmp_path / "c.safetensors")
    mfptq.convert(source, tmp_path / "out", calibration=calibration)
    assert "blocks of 16" not in command("report", tmp_path / "out").stdout
    done = command("report", tmp_path / "out", "--source", source, "--calibration", calibration)
    assert "errors of blocks of 16 values: half are at most " in done.stdout
    assert "expected errors of layers' outputs, least, median and largest by kind of layer:" in done.stdout
    other = command("report", tmp_path / "out", "--source", tmp_path / "nowhere")
    assert (other.returncode, other.stdout) == (3, "")


def test_a_page_shows_what_was_measured(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    calibration = calibrate(source, tmp_path / "c.safetensors")
    mfptq.convert(source, tmp_path / "out", calibration=calibration)
    options = ("--source", source, "--calibration", calibration, "--html", tmp_path / "page.html")
    assert command("report", tmp_path / "out", *options).returncode == 0
    text = (tmp_path / "page.html").read_text()
    assert text.count("<svg") == 3
    assert "output error" in text


def test_outputs_are_compared_by_their_errors_against_the_source(source: Path, tmp_path: Path) -> None:
    mfptq.convert(source, tmp_path / "one", method="minmax")
    mfptq.convert(source, tmp_path / "two")
    one, two = (with_measured(read_report(tmp_path / n), measure(tmp_path / n, source)) for n in ("one", "two"))
    noted = compare(*(read_report(tmp_path / name) for name in ("one", "two")))
    found = compare(one, two)
    assert [row.name for row in found.changed] == [row.name for row in noted.changed]
    assert found.second_error == pytest.approx(noted.second_error, rel=1e-4)
    report = json.loads((tmp_path / "two" / "mfptq_report.json").read_text())
    wrong = [[*row[:2], 0.5, *row[3:]] for row in report["layers"]]  # what a report says is not what counts then
    (tmp_path / "two" / "mfptq_report.json").write_text(json.dumps({**report, "layers": wrong}))
    done = command("compare", tmp_path / "one", tmp_path / "two", "--source", source, "--json")
    assert json.loads(done.stdout)["second_error"] == pytest.approx(noted.second_error, rel=1e-4)


def test_quantiles_of_blocks() -> None:
    blocks = [0] * BINS
    blocks[8], blocks[9], blocks[12] = 50, 49, 1
    assert [quantile(blocks, share) for share in (0.5, 0.99, 1.0)] == pytest.approx([9 * STEP, 10 * STEP, 13 * STEP])
    assert Measured().relative_error == 0
    assert Measured().relative_output_error is None

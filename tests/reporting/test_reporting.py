"""Reports as pages, tables and comparisons; pages are opened in a real browser where there is one."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import mfptq
from mfptq.errors import SourceError
from mfptq.reporting.compare import compare
from mfptq.reporting.data import by_kind, csv_text, read_report
from tests.conftest import command, sampled
from tests.reporting.samples import report, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_a_conversion_leaves_a_row_for_each_layer_and_kind(moe_source: Path, tmp_path: Path) -> None:
    done = mfptq.convert(moe_source, tmp_path / "out")
    found = read_report(tmp_path / "out")
    assert sum(row.elements for row in found.layers) == sum(row.elements for row in done.patterns)
    experts = [row for row in found.layers if row.kind == "mlp.experts.*.gate_proj"]
    assert [row.layer for row in experts] == [0, 1, 2, 3]
    assert len({row.elements for row in experts}) == 1
    for pattern in done.patterns:
        errors = [row.relative_error for row in found.layers if row.pattern == pattern.pattern]
        assert min(errors) <= pattern.relative_error * 1.001
        assert max(errors) >= pattern.relative_error * 0.999
    kept = {row.pattern: row for row in found.tensors if row.action == "keep"}
    assert kept["lm_head.weight"].reason
    assert found.flagged == {}


def test_the_report_is_the_same_however_it_ran(moe_source: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("four", 4)):
        mfptq.convert(moe_source, tmp_path / name, max_workers=workers)
    one, four = ((tmp_path / name / "mfptq_report.json").read_text() for name in ("one", "four"))
    assert one == four


def test_layers_that_stand_out_come_first(tmp_path: Path) -> None:
    found = read_report(write_report(tmp_path))
    assert list(found.flagged) == ["model.language_model.layers.7.mlp.down_proj"]
    text = command("report", tmp_path).stdout
    assert "layers.7.mlp.down_proj: error 1.5" in text
    assert text.rstrip().endswith("1 layer stands out")


def test_layers_are_compared_with_those_of_their_format(source: Path, tmp_path: Path) -> None:
    mfptq.convert(source, tmp_path / "out", formats=[r"fp8-dynamic=re:.*layers\.[0-2]\.mlp\.down_proj"])
    found = read_report(tmp_path / "out")
    rows = {row.layer: row for row in found.layers if row.kind == "mlp.down_proj"}
    assert [rows[layer].is_fp8 for layer in range(4)] == [True, True, True, False]
    assert rows[3].relative_error > 2 * rows[0].relative_error, "an error that FP8 would not have"
    assert found.flagged == {}


def test_csv_has_a_line_for_each_row(tmp_path: Path) -> None:
    found = read_report(write_report(tmp_path, layers=8))
    rows = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert len(rows) == len(found.layers)
    assert [row["layer"] for row in rows if row["flagged"]] == ["7"]
    assert command("report", tmp_path, "--csv", tmp_path / "t.csv").returncode == 0
    assert (tmp_path / "t.csv").read_text() == csv_text(found)


@pytest.mark.parametrize(
    "content",
    [
        {"tool": "mfptq"},
        {"tool": "other", "layers": [], "tensors": []},
        {**report(2), "layers": [[1, 2]]},
        {**report(2), "layers": [5]},
    ],
)
def test_what_is_no_report_is_an_error(content: object, tmp_path: Path) -> None:
    (tmp_path / "mfptq_report.json").write_text(json.dumps(content))
    with pytest.raises(SourceError, match=r"mfptq_report\.json"):
        read_report(tmp_path)
    assert command("report", tmp_path / "nowhere").returncode == 3


def test_outputs_are_compared_layer_by_layer(source: Path, tmp_path: Path) -> None:
    mfptq.convert(source, tmp_path / "minmax", method="minmax", ignore=["re:.*o_proj$"])
    mfptq.convert(source, tmp_path / "search")
    found = compare(read_report(tmp_path / "minmax"), read_report(tmp_path / "search"))
    assert [(row.name, row.first is None) for row in found.treated] == [
        ("model.language_model.layers.3.self_attn.o_proj", True)
    ]
    assert all(row.change < 0 for row in found.changed)
    assert found.changed
    done = command("compare", tmp_path / "minmax", tmp_path / "search")
    assert "1 layer is quantized in one of them only" in done.stdout
    assert re.search(r"weight_global_scale: 24 of 24 differ, by up to \d\.\d+ times", done.stdout)
    same = command("compare", tmp_path / "search", tmp_path / "search").stdout
    assert "weight_global_scale: 0 of 25 differ\n" in same
    assert json.loads(command("compare", tmp_path / "search", tmp_path / "search", "--json").stdout)["changed"] == []


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("page")
    out = write_report(folder / "A <b>model</b>")
    done = command("report", out, "--html", folder / "page.html")
    assert done.returncode == 0, done.stderr
    return folder / "page.html"


def test_a_page_is_small_and_whole(page: Path) -> None:
    text = page.read_text()
    assert len(text) < 2 * 10**6
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", text)
    assert "<b>model" not in text
    assert "vision <tower>" not in text
    assert text.count("<svg") == 2


def browse(path: Path, width: int) -> tuple[str, str]:
    """Return the page as a browser has it after its scripts, and what the browser logged."""
    assert CHROMIUM is not None
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--window-size={width},900",
    ]
    done = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={path.parent / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", sampled([1280], [500]))
def test_a_page_in_a_browser(page: Path, width: int) -> None:
    """A window is 500 pixels at least; narrower ones are a frame in it."""
    probe = page.with_name("probe.html")
    script = (
        "<script>box.value='layers.7. down';box.dispatchEvent(new Event('input'));"
        "document.querySelectorAll('#layers th')[3].click();"
        "document.title='fits '+(document.documentElement.scrollWidth<=innerWidth)</script></body>"
    )
    probe.write_text(page.read_text().replace("</body>", script))
    dom, log = browse(probe, width)
    assert "CONSOLE" not in log
    assert "<title>fits true</title>" in dom
    assert '<span id="shown">1 of 400</span>' in dom


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_page_on_a_phone(page: Path) -> None:
    frame = page.with_name("frame.html")
    frame.write_text(
        f"<iframe id=f srcdoc='' width=360 height=800></iframe><script>const f=document.getElementById('f');"
        "f.onload=()=>{document.title='phone '+f.contentDocument.documentElement.scrollWidth};"
        f"f.srcdoc={json.dumps(page.read_text()).replace('</script>', '<' + chr(92) + '/script>')}</script>"
    )
    dom, log = browse(frame, 800)
    assert "CONSOLE" not in log
    found = re.search(r"<title>phone (\d+)</title>", dom)
    assert found is not None
    assert int(found[1]) <= 360


def test_sizes_and_kinds(source: Path, tmp_path: Path) -> None:
    mfptq.convert(source, tmp_path / "out")
    found = read_report(tmp_path / "out")
    kinds = {row.kind: row for row in by_kind(found)}
    down = kinds["mlp.down_proj"]
    assert (down.layers, down.source_bytes, down.output_bytes) == (4, 4 * 2 * 64 * 64, 4 * (64 * 64 // 2 + 64 * 4 + 4))
    assert down.least <= down.median <= down.largest
    with mfptq.plan(source) as plan:
        kept = sum(row.source_bytes for row in found.tensors if row.action == "keep")
        assert sum(row.source_bytes for row in kinds.values()) + kept == plan.source_bytes
        assert sum(row.output_bytes for row in kinds.values()) + kept == plan.output_bytes
    text = command("report", tmp_path / "out").stdout
    assert re.search(r"32.8 kB -> +9.23 kB +8.\d\d% +8.\d\d% +8.\d\d%  4 layers  mlp.down_proj", text)


def test_coverage_of_the_calibration_is_on_the_page(moe_source: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tests.calibration.files import calibrate, described

    made = calibrate(moe_source, tmp_path / "a.calibration.safetensors")
    mfptq.convert(moe_source, tmp_path / "out", calibration=made)
    words = ("report", tmp_path / "out", "--html", tmp_path / "page.html", "--calibration")
    assert command(*words, made).returncode == 0
    page = (tmp_path / "page.html").read_text()
    assert "<h2>Calibration coverage</h2>" in page
    other = calibrate(moe_source, tmp_path / "b.calibration.safetensors", described(dataset="other"))
    refused = command(*words, other)
    assert refused.returncode == 2
    assert "was not made with" in refused.stderr

"""The examples run as a reader would run them, in the process of the tests: torch is loaded already."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = {
    "convert_from_python.py": (["{source}", "{folder}/out"], "verified"),
    "import_scales.py": ([], "14 input scales in model.safetensors"),
    "inside_a_pipeline.py": ([], "relative error"),
    "llm_compressor_layouts.py": ([], "mfptq: the same quantized bytes for every layout"),
}
FOLDER = Path(__file__).parents[1] / "examples"


def test_every_example_is_run() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == set(EXAMPLES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, said = EXAMPLES[name]
    words = [argument.format(source=source, folder=tmp_path) for argument in arguments]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert said in capsys.readouterr().out

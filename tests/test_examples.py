"""The examples run as a reader would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {
    "convert_from_python.py": (["{source}", "{folder}/out"], "verified"),
    "import_scales.py": ([], "14 input scales in model.safetensors"),
    "inside_a_pipeline.py": ([], "relative error"),
    "llm_compressor_layouts.py": ([], "mfptq: the same quantized bytes for every layout"),
}


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example(name: str, source: Path, tmp_path: Path) -> None:
    arguments, said = EXAMPLES[name]
    words = [argument.format(source=source, folder=tmp_path) for argument in arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *words],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said in done.stdout

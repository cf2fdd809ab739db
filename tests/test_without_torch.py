"""An installation without torch does everything but what needs it, and says what to install then."""

import subprocess
import sys
from pathlib import Path

HIDDEN = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name.split(".")[0] in HIDE else find(name, *rest))
from mfptq.cli.main import run
run()
"""


def without(hidden: tuple[str, ...], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"HIDE = {hidden}{HIDDEN}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_demo_convert_and_verify_work(tmp_path: Path) -> None:
    done = without(("torch",), "demo", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    assert "verified: no fault" in done.stdout


def test_what_needs_torch_says_the_line_that_installs_it(source: Path, tmp_path: Path) -> None:
    device = without(("torch", "llvmlite"), "convert", source, tmp_path / "out")
    assert device.returncode == 2, device.stderr
    assert "pip install 'mfptq[torch]'" in device.stderr
    (tmp_path / "text.txt").write_text("text")
    output = tmp_path / "x.calibration.safetensors"
    calibrate = without(("torch",), "calibrate", source, "--dataset", tmp_path / "text.txt", "--output", output)
    assert calibrate.returncode == 2, calibrate.stderr
    assert "pip install 'mfptq[calibrate]'" in calibrate.stderr
    for done in (device, calibrate):
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_an_attribute_that_needs_torch_says_so_too() -> None:
    code = f"HIDE = ('torch',){HIDDEN}".replace(
        "from mfptq.cli.main import run\nrun()", "import mfptq; mfptq.calibrate"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: mfptq.calibrate needs torch: pip install 'mfptq[calibrate]'"
    )

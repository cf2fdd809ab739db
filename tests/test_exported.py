"""The public names: all of `__all__` is there, nothing else is, and what functions take and return is among them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mfptq
from mfptq import errors

EXPECTED = {
    "Advanced",
    "Calibration",
    "CalibrationProgress",
    "Check",
    "Decisions",
    "Description",
    "ErrorStats",
    "Estimate",
    "Evaluation",
    "EvaluationProgress",
    "Event",
    "Executed",
    "Executor",
    "Fault",
    "Finding",
    "InputScales",
    "Inspection",
    "Nvfp4Tensor",
    "Order",
    "OutputPreview",
    "Part",
    "PartReport",
    "PatternReport",
    "Plan",
    "Planned",
    "PlannedTensor",
    "Preview",
    "PushTarget",
    "RayExecutor",
    "Report",
    "ResourceKeywords",
    "Serving",
    "ShardFinished",
    "TensorSummary",
    "ThreadExecutor",
    "Verification",
    "__version__",
    "calibrate",
    "check",
    "convert",
    "dequantize_nvfp4",
    "evaluate",
    "extract_scales",
    "inspect",
    "load_calibration",
    "merge_calibrations",
    "plan",
    "quantization_config",
    "quantize_nvfp4",
    "quantize_state_dict",
    "read_input_scales",
    "verify",
}
ERRORS = {
    name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, errors.MfptqError)
}


def test_exported_names() -> None:
    assert set(mfptq.__all__) == EXPECTED | ERRORS
    assert dir(mfptq) == sorted(mfptq.__all__)


@pytest.mark.parametrize("name", mfptq.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(mfptq, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value)
        assert value.__module__.startswith("mfptq.")


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(mfptq.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported == mfptq._HOMES


def test_other_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="no attribute 'HubOptions'"):
        _ = mfptq.HubOptions


def test_names_are_imported_when_they_are_asked_for() -> None:
    code = "import sys, mfptq; mfptq.ScaleError; print([n for n in ('numpy', 'torch', 'llvmlite') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(name for name in EXPECTED if inspect.isfunction(getattr(mfptq, name))))
def test_what_functions_take_and_return_is_exported(name: str) -> None:
    """A class of this package in the annotations of a public function is public itself."""
    function = getattr(mfptq, name)
    words = {word for text in function.__annotations__.values() for word in re.findall(r"[A-Z]\w+", str(text))}
    found = {word: vars(sys.modules[function.__module__]).get(word) for word in words}
    ours = {word for word, value in found.items() if inspect.isclass(value) and value.__module__.startswith("mfptq.")}
    assert ours <= set(mfptq.__all__)


def test_keywords_of_resources_are_those_of_the_class_that_holds_them(source: Path, tmp_path: Path) -> None:
    from mfptq.execution.prepare import Resources

    kinds = {each.name: each.type for each in dataclasses.fields(Resources)}
    assert {name: kind.__forward_arg__ for name, kind in mfptq.ResourceKeywords.__annotations__.items()} == kinds
    with mfptq.plan(source) as plan, pytest.raises(TypeError, match="max_memry"):
        plan.run(tmp_path / "out", max_memry="1GB")  # type: ignore[call-arg]

"""Convert Hugging Face checkpoints to NVFP4 without building the model.

>>> import mfptq
>>> report = mfptq.convert("Qwen/Qwen3.5-27B", "Qwen3.5-27B-NVFP4")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .calibration.extract import extract_scales
    from .calibration.file import Description
    from .calibration.merge import merge_calibrations
    from .calibration.reading import Calibration, load_calibration
    from .checking import Check, check
    from .cluster.ray_executor import RayExecutor
    from .conversion import Plan, convert, plan
    from .engines.findings import Finding
    from .engines.serving import Serving
    from .errors import (
        DestinationError,
        DestinationExistsError,
        DestinationLockedError,
        HeaderError,
        HubError,
        IndexMismatchError,
        MemoryBudgetError,
        MfptqError,
        NonFiniteWeightError,
        PlanMismatchError,
        RuleError,
        ScaleError,
        SmoothingError,
        SourceChangedError,
        SourceError,
        StorageError,
        UnsafePathError,
        UnsupportedTensorError,
        UsageError,
        VerificationError,
    )  # fmt: skip
    from .execution.events import Advanced, Event, Planned, ShardFinished
    from .execution.executors import Executed, Executor, Order, ThreadExecutor
    from .execution.partial_run import PartReport
    from .execution.prepare import ResourceKeywords
    from .execution.preview import OutputPreview, Preview
    from .inspection import Inspection, TensorSummary, inspect
    from .kernels import ErrorStats
    from .observation.calibrate import calibrate
    from .observation.calibration_pass import CalibrationProgress
    from .observation.evaluate import Evaluation, EvaluationProgress, evaluate
    from .output.estimates import Estimate
    from .output.fault import Fault
    from .output.publish import PushTarget
    from .output.report import PatternReport, Report
    from .planning.parts import Part
    from .planning.plan import PlannedTensor
    from .planning.quantization_config import quantization_config
    from .planning.settings import Decisions
    from .scales.input_scales import InputScales
    from .scales.reading import read_input_scales
    from .tensors import Nvfp4Tensor, dequantize_nvfp4, quantize_nvfp4, quantize_state_dict
    from .verification import Verification, verify

_EXPORTS = {
    "calibration.extract": "extract_scales",
    "calibration.file": "Description",
    "calibration.merge": "merge_calibrations",
    "calibration.reading": "Calibration load_calibration",
    "checking": "Check check",
    "cluster.ray_executor": "RayExecutor",
    "conversion": "Plan convert plan",
    "engines.findings": "Finding",
    "engines.serving": "Serving",
    "errors": "DestinationError DestinationExistsError DestinationLockedError HeaderError HubError IndexMismatchError "
    "MemoryBudgetError MfptqError NonFiniteWeightError PlanMismatchError RuleError ScaleError SmoothingError SourceChangedError "
    "SourceError StorageError UnsafePathError UnsupportedTensorError UsageError VerificationError",
    "execution.events": "Advanced Event Planned ShardFinished",
    "execution.executors": "Executed Executor Order ThreadExecutor",
    "execution.partial_run": "PartReport",
    "execution.prepare": "ResourceKeywords",
    "execution.preview": "OutputPreview Preview",
    "inspection": "Inspection TensorSummary inspect",
    "kernels": "ErrorStats",
    "observation.calibrate": "calibrate",
    "observation.calibration_pass": "CalibrationProgress",
    "output.estimates": "Estimate",
    "observation.evaluate": "Evaluation EvaluationProgress evaluate",
    "output.publish": "PushTarget",
    "output.report": "PatternReport Report",
    "planning.parts": "Part",
    "planning.plan": "PlannedTensor",
    "planning.quantization_config": "quantization_config",
    "planning.settings": "Decisions",
    "scales.input_scales": "InputScales",
    "scales.reading": "read_input_scales",
    "tensors": "Nvfp4Tensor dequantize_nvfp4 quantize_nvfp4 quantize_state_dict",
    "output.fault": "Fault",
    "verification": "Verification verify",
}
_EXTRAS = {"torch", "ray"}  # packages that a light installation lacks; extras have their names
_HOMES = {name: module for module, names in _EXPORTS.items() for name in names.split()}
__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604 - names, every one of them in _HOMES

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `mfptq --help` needs neither numpy nor LLVM."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mfptq' has no attribute {name!r}")
    home = _HOMES[name]
    try:
        value = getattr(importlib.import_module(f".{home}", __name__), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        extra = "calibrate" if home.startswith("observation.") else missing
        text = f"mfptq.{name} needs {missing}: pip install 'mfptq[{extra}]'"
        raise ModuleNotFoundError(text, name=error.name) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

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
    from .calibration.merge import merge_calibrations
    from .calibration.reading import load_calibration
    from .checkpoint.folder import Checkpoint
    from .checkpoint.hub import HubOptions, open_checkpoint
    from .conversion import convert, plan
    from .errors import MfptqError
    from .execution.events import Advanced, Planned, ShardFinished
    from .inspection import inspect
    from .output.report import Report
    from .planning.plan import Plan
    from .planning.rules import Rules
    from .tensors import Nvfp4Tensor, dequantize_nvfp4, quantize_nvfp4, quantize_state_dict
    from .verification import Verification, verify

_HOMES = {
    "Checkpoint": "checkpoint.folder", "HubOptions": "checkpoint.hub", "MfptqError": "errors", "Nvfp4Tensor": "tensors",
    "Plan": "planning.plan", "Advanced": "execution.events", "Planned": "execution.events", "ShardFinished": "execution.events", "Report": "output.report", "Rules": "planning.rules",
    "Verification": "verification", "convert": "conversion", "dequantize_nvfp4": "tensors", "extract_scales": "calibration.extract",
    "inspect": "inspection", "load_calibration": "calibration.reading", "merge_calibrations": "calibration.merge",
    "open_checkpoint": "checkpoint.hub", "plan": "conversion", "quantize_nvfp4": "tensors",
    "quantize_state_dict": "tensors", "verify": "verification",
}  # fmt: skip
__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604 - names, every one of them in _HOMES

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `mfptq --help` needs neither numpy nor LLVM."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mfptq' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

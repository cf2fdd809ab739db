"""Make a small synthetic checkpoint in the layout of Qwen3.5 with numpy alone, random but complete: engines load it.

Called by `mfptq demo`, by tests and benchmarks.
"""

from .companions import DemoShape
from .weights import demo_tensors, write_demo

__all__ = ["DemoShape", "demo_tensors", "write_demo"]

"""What engines' own code needs to run beside the libraries of the tests."""

import importlib.util

import pytest


@pytest.fixture(autouse=True)
def plain_llvmlite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let llvmlite's library, which numba loads, have no `__dict__`: it makes one of any name, and vLLM 0.32 reads that."""
    if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("llvmlite") is None:
        return
    from llvmlite.binding import ffi

    made = ffi._lib_wrapper.__getattr__

    def named(self: object, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return made(self, name)

    monkeypatch.setattr(ffi._lib_wrapper, "__getattr__", named)

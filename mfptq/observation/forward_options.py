"""Check the keywords that `calibrate` and `evaluate` have in common: how a model is run over text.

Defaults and descriptions are those of the two functions. Imports nothing heavy, so that a wrong keyword is answered at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError, quote
from ..sizes import parse_size

DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardOptions:
    """How much text is run, and in what."""

    samples: int
    max_seq_length: int
    device: str
    max_memory: str | int | None
    dtype: str

    def __post_init__(self) -> None:
        for name in ("samples", "max_seq_length"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {quote(self.dtype)} is unknown, expected one of {', '.join(DTYPES)}")

    @property
    def budget(self) -> int | None:
        """The ceiling for the process, in bytes; None where it is what the machine has."""
        return None if self.max_memory is None else parse_size(self.max_memory)

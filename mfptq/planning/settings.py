"""What decides the output's bytes, besides the source: rules, method and scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import UsageError, quote
from ..kernels.calibrated import CALIBRATED_METHODS
from .quantization_config import Scheme
from .rules import Rules

PLAIN_METHODS = ("search", "minmax")
METHODS = ("auto", *PLAIN_METHODS, *CALIBRATED_METHODS)
SCHEMES = ("NVFP4", "NVFP4A16")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user asked for; `method` and `scheme` None mean the best that the given statistics allow."""

    rules: Rules = field(default_factory=Rules)
    method: str | None = None
    scheme: Scheme | None = None

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in METHODS:
            raise UsageError(f"method {quote(self.method)} is unknown, expected one of {', '.join(METHODS)}")
        if self.scheme is not None and self.scheme not in SCHEMES:
            raise UsageError(f"scheme {quote(self.scheme)} is unknown, expected one of {', '.join(SCHEMES)}")

    def resolve_method(self, *, calibrated: bool) -> str:
        """Return the method; `auto` remains only where a calibration file is there to decide."""
        if self.method in CALIBRATED_METHODS and not calibrated:
            raise UsageError(f"method {self.method} needs --calibration; without it choose search or minmax")
        if self.method in (None, "auto"):
            return "auto" if calibrated else "search"
        return str(self.method)

    def resolve_scheme(self, *, with_input: bool) -> Scheme:
        """Return the scheme; `with_input` says whether input scales are given."""
        if self.scheme == "NVFP4" and not with_input:
            raise UsageError(
                "scheme NVFP4 (W4A4) needs --input-scales, --calibration or --like; without choose NVFP4A16"
            )
        if self.scheme == "NVFP4A16" and with_input:
            raise UsageError("scheme NVFP4A16 is weight-only and takes no --input-scales")
        return self.scheme or ("NVFP4" if with_input else "NVFP4A16")


def unreached(method: str, methods: Mapping[str, int]) -> tuple[str, ...]:
    """Return a warning if a method that needs statistics could not be had for some weights."""
    searched = methods.get("search", 0)
    if method in PLAIN_METHODS or not searched or len(methods) == 1:
        return ()
    total = sum(methods.values())
    return (f"{searched} of {total} weights, of experts that no text reached, have no statistics: search instead",)

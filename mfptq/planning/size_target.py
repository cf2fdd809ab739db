"""Check the size that an output shall have: in bits for each quantized weight, or in bytes of its files.

Called by `settings`, `conversion` and the command line; `execution.size_target` finds the formats for it. Reads no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import UsageError, quote
from ..sizes import parse_size, size_text
from ..storage.files import expanded
from .formats import KEEP
from .recipes import TARGET_KEYS

if TYPE_CHECKING:
    from .settings import Decisions

RAISED: Final = ("fp8-dynamic", KEEP)  # what a layer can become instead of the base format
MAX_BITS: Final = 32.0


@dataclass(frozen=True, slots=True)
class SizeTarget:
    """A size to aim at and never to exceed: `bits` for each weight, or `nbytes` of safetensors files.

    `formats` are those that layers may have besides the base format.
    """

    bits: float | None
    nbytes: int | None
    formats: tuple[str, ...] = RAISED

    def __str__(self) -> str:
        return f"{self.bits:g} bits per weight" if self.bits is not None else size_text(self.nbytes or 0)


def with_errors_beside(decisions: Decisions, destination: str | Path) -> Decisions:
    """Return decisions with a file beside the output that keeps the errors of formats, unless they name one."""
    path = expanded(destination).absolute()
    own = decisions.get("format_errors") or path.with_name(f"{path.name}.format-errors.json")
    return {**decisions, "format_errors": own}


def size_target(decisions: Mapping[str, Any]) -> SizeTarget | None:
    """Return the size that decisions aim at; raises UsageError for two of them, or for what is no size."""
    given = [key for key in TARGET_KEYS if decisions.get(key) is not None]
    allowed = decisions.get("target_formats")
    if not given:
        if allowed is not None:
            raise UsageError(
                "target_formats says what a target may use: give target_bits or target_size, or leave it out"
            )
        return None
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are mutually exclusive: both say the size")
    bits, size = decisions.get("target_bits"), decisions.get("target_size")
    if bits is not None and not 0 < bits <= MAX_BITS:
        raise UsageError(f"target_bits is {bits}, expected a number of bits up to {MAX_BITS:g}, as 5.2")
    return SizeTarget(
        None if bits is None else float(bits), None if size is None else parse_size(size), _formats(allowed)
    )


def _formats(given: Iterable[str] | str | None) -> tuple[str, ...]:
    if given is None:
        return RAISED
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if name not in RAISED:
            raise UsageError(f"target_formats names {quote(name)}, expected some of {', '.join(RAISED)}")
    return tuple(name for name in RAISED if name in names)

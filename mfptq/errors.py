"""Everything that can go wrong, by whose fault it is.

    MfptqError
    |- UsageError 2            RuleError
    |- SourceError 3           HeaderError, IndexMismatchError, UnsafePathError,
    |                          UnsupportedTensorError, NonFiniteWeightError, SmoothingError, SourceChangedError
    |- ScaleError 4
    |- DestinationError 5      DestinationExistsError, DestinationLockedError, PlanMismatchError, StorageError
    |- VerificationError 6
    |- HubError 7
    `- MemoryBudgetError 8

The number is the exit code of the command line. Messages are one line: what, where, expected, got, what to do.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Collection, Iterable
from itertools import islice
from typing import ClassVar

MAX_QUOTED = 200
MAX_LISTED = 3


def printable(name: str) -> str:
    """Return an untrusted name for a table: control characters never reach the terminal raw."""
    return name if name.isprintable() else ascii(name)


def quote(name: object) -> str:
    """Return untrusted text as one printable line: `repr` keeps control characters off the terminal."""
    text = ascii(str(name)) if not str(name).isprintable() else repr(str(name))
    return text if len(text) <= MAX_QUOTED else f"{text[: MAX_QUOTED - 4]}...{text[-1]}"


def listed(names: Collection[object]) -> str:
    """Return the first few names, quoted, and ", ..." where there are more."""
    return ", ".join(map(quote, islice(names, MAX_LISTED))) + (", ..." if len(names) > MAX_LISTED else "")


def counted(number: int, one: str, many: str) -> str:
    """Return a number with the words that agree with it: "1 module is", "2 modules are"."""
    return f"{number} {one if number == 1 else many}"


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """Return "; did you mean search?" with the name that is nearest to what was given, or "" where none is near."""
    near = difflib.get_close_matches(given, list(names), n=1)
    return f"; did you mean {printable(near[0])}?" if near else ""


class MfptqError(Exception):
    """Base of every error that mfptq raises on purpose; `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class UsageError(MfptqError):
    """The call itself cannot be carried out as given."""

    exit_code = 2


class RuleError(UsageError):
    """An ignore or target pattern is invalid, matches nothing, or splits a fused group."""


class SourceError(MfptqError):
    """The source checkpoint cannot be converted."""

    exit_code = 3


class HeaderError(SourceError):
    """The bytes of a shard break a rule of the safetensors format."""


class IndexMismatchError(SourceError):
    """Index, folder and shards disagree about which tensor is where."""


class UnsafePathError(SourceError):
    """A name in the source would lead outside of the source or of the destination."""


class UnsupportedTensorError(SourceError):
    """A weight is to be quantized whose shape or dtype the format cannot hold."""


class NonFiniteWeightError(SourceError):
    """A weight that is to be quantized holds NaN or infinity."""


class SmoothingError(SourceError):
    """A value times its smoothing factor is none that its dtype holds."""


class SourceChangedError(SourceError):
    """The source changed between planning and reading."""


class ScaleError(MfptqError):
    """Input scales or calibration statistics are unusable."""

    exit_code = 4


class DestinationError(MfptqError):
    """The destination cannot be written."""

    exit_code = 5


class DestinationExistsError(DestinationError):
    """The destination holds files that are not an unfinished conversion of ours."""


class DestinationLockedError(DestinationError):
    """Another run is writing this destination."""


class PlanMismatchError(DestinationError):
    """The destination holds an unfinished conversion with other settings or of another source."""


class StorageError(DestinationError):
    """The operating system refused a read or a write; `errno` says why."""

    def __init__(self, action: str, path: object, cause: OSError) -> None:
        self.errno = cause.errno
        code = errno.errorcode.get(cause.errno or 0, "error")
        refused = self.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        remedy = "ask for the permission, or name another folder" if refused else "rerun the same command to resume"
        if self.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            remedy = "name a file in a folder that exists"
        super().__init__(f"cannot {action} {quote(path)}: {cause.strerror or cause} ({code}); {remedy}")


class VerificationError(MfptqError):
    """A finished checkpoint has faults."""

    exit_code = 6


class HubError(MfptqError):
    """The Hub refused, or could not be reached."""

    exit_code = 7


class MemoryBudgetError(MfptqError):
    """The work does not fit into the memory that was allowed."""

    exit_code = 8

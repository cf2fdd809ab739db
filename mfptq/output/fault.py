"""Say what is wrong with an output: the one form of every finding of `structure`, `manifest` and `verification`."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import quote


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is wrong with a tensor, module or fused group, or with a file: each "" where it concerns none.

    `what` says it, as the rest of a sentence that begins with them.
    """

    tensor: str
    file: str
    what: str

    def __str__(self) -> str:
        subject = " in ".join(quote(name) for name in (self.tensor, self.file) if name)
        return f"{subject} {self.what}".lstrip()

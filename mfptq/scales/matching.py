"""Match names that another file wrote to the source's modules, with one set of messages for every such file.

Called by `scales.assignment`, `scales.sibling` and `calibration.reading`. A name that fits no module is never passed over:
it may belong to another model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..errors import ScaleError, counted, listed
from ..names.bridge import Bridge, bridge_names
from ..names.engine import experts_parent

CALIBRATE = "calibrate these modules too, or ignore them"


def match_names(
    origin: str, written: Iterable[str], modules: Collection[str], *, without_tensor: Collection[str] = ()
) -> Bridge:
    """Return which written name each module of the source goes by; `origin` begins the message of an error.

    `without_tensor` are last parts of names that need not belong to a stored tensor. Raises ScaleError for names that
    belong to no module or could belong to several.
    """
    bridge = bridge_names(written, modules)
    ambiguous, unknown = (
        [name for name in names if name.rpartition(".")[2] not in without_tensor]
        for names in (bridge.ambiguous, bridge.unknown)
    )
    if ambiguous:
        words = "name could belong to several modules", "names could belong to several modules"
        raise names_error(origin, ambiguous, words, "write the modules' full names")
    if unknown:
        words = "name belongs to no module of the source", "names belong to no module of the source"
        raise names_error(origin, unknown, words, f"is it of another model? The source has {listed(modules)}")
    return bridge


def check_complete(origin: str, modules: Iterable[str], known: Collection[str]) -> None:
    """Raise ScaleError if modules of the source are not among the `known`; routed experts may be: no text reached them."""
    missing = [name for name in modules if name not in known and experts_parent(name) is None]
    if missing:
        raise names_error(origin, missing, ("module is missing", "modules are missing"), CALIBRATE)


def names_error(origin: str, names: Collection[str], words: tuple[str, str], advice: str) -> ScaleError:
    """Return the error that counts and names what is wrong; `words` follow the number, one for 1 and one for more."""
    return ScaleError(f"{origin}: {counted(len(names), *words)}: {listed(names)}; {advice}")

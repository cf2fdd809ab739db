"""Faults by the thousand, each followed by a rerun that must give the undisturbed bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from tests.faults.faulty import (
    ERRNOS,
    KILLED,
    WATCHED,
    Event,
    Fault,
    FaultyFiles,
    cut_power,
    exhaust,
    fail,
    kill,
    kill_in_the_middle,
    restore,
    short,
    snapshot,
)
from tests.faults.warm import Layout, Tally, Workplace, child, here, workplace

# A phase is what the output holds when the run begins: nothing; what a killed run left; a finished conversion; what a killed
# conversion of another checkpoint left. The last two need --overwrite.
OVERWRITING = ("overwriting", "replacing")
Spread = Callable[[int], Iterable[int]]


def every(total: int) -> Iterable[int]:
    """Return all of 1..total."""
    return range(1, total + 1)


def spread(count: int) -> Spread:
    """Return a choice of about `count` of 1..total, the first and the last among them."""
    return lambda total: sorted({1 + round(i * (total - 1) / max(count - 1, 1)) for i in range(count)})


def middle(total: int) -> Iterable[int]:
    """Return the one in the middle of 1..total."""
    return [(total + 1) // 2]


def _count(work: Workplace, roots: tuple[Path, ...], calls: frozenset[str] = KILLED, **options: bool) -> list[str]:
    """Return the calls that a run makes, by letting it run to its end; none if nothing is left to do."""
    files = FaultyFiles(roots, calls)
    ended = here(lambda: _convert(files, work, roots[0].parent, **options))
    if "finished conversion" in ended.text:
        return []
    assert ended.code == 0, ended
    return files.counted


def _begun(work: Workplace, phase: str, number: int) -> Path:
    """Return a place whose output is what a phase begins with."""
    place = work.new()
    if phase == "resumed":
        _killed(work, place, number, kill)
    elif phase == "overwriting":
        shutil.copytree(work.folder / "expected", place / "out")
    elif phase == "replacing":
        _killed(work, place, number, kill, source=work.other)
    return place


def _copied(work: Workplace, begun: Path) -> Path:
    """Return a copy of such a place."""
    return Path(shutil.copytree(begun, work.new(), dirs_exist_ok=True))


def _killed(work: Workplace, place: Path, number: int, fault: Fault, **options: object) -> int:
    files = FaultyFiles((place / "out",), at=number.__eq__, fault=fault)
    return child(lambda: _convert(files, work, place, **options), work.log()).code


def _convert(files: FaultyFiles, work: Workplace, place: Path, **options: object) -> None:
    """Convert while some calls meet a fault."""
    with files:
        work.convert(place / "out", **options)


def kill_points(layouts: Iterable[Layout], choose: Spread, between: Spread) -> Tally:
    """Kill at chosen calls of a fresh run, of runs resumed after kills at `between`, and of an overwriting run."""
    tally = Tally()
    for layout in layouts:
        work = workplace(layout)
        fresh = len(_count(work, (work.new() / "out",)))
        resumed = [("resumed", number) for number in between(fresh)]
        for phase, first in (("fresh", 0), *resumed, *_overwriting(layout, fresh)):
            _kill_phase(tally, work, (phase, first), choose)
        work.check_source(tally)
    return tally


def _overwriting(layout: Layout, calls: int) -> list[tuple[str, int]]:
    """Return the phases that overwrite; none in parts, which leave alone what a run that was overwriting has left."""
    return [] if "in_parts" in layout.options else [("overwriting", 0), ("replacing", calls - 20)]


def _kill_phase(tally: Tally, work: Workplace, start: tuple[str, int], choose: Spread) -> None:
    phase, first = start
    options = {"overwrite": True} if phase in OVERWRITING else {}
    begun = _begun(work, phase, first)
    calls = _count(work, (_copied(work, begun) / "out",), **options)
    for number in choose(len(calls)) if calls else ():
        # After any other call is before the next, but a write may be done by half.
        for fault in (kill, kill_in_the_middle) if calls[number - 1] == "pwrite" else (kill,):
            place = _copied(work, begun)
            what = f"{work.layout.name}, {phase} {first}, {fault.__name__} {number} of {len(calls)}"
            code = _killed(work, place, number, fault, **options)
            tally.check(code in (-signal.SIGKILL, 0), f"{what}: ended with {code}")
            tally.tried[f"kill, {phase}"] += code == -signal.SIGKILL
            if phase == "replacing":
                work.check_rerun(tally, place, what, overwrite=True)
            else:
                work.check_rerun(tally, place, what)


def storage_errors(layouts: Iterable[Layout], choose: Spread, *, lasting: bool, errnos: int | None = None) -> Tally:
    """Fail the Nth of each call with each errno, or the first few; with `lasting`, all later ones too."""
    tally = Tally()
    for layout in layouts:
        work = workplace(layout)
        totals = Counter(_count(work, (work.new() / "out", work.source), frozenset(ERRNOS)))
        for call, codes in ERRNOS.items():
            for code in codes[:errnos]:
                for number in choose(totals[call]):
                    _storage_error(tally, work, (call, code, number), lasting=lasting)
        work.check_source(tally)
    return tally


def _storage_error(tally: Tally, work: Workplace, fault: tuple[str, int, int], *, lasting: bool) -> None:
    call, code, number = fault
    place = work.new()
    what = f"{work.layout.name}, {call} {os.strerror(code)} at {number}"

    at = number.__le__ if lasting else number.__eq__
    files = FaultyFiles((place / "out", work.source), frozenset({call}), at, fail(code))
    ended = child(lambda: _convert(files, work, place), work.log())
    tally.tried[f"{call}, {'from then on' if lasting else 'once'}"] += 1
    # A file of the source that may not be opened is the source's fault: 3.
    unread = ended.code == 3 and ended.text.startswith("SourceError: cannot ") and str(work.source) in ended.text
    tally.check(ended.code in (0, 5) or unread, f"{what}: ended with {ended.code}: {ended.text}")
    if ended.code:
        tally.check(ended.text.count("\n") == 0, f"{what}: more than one line: {ended.text}")
        left = list((place / "out").rglob("*.partial")) if call != "unlink" and not lasting else []
        tally.check(not left, f"{what}: left {left}")
    if ended.code == 0 and (place / "out" / "config.json").exists():
        work_left = place / "out" / ".mfptq"
        shutil.rmtree(work_left, ignore_errors=True)
    work.check_rerun(tally, place, what)


def short_calls(layouts: Iterable[Layout]) -> Tally:
    """let every read and write do half of what it was asked: the run must not notice."""
    tally = Tally()
    for layout in layouts:
        work = workplace(layout)
        for call in ("pwrite", "preadv"):
            place = work.new()
            files = FaultyFiles((place / "out", work.source), frozenset({call}), lambda _n: True, short)
            ended = here(partial(_convert, files, work, place))
            tally.tried[f"short {call}"] += 1
            tally.check(ended.code == 0, f"{layout.name}, short {call}: ended with {ended.code}: {ended.text}")
            work.check_rerun(tally, place, f"{layout.name}, short {call}")
    return tally


def memory_errors(layouts: Iterable[Layout], choose: Spread) -> Tally:
    """Raise MemoryError at the Nth file call, of any kind: the run says so, and a rerun finishes it."""
    tally = Tally()
    for layout in layouts:
        work = workplace(layout)
        calls = WATCHED - {"close", "fstat"}
        total = len(_count(work, (work.new() / "out", work.source), calls))
        for number in choose(total):
            place = work.new()
            what = f"{layout.name}, no memory at call {number}"
            files = FaultyFiles((place / "out", work.source), calls, number.__eq__, exhaust)
            ended = child(partial(_convert, files, work, place), work.log())
            tally.tried["memory"] += 1
            tally.check(ended.code in (0, 8), f"{what}: ended with {ended.code}: {ended.text}")
            work.check_rerun(tally, place, what)
    return tally


def power_cuts(layouts: Iterable[Layout], choose: Spread, seeds: int, *, unsynced: bool = False) -> Tally:
    """Rebuild what a power cut may leave after chosen calls: all unsynced changes, none, or a random part.

    With `unsynced`, as if nothing had ever been synced: a campaign that then finds nothing is worth nothing.
    """
    tally = Tally()
    for layout in layouts:
        work = workplace(layout)
        fresh = len(_count(work, (work.new() / "out",)))
        for phase, first in (("fresh", 0), ("resumed", fresh // 2), *_overwriting(layout, fresh)):
            place = _begun(work, phase, first)
            before = snapshot(place)
            events = _traced(work, place, overwrite=phase in OVERWRITING)
            events = [event for event in events if not (unsynced and event.kind in ("sync", "syncdir"))]
            for number in choose(len(events)):
                for seed in range(seeds):
                    keep = (0.0, 1.0, 0.5, 0.8, 0.2)[seed % 5]
                    state = cut_power(before, events[:number], random.Random(f"{seed} {number}"), keep)
                    what = f"{layout.name}, {phase}, power cut after {number} of {len(events)}, seed {seed}"
                    new = work.new()
                    restore(state, place, new)
                    options = {"overwrite": True} if phase == "replacing" else {}
                    work.check_rerun(tally, new, what, **options)
                    tally.tried[f"power cut, {phase}"] += 1
    return tally


def _traced(work: Workplace, place: Path, *, overwrite: bool) -> list[Event]:
    files = FaultyFiles((place,), tracing=True)
    ended = here(lambda: _convert(files, work, place, overwrite=overwrite))
    assert ended.code == 0, ended
    return files.events

"""Errors and kills that strace injects into a whole process: below Python, at the kernel's own boundary."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

from tests.faults.warm import LAYOUTS, Tally, Workplace, workplace

_READ = "preadv,preadv2"  # which of the two an interpreter calls depends on its build
# Calls that nothing but a conversion's reading and writing makes.
_ERRORS = {"pwrite64": "ENOSPC", "fsync": "EIO", "rename": "EIO", _READ: "EIO",
           "fallocate": "ENOSPC", "ftruncate": "EFBIG", "unlinkat": "EACCES"}  # fmt: skip
_INTERRUPTIBLE = ("pwrite64", "fsync", "ftruncate", _READ)
_COMMAND = [sys.executable, "-c", "from mfptq.cli.main import run; run()", "convert", "--max-workers", "1", "-q"]


def is_available() -> bool:
    """Return whether strace is here and may trace."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-f", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode == 0


def _injections(numbers: int) -> Iterator[tuple[str, list[str]]]:
    """Yield what is injected, and strace's options."""
    calls = list(_ERRORS) if numbers > 1 else ["pwrite64"]
    for call, error in ((call, _ERRORS[call]) for call in calls):
        for number in (1, 3, 7, 12, 20, 30)[:numbers]:
            for what in (f"error={error}", "signal=KILL", *(["error=EINTR"] if call in _INTERRUPTIBLE else [])):
                yield f"{call} {what}", ["-e", f"trace={call}", "-e", f"inject={call}:{what}:when={number}"]


def strace_faults(numbers: int) -> Tally:
    """Inject each fault at some numbers of each call, then let a rerun finish."""
    tally = Tally()
    if not is_available():
        tally.notes["strace"] = "not available"
        return tally
    work = workplace(LAYOUTS[1])
    for what, options in _injections(numbers):
        _inject(tally, work, (what, options))
    for what in (what for what, _ in _injections(numbers) if "KILL" not in what):
        tally.check(tally.tried[f"strace, {what}"] > 0, f"{what}: no such call was made")
    return tally


def _inject(tally: Tally, work: Workplace, injection: tuple[str, list[str]]) -> None:
    what, options = injection
    place = work.folder / "target"
    place.mkdir()
    log = work.folder / "strace"
    trace = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", str(log), *options]
    command = [*trace, *_COMMAND, str(work.source), str(place / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    hit = "INJECTED" in log.read_text(errors="replace") or done.returncode < 0
    tally.tried["kill, by strace" if "KILL" in what else f"strace, {what}"] += hit
    killed = done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    tally.check(killed or done.returncode in (0, 5), f"{what}: ended with {done.returncode}: {done.stderr[-500:]}")
    tally.check("Traceback" not in done.stderr, f"{what}: {done.stderr[-500:]}")
    work.check_rerun(tally, place, f"strace {what}")

"""All faults, exhaustively, and the table of figures: `python -m tests.faults.exhaustive`, about ten minutes on 2 cores.

`--part NAME` runs one part and prints what it found as JSON. Results are kept for as long as the package and these tests
are what they were, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.faults.campaigns import (
    every,
    kill_points,
    memory_errors,
    middle,
    power_cuts,
    short_calls,
    spread,
    storage_errors,
)
from tests.faults.conversions import flipped_outputs, malformed_checkpoints, random_conversions
from tests.faults.malformed import fuzz, malformed_headers
from tests.faults.traced import strace_faults
from tests.faults.warm import IN_PARTS, LAYOUTS, Tally, say

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "reliability-figures.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
FUZZ_RUNS = 5_250_000
_PARSER = {"header", "strict_json", "errors", "limits", "malformed", "fuzz_header"}
Part = Callable[[], Tally]


def _atheris(seed: int) -> Tally:
    """Fuzz the header parser under atheris; libFuzzer's own counters are the result."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as corpus:
        command = [sys.executable, "-m", "tests.faults.fuzz_header", str(FUZZ_RUNS), str(seed), corpus]
        done = subprocess.run(command, capture_output=True, text=True, cwd=corpus, check=False, env=_environment())
    found = {name: int(value) for name, value in re.findall(r"stat::(\w+):\s+(\d+)", done.stderr)}
    tally.tried["fuzz inputs, guided by coverage (atheris)"] = found.get("number_of_executed_units", 0)
    tally.notes = {
        key: found[key] for key in ("peak_rss_mb", "slowest_unit_time_sec", "new_units_added") if key in found
    }
    tally.check(done.returncode == 0 and found, done.stderr[-2000:])
    return tally


def parts() -> dict[str, Part]:
    """Return the whole campaigns by name."""
    found: dict[str, Part] = {}
    for number, layout in enumerate(LAYOUTS):
        choose = every if number < 4 else spread(25)
        found[f"kill {number}"] = partial(kill_points, [layout], choose, lambda total: (total // 3, 2 * total // 3))
    if importlib.util.find_spec("atheris"):
        found["atheris 1"] = lambda: _atheris(1)
        found["atheris 2"] = lambda: _atheris(2)
    found["fuzz"] = lambda: fuzz(1_000_000, 3)
    for number, layout in enumerate(LAYOUTS[:2]):
        found[f"errors once {number}"] = lambda layout=layout: storage_errors([layout], spread(12), lasting=False)
        found[f"errors lasting {number}"] = lambda layout=layout: storage_errors([layout], spread(4), lasting=True)
        found[f"power {number}"] = lambda layout=layout: power_cuts([layout], spread(40), 3)
        found[f"conversions {number}"] = lambda number=number: random_conversions(500, number)
    found["kill in parts"] = lambda: kill_points([IN_PARTS], every, middle)
    found["power in parts"] = lambda: power_cuts([IN_PARTS], spread(40), 3)
    found["strace"] = lambda: strace_faults(2)
    found["malformed"] = malformed_checkpoints
    found["headers"] = malformed_headers
    found["flips"] = lambda: flipped_outputs(4000, 1)
    found["memory"] = lambda: memory_errors(LAYOUTS[:1], every)
    found["short"] = lambda: short_calls(LAYOUTS)
    return found


# Small choices of the same on models of one layer, for every run of the tests.
THREE_SHARDS, ONE_FILE, EXPERTS, *_, LARGER, PARTS = (
    replace(layout, shape=replace(layout.shape, layers=1)) for layout in (*LAYOUTS, IN_PARTS)
)
SAMPLES: Mapping[str, Part] = {
    "kills": lambda: kill_points([THREE_SHARDS, EXPERTS], spread(3), middle),
    "parts": lambda: kill_points([PARTS], spread(6), middle),
    "parts power": lambda: power_cuts([PARTS], spread(4), 2),
    "errors": lambda: storage_errors([THREE_SHARDS], middle, lasting=False),
    "lasting": lambda: storage_errors([ONE_FILE], middle, lasting=True, errnos=1),
    "power": lambda: power_cuts([THREE_SHARDS, LARGER], spread(4), 2),
    "unsynced": lambda: power_cuts([THREE_SHARDS], spread(6), 2, unsynced=True),
    "memory": lambda: memory_errors([THREE_SHARDS], spread(10)),
    "short": lambda: short_calls([THREE_SHARDS, ONE_FILE]),
    "conversions": lambda: random_conversions(12, 7),
    "flips": lambda: flipped_outputs(80, 2),
    "headers": malformed_headers,
    "fuzz": lambda: fuzz(20_000, 4),
    "strace": lambda: strace_faults(1),
}


@contextmanager
def sampling() -> Iterator[Callable[[str], dict]]:
    """Lend a function that runs one of the samples: all in one process, apart from the caller's."""
    command = [sys.executable, "-m", "tests.faults.exhaustive", "--samples"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, bufsize=1, cwd=ROOT, env=_environment()
    ) as process:

        def run(name: str) -> dict:
            print(name, file=process.stdin)
            return json.loads(process.stdout.readline())

        yield run


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def _digest(name: str) -> str:
    """Return what the result of a part depends on: the parser alone, or the whole package and how it was tested."""
    files = sorted([*(ROOT / "mfptq").rglob("*.py"), *(ROOT / "tests" / "faults").glob("[!te]*.py")])
    if name.startswith(("atheris", "fuzz", "headers")):
        files = [path for path in files if path.stem in _PARSER]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def run_part(name: str) -> str:
    """Run one part in a process of its own and return what it printed."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "tests.faults.exhaustive", "--part", name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=_environment())
    if done.returncode:
        raise RuntimeError(f"part {name} ended with {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    say(
        f"{name}: {sum(found['tried'].values())} tried, {len(found['broken'])} broken, {time.monotonic() - begun:.0f} s"
    )
    for text in found["broken"][:5]:
        say(f"    {text[:1000]}")
    return done.stdout


def _kept_part(name: str, results: Path) -> dict:
    file = results / f"{name.replace(' ', '-')}-{_digest(name)}.json"
    if not file.exists():
        file.write_text(run_part(name))
    return json.loads(file.read_text())


def _most(found: list[dict], note: str) -> int:
    return max((part["notes"][note] for part in found if note in part["notes"]), default=0)


def _table(found: list[dict]) -> str:
    tried: Counter[str] = Counter()
    for part in found:
        tried.update(part["tried"])
    sums = {
        "kill points": ("kill", "kills in"), "power-cut states": ("power cut",), "malformed or damaged files": ("malformed", "damaged"),
        "fuzz inputs to the header parser": ("fuzz",), "whole conversions of random checkpoints": ("random",),
        "flipped bits looked for with `verify`": ("flipped",),
    }  # fmt: skip
    rows = ["| what | tried | broke a guarantee |", "|---|---:|---:|"]
    left = Counter(tried)
    for title, prefixes in sums.items():
        names = [name for name in tried if name.startswith(prefixes)]
        rows.append(f"| **{title}** | **{sum(tried[name] for name in names):,}** | **{_broken(found, names)}** |")
        rows += [f"| {name} | {left.pop(name):,} | |" for name in sorted(names)] if len(names) > 1 else []
        for name in names:
            left.pop(name, None)
    rest = {name: count for name, count in left.items() if not name.startswith("of these")}
    rows.append(f"| **errors injected** | **{sum(rest.values()):,}** | **{_broken(found, list(rest))}** |")
    rows += [f"| {name} | {count:,} | |" for name, count in sorted(rest.items()) if count]
    refused = tried["of these, refused with a reason"]
    notes = [
        f"Of the random checkpoints {refused} were refused with a reason, before anything was written.",
        f"Under atheris the slowest input took {_most(found, 'slowest_unit_time_sec')} s (whole seconds) and the process at most "
        f"{_most(found, 'peak_rss_mb')} MB.",
        f"Machine: {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}.",
    ]
    return "\n".join([*rows, "", *notes])


def _broken(found: list[dict], names: list[str]) -> int:
    return sum(len(part["broken"]) for part in found if any(name in part["tried"] for name in names))


def main() -> int:
    """Run what was asked for; 1 if a guarantee was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", help="run one part and print JSON")
    parser.add_argument("--samples", action="store_true", help="run the samples that stdin names, and print JSON")
    parser.add_argument("--only", default="", help="run only the parts whose name begins so, and write no table")
    parser.add_argument("--jobs", type=int, default=2, help="parts that run at once")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "faults", help="where results are kept")
    options = parser.parse_args()
    if options.samples:
        for name in sys.stdin:
            print(SAMPLES[name.strip()]().as_json(), flush=True)
        return 0
    if options.part:
        print(parts()[options.part]().as_json())
        return 0
    options.results.mkdir(parents=True, exist_ok=True)
    os.nice(5)

    names = [name for name in parts() if name.startswith(options.only)]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda name: _kept_part(name, options.results), names))
    if options.only:
        return int(any(part["broken"] for part in found))
    text = DOCUMENT.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text(f"{head}{BEGIN}\n{_table(found)}\n{END}{tail}")
    return int(any(part["broken"] for part in found))


if __name__ == "__main__":
    raise SystemExit(main())

"""Match patterns over module names, as compressed-tensors does: a literal name, or `re:` and a regex matched from the start.

Called wherever a user gives patterns. A user's regex may explode (`(a+)+$`). Python cannot stop a match from another thread, so
a regex that may take long runs in a process of its own that is ended when its time is up.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence

from ..errors import RuleError, printable, quote
from ..limits import MAX_RULE_SECONDS, MAX_RULES
from . import REGEX_PREFIX

TAME_STEPS = 10**8  # of one match at the very most: about a second
_REPETITION = re.compile(r"[*+{]")
_CHOICE = re.compile(r"[?|]")  # each doubles the ways to match at most
_REPEATED_GROUP = re.compile(r"\)[*+{]")
START_SECONDS = 30.0  # what a busy machine may take to start an interpreter
_WORKER = """
import json, re, signal, sys
limit, patterns, names = json.load(sys.stdin)
if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_REAL, limit)
compiled = [re.compile(pattern) for pattern in patterns]
hits = [[i for i, name in enumerate(names) if regex.match(name)] for regex in compiled]
if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_REAL, 0)
json.dump(hits, sys.stdout)
"""


def check_pattern(pattern: str) -> None:
    """Raise RuleError if the pattern is empty or its regex does not compile."""
    if pattern in ("", REGEX_PREFIX):
        raise RuleError("an empty pattern matches nothing: give a module name or re:REGEX")
    if pattern.startswith(REGEX_PREFIX):
        try:
            re.compile(pattern.removeprefix(REGEX_PREFIX))
        except (re.error, OverflowError, RecursionError) as error:
            raise RuleError(f"pattern {quote(pattern)}: {error}") from None


def match_names(patterns: Sequence[str], names: Sequence[str]) -> dict[str, frozenset[str]]:
    """Return, for each pattern, the names it matches.

    Raises RuleError for an invalid pattern, and when matching takes longer than 2 seconds in all.
    """
    if len(patterns) > MAX_RULES:
        raise RuleError(f"{len(patterns)} patterns, expected at most {MAX_RULES}")
    for pattern in patterns:
        check_pattern(pattern)
    regexes = [pattern for pattern in patterns if pattern.startswith(REGEX_PREFIX)]
    known = set(names)
    found = {pattern: frozenset({pattern} & known) for pattern in patterns if pattern not in regexes}
    if regexes:
        bare = [pattern.removeprefix(REGEX_PREFIX) for pattern in regexes]
        hits = _match_here(bare, names) if _are_tame(bare, names) else _match_apart(bare, names)
        found |= {pattern: frozenset(names[i] for i in rows) for pattern, rows in zip(regexes, hits, strict=True)}
    return found


def _are_tame(regexes: Sequence[str], names: Sequence[str]) -> bool:
    """Return whether no match can take long: no group is repeated, so that repetitions only share a name out among them."""
    longest = max(map(len, names), default=0)
    repeated = any(_REPEATED_GROUP.search(regex) for regex in regexes)
    return not repeated and max(_most_ways(regex, longest) for regex in regexes) <= TAME_STEPS


def _most_ways(regex: str, length: int) -> int:
    """Return in how many ways a regex without repeated groups can match a name of `length` characters at the very most."""
    repetitions = len(_REPETITION.findall(regex))
    choices = len(_CHOICE.findall(regex))
    return math.comb(length + repetitions, repetitions) << choices


def _match_here(regexes: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """Match in this process, which saves the start of another; the clock is read between names."""
    end = time.monotonic() + MAX_RULE_SECONDS
    hits: list[list[int]] = []
    for match in (re.compile(regex).match for regex in regexes):
        rows: list[int] = []
        for i, name in enumerate(names):
            if match(name):
                rows.append(i)
            if time.monotonic() > end:
                raise _too_slow(regexes)
        hits.append(rows)
    return hits


def _match_apart(regexes: list[str], names: Sequence[str]) -> list[list[int]]:
    """Match in another process: safe from any thread, and ended by its own alarm, which no match can delay."""
    call = json.dumps([MAX_RULE_SECONDS, regexes, list(names)]).encode()
    command = [sys.executable, "-I", "-S", "-c", _WORKER]
    try:
        worker = subprocess.run(command, input=call, capture_output=True, timeout=START_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise _too_slow(regexes) from None
    if worker.returncode == -getattr(signal, "SIGALRM", 0):
        raise _too_slow(regexes)
    if worker.returncode:
        raise RuleError(f"matching {_named(regexes)} failed: the process that matched ended with {worker.returncode}")
    hits: list[list[int]] = json.loads(worker.stdout)
    return hits


def _named(regexes: Sequence[str]) -> str:
    return ", ".join(quote(REGEX_PREFIX + regex) for regex in regexes[:3])


def _too_slow(regexes: Sequence[str]) -> RuleError:
    return RuleError(f"matching {_named(regexes)} took longer than {MAX_RULE_SECONDS:g} s: avoid nested repetition")


def unmatched_error(pattern: str, option: str, names: Collection[str]) -> RuleError:
    """Return the error for a pattern that matches no module, with the nearest names."""
    text, wrong = pattern.removeprefix(REGEX_PREFIX), f"{option} {quote(pattern)}"
    is_regex = pattern.startswith(REGEX_PREFIX)
    if not is_regex and (meant := _meant(text, names)):
        return RuleError(f"{wrong} {meant}")
    tails = {name.rpartition(".")[2]: name for name in sorted(names, reverse=True)}
    near = difflib.get_close_matches(text, sorted(names)[:5000], n=2, cutoff=0.6)
    near += [tails[leaf] for leaf in difflib.get_close_matches(text.rpartition(".")[2], sorted(tails), n=2)]
    hint = "; near names: " + ", ".join(quote(name) for name in dict.fromkeys(near)) if near else ""
    anchored = " (a regex matches from the start of the name)" if is_regex and not near else ""
    return RuleError(f"{wrong} matches no module of this checkpoint{anchored}{hint}")


def _meant(text: str, names: Collection[str]) -> str:
    """Return what a name is taken for that is none, and the regex to use instead; "" where nothing is likely.

    The regex is shown as it is typed, backslashes single.
    """
    escaped = re.escape(text)
    if any(name.startswith(text + ".") for name in names):
        return f"is no weight's name but a parent: use '{printable(REGEX_PREFIX + escaped)}\\..*'"
    if any(sign in text for sign in "*?"):
        regex = printable(REGEX_PREFIX + escaped.replace(r"\*", ".*").replace(r"\?", ".") + "$")
        return f"is a file pattern, expected a name or a regex: use '{regex}'"
    inner = [name for name in names if f".{text}." in f".{name}."]
    if not inner:
        return ""
    tail = "$" if any(name.endswith("." + text) for name in inner) else r"\..*"
    regex = printable(f"{REGEX_PREFIX}.*\\.{escaped}{tail}")
    return f"is a part of names, such as {quote(inner[0])}, expected a whole one or a regex: use '{regex}'"

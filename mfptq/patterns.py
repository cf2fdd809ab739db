"""Patterns over module names, with compressed-tensors' meaning: a literal name, or `re:` and a regex matched from the start.

A user's regex may explode (`(a+)+$`). Python cannot stop a match from another thread, so user regexes run in a process of
their own that is ended when its time is up.
"""

from __future__ import annotations

import difflib
import json
import re
import subprocess
import sys
from collections.abc import Collection, Sequence

from .errors import RuleError, quote
from .limits import MAX_RULE_SECONDS, MAX_RULES

REGEX_PREFIX = "re:"
_WORKER = """
import json, re, sys
patterns, names = json.load(sys.stdin)
print("ready", flush=True)
compiled = [re.compile(pattern) for pattern in patterns]
json.dump([[i for i, name in enumerate(names) if regex.match(name)] for regex in compiled], sys.stdout)
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
        hits = _match_apart([pattern.removeprefix(REGEX_PREFIX) for pattern in regexes], names)
        found |= {pattern: frozenset(names[i] for i in rows) for pattern, rows in zip(regexes, hits, strict=True)}
    return found


def _match_apart(regexes: list[str], names: Sequence[str]) -> list[list[int]]:
    """Match in another process: safe from any thread, and stoppable."""
    command = [sys.executable, "-I", "-S", "-c", _WORKER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps([regexes, list(names)]).encode())
        worker.stdin.close()
        worker.stdin = None
        worker.stdout.readline()  # its start does not count against the pattern
        try:
            output, _ = worker.communicate(timeout=MAX_RULE_SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            named = ", ".join(quote(REGEX_PREFIX + regex) for regex in regexes[:3])
            raise RuleError(
                f"matching {named} took longer than {MAX_RULE_SECONDS:g} s: avoid nested repetition"
            ) from None
    hits: list[list[int]] = json.loads(output)
    return hits


def unmatched_error(pattern: str, option: str, names: Collection[str]) -> RuleError:
    """Return the error for a pattern that matches no module, with the nearest names."""
    text = pattern.removeprefix(REGEX_PREFIX)
    if not pattern.startswith(REGEX_PREFIX) and any(name.startswith(text + ".") for name in names):
        return RuleError(
            f"{option} {quote(pattern)} is no weight's name but a parent: "
            f"use {quote(REGEX_PREFIX + re.escape(text) + chr(92) + '..*')}"
        )
    tails = {name.rpartition(".")[2]: name for name in sorted(names, reverse=True)}
    near = difflib.get_close_matches(text, sorted(names)[:5000], n=2, cutoff=0.6)
    near += [tails[leaf] for leaf in difflib.get_close_matches(text.rpartition(".")[2], sorted(tails), n=2)]
    hint = "; near names: " + ", ".join(quote(name) for name in dict.fromkeys(near)) if near else ""
    anchored = "" if near or not pattern.startswith(REGEX_PREFIX) else " (a regex matches from the start of the name)"
    return RuleError(f"{option} {quote(pattern)} matches no module of this checkpoint{anchored}{hint}")

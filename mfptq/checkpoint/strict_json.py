"""Parse JSON that nobody vouches for: no duplicate keys, no NaN, bounded digits and nesting; and write it as Hugging Face does.

Called for every JSON file that is read: headers, index, configs, journals, rows of text.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from ..errors import quote
from ..limits import MAX_INTEGER_DIGITS


class StrictJsonError(ValueError):
    """The text is not JSON as RFC 8259 has it, or is ambiguous."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise StrictJsonError(f"key {quote(key)} appears twice")
            seen.add(key)
    return result


def _integer(digits: str) -> int | float:
    if digits == "-0":
        return -0.0  # no whole number has a sign and no value: safetensors takes it for a float too
    if len(digits) > MAX_INTEGER_DIGITS + 1:
        raise StrictJsonError(f"an integer of {len(digits)} digits, expected at most {MAX_INTEGER_DIGITS}")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise StrictJsonError(f"number {digits[:40]} is out of range")
    return value


def _constant(name: str) -> NoReturn:
    raise StrictJsonError(f"{name} is not JSON")


_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_NEGATIVE_ZERO = re.compile(rb"-0(?![\d.eE])")
_LONG_NUMBER = b"0" * (MAX_INTEGER_DIGITS + 1)  # with zeros for its digits
_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant)
_SHORT = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)
_WITH_INFINITY = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float)


def parse_json(raw: bytes, *, infinity: bool = False) -> Any:
    """Return the value of `raw`, UTF-8 JSON (RFC 8259), or raise `StrictJsonError`; nothing else escapes.

    With `infinity`, NaN and Infinity are numbers: Hugging Face configs hold them (`time_step_limit` of Mamba models).
    """
    is_plain = _LONG_NUMBER not in raw.translate(_ZEROS) and not _NEGATIVE_ZERO.search(raw)
    strict = _SHORT if is_plain else _STRICT  # a call for each number takes longer
    try:
        return (_WITH_INFINITY if infinity else strict).decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise StrictJsonError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise StrictJsonError(f"not JSON at character {error.pos}: {error.msg}") from None


def dump_json(value: Any) -> str:
    """Return `value` as the indented text that Hugging Face config files use, ending in a newline.

    Half of a surrogate pair, which UTF-8 cannot hold, stays the escape that it was in the source.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()

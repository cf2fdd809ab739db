"""Read and write recipes: the decisions of a conversion as a small TOML file, one's own or shipped.

Called by `settings` and the command line. Strict: a key, value or pattern that is not understood is refused, never skipped.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from ..errors import UsageError, did_you_mean, quote
from ..names.patterns import check_pattern
from .formats import KV_CACHE_SCHEMES, parse_format_rule

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 2**16
SUFFIX = ".toml"
DESCRIPTION = "description"
LISTS: Final = ("ignore", "targets", "formats")
TARGET_KEYS: Final = ("target_bits", "target_size")  # of which one takes the place of the other
KEYS: Final[Mapping[str, type[Any]]] = {
    DESCRIPTION: str, "scheme": str, "method": str, "kv_cache": str, "default_ignore": bool, **dict.fromkeys(LISTS, list),
    "target_bits": float, "target_size": str, "target_formats": list,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe as it was written: `decisions` are keywords of `plan` and `convert`, `text` is the whole file."""

    name: str
    description: str
    decisions: Mapping[str, Any]
    text: str


def shipped() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("mfptq").joinpath("recipes")
    return sorted(each.name.removesuffix(SUFFIX) for each in folder.iterdir() if each.name.endswith(SUFFIX))


def load_recipe(given: str | Path) -> Recipe:
    """Return a recipe by the name of a shipped one or by its file; raises UsageError, saying where, for what is wrong."""
    path = Path(given).expanduser()
    if path.is_file():
        data = path.read_bytes()
        if len(data) > MAX_BYTES:
            raise UsageError(f"recipe {quote(path)} has {len(data)} bytes, expected at most {MAX_BYTES}")
        return parse_recipe(data.decode(errors="replace"), path.name.removesuffix(SUFFIX))
    if str(given) not in shipped():
        hint = did_you_mean(str(given), shipped())
        raise UsageError(f"there is no recipe {quote(given)}: neither a file nor one of {', '.join(shipped())}{hint}")
    file = resources.files("mfptq").joinpath("recipes").joinpath(f"{given}{SUFFIX}")
    return parse_recipe(file.read_text(), str(given))


def parse_recipe(text: str, name: str) -> Recipe:
    """Return the recipe that a text is; raises UsageError for TOML that does not parse, unknown keys and wrong values."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {quote(name)} is not TOML: {error}") from None
    values: dict[str, Any] = {  # a whole number of bits is a number too
        key: float(value) if KEYS.get(key) is float and type(value) is int else value for key, value in found.items()
    }
    for key, value in values.items():
        _check(name, key, value)
    decisions = {key: value for key, value in values.items() if key != DESCRIPTION}
    return Recipe(name, values.get(DESCRIPTION, ""), decisions, text)


def _check(name: str, key: str, value: Any) -> None:
    if key not in KEYS:
        hint = did_you_mean(key, KEYS)
        raise UsageError(f"recipe {quote(name)}: key {quote(key)} is unknown, expected one of {', '.join(KEYS)}{hint}")
    wanted = KEYS[key]
    if type(value) is not wanted or (wanted is list and not all(isinstance(each, str) for each in value)):
        expected = {list: "a list of strings", str: "a string", bool: "true or false", float: "a number"}[wanted]
        raise UsageError(f"recipe {quote(name)}: {key} is {quote(value)}, expected {expected}")
    for each in value if key in LISTS else ():
        check_pattern(parse_format_rule(each).pattern if key == "formats" else each)
    if key == "kv_cache" and value not in KV_CACHE_SCHEMES:
        raise UsageError(f"recipe {quote(name)}: kv_cache is {quote(value)}, expected {', '.join(KV_CACHE_SCHEMES)}")


def with_recipe(decisions: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return decisions with those of a recipe behind them: what the caller decides comes first, or takes the place."""
    result: dict[str, Any] = {key: value for key, value in decisions.items() if value is not None}
    aims = any(key in result for key in TARGET_KEYS)
    for key, value in recipe.decisions.items():
        if aims and key in TARGET_KEYS:
            continue
        given: Any = result.get(key, ())
        if key in LISTS:
            result[key] = [*([given] if isinstance(given, str) else given), *value]
        elif key not in result or (key == "default_ignore" and given is True):
            result[key] = value
    return result


def recipe_text(decisions: Mapping[str, Any], description: str = "") -> str:
    """Return the recipe of some decisions as TOML."""
    lines = [f"{DESCRIPTION} = {_toml(description)}"] if description else []
    for key in KEYS:
        value: Any = decisions.get(key)
        if KEYS[key] is list and value:
            lines += [f"{key} = [", *(f"    {_toml(each)}," for each in value), "]"]
        elif isinstance(value, bool) and not (key == "default_ignore" and value):
            lines.append(f"{key} = {str(value).lower()}")
        elif isinstance(value, float | int) and KEYS[key] is float:
            lines.append(f"{key} = {value:g}")
        elif isinstance(value, str) and key != DESCRIPTION:
            lines.append(f"{key} = {_toml(value)}")
    return "\n".join([*lines, ""])


def _toml(text: str) -> str:
    """Return a string as TOML: literal where it can be, since patterns are full of backslashes."""
    if "'" not in text and text.isprintable():
        return f"'{text}'"
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(each if each.isprintable() else f"\\U{ord(each):08X}" for each in escaped) + '"'

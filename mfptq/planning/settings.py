"""Check the decisions that a caller takes, and derive method and scheme from them.

Called by `planner` and `observation`. Reads no file but a recipe: what else the decisions name is opened by `planner`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from ..calibration.file import EXTRACT
from ..errors import UsageError, did_you_mean, quote
from ..kernels.calibrated import CALIBRATED_METHODS
from .formats import KV_CACHE_SCHEMES, FormatRule, parse_format_rule
from .recipes import Recipe, load_recipe, with_recipe
from .rules import Rules
from .size_target import SizeTarget, size_target

if TYPE_CHECKING:
    from ..scales.input_scales import InputScales
    from .quantization_config import Scheme

PLAIN_METHODS = ("search", "minmax")
METHODS = ("auto", *PLAIN_METHODS, *CALIBRATED_METHODS)
SCHEMES: Mapping[str, Scheme] = {"NVFP4": "NVFP4", "NVFP4A16": "NVFP4A16", "W4A4": "NVFP4", "W4A16": "NVFP4A16"}
DEFAULT_MARGIN = 4.0
MAX_MARGIN = 64  # where block scales of ordinary inputs begin to be subnormal
INPUT_SOURCES = ("calibration", "input_scales", "like")


class Decisions(TypedDict, total=False):
    """The keywords of `plan` and `convert` that decide what the output holds; each may be left out, or None.

    `scheme`: `NVFP4` (W4A4) or `NVFP4A16` (weight-only, W4A16); by default W4A4 where input scales are given.
    `method`: `search`, `minmax`, or with a calibration file `weighted`, `hessian`, `hessian+`, `gptq`; by default the
    strongest that the calibration file allows, `search` without one.
    `ignore`, `targets`: modules to keep, and to quantize although a default keeps them: names, or `re:` and a regex.
    `default_ignore`: False drops the default exclusions, but for what no engine loads in FP4.
    `force`: True allows that too: embedding tables, norms, routers, heads tied to a table.
    `formats`: rules FORMAT=PATTERN for layers that get another format than the scheme's, as "fp8-dynamic=re:.*o_proj$"; of
    several that match a layer the first one decides. Formats: nvfp4, nvfp4a16, fp8-dynamic, fp8-block, fp8-static, bf16.
    `target_bits`, `target_size`: at most one of a number of bits for each quantized weight, as 5.2, and a size of all
    safetensors files, as "20GB", neither of which is exceeded: layers get another format where that lowers the predicted
    error of the model's output most. `target_formats`: which they may get, of `fp8-dynamic` and `bf16`; by default both.
    `format_errors`: a JSON file that keeps the errors found for this, and spares the pass over the weights where they are
    in it.
    `chosen_formats`: what an earlier plan chose for the target, rules FORMAT=MODULE; then nothing is measured again.
    `kv_cache`: `fp8` tells engines to keep keys and values in FP8.
    `recipe`: a TOML file with decisions of the kinds above, or the name of a shipped one; patterns given beside it decide
    before its own, and other decisions take the place of its own.
    `calibration`, `input_scales`, `like`: at most one of a calibration file, which makes the weights better too; a file or
    checkpoint with input scales, what `read_input_scales` returned, or "auto", which bounds them without calibration; an
    NVFP4 or FP8 checkpoint whose choice of layers is taken as well.
    `smooth`: True moves the size of outlier channels of inputs into the weights, by powers of two; needs a calibration file with
    second moments. By default so it is in W4A4 where the file has them and `method` is `auto`; False turns it off.
    `input_margin`: by how much the ranges of a calibration file are widened, 4 by default; 1 for `minmax` and ranges
    that another tool found.
    `revision`, `token`, `cache_dir`: as in huggingface_hub. `keep_source`: a repo goes into its cache whole, and stays there.
    `include_files`, `skip_files`: safetensors files that no index names, to take in or to leave out.
    `follow_links`: files of the source may be links that lead out of its folder.
    """

    scheme: str | None
    method: str | None
    ignore: Iterable[str]
    targets: Iterable[str]
    default_ignore: bool
    force: bool
    formats: Iterable[str]
    target_bits: float | None
    target_size: str | int | None
    target_formats: Iterable[str] | None
    format_errors: str | Path | None
    chosen_formats: Iterable[str] | None
    kv_cache: str | None
    recipe: str | Path | None
    calibration: str | Path | None
    input_scales: str | Path | InputScales | None
    input_margin: float | None
    smooth: bool | None
    like: str | Path | None
    revision: str | None
    token: str | None
    cache_dir: str | Path | None
    keep_source: bool
    include_files: Iterable[str]
    skip_files: Iterable[str]
    follow_links: bool


@dataclass(frozen=True, slots=True)
class Settings:
    """Checked decisions; `method` and `scheme` None mean the best that the given statistics allow."""

    rules: Rules = field(default_factory=Rules)
    method: str | None = None
    scheme: Scheme | None = None
    input_margin: float | None = None
    formats: tuple[FormatRule, ...] = ()
    kv_cache: str | None = None
    recipe: Recipe | None = None
    smooth: bool | None = None
    target: SizeTarget | None = None
    chosen: tuple[FormatRule, ...] | None = None

    @property
    def all_formats(self) -> tuple[FormatRule, ...]:
        """The rules of the user, then those that follow from a target."""
        return (*self.formats, *(self.chosen or ()))

    def resolve_method(self, *, calibrated: bool) -> str:
        """Return the method; `auto` remains only where a calibration file is there to decide."""
        if self.method in CALIBRATED_METHODS and not calibrated:
            raise UsageError(f"method {self.method} needs a calibration file; without one choose search or minmax")
        if self.is_auto:
            return "auto" if calibrated else "search"
        return str(self.method)

    @property
    def is_auto(self) -> bool:
        """Whether the method is left open: then MXFP4 keeps its codes; one that is asked for holds for every weight."""
        return self.method in (None, "auto")

    def resolve_scheme(self, *, with_input: bool) -> Scheme:
        """Return the scheme; `with_input` says whether input scales are given."""
        if self.scheme == "NVFP4" and not with_input:
            raise UsageError(
                "scheme NVFP4 (W4A4) needs input scales, from input_scales, calibration or like; without choose NVFP4A16"
            )
        if self.scheme == "NVFP4A16" and with_input:
            raise UsageError("scheme NVFP4A16 (W4A16) is weight-only and takes no input_scales")
        return self.scheme or ("NVFP4" if with_input else "NVFP4A16")


def check_decisions(decisions: Decisions) -> Settings:
    """Return the settings that decisions stand for, but for what the files tell that they name.

    Raises TypeError for a keyword that is none of `Decisions`, and UsageError for a method or scheme that is unknown or for
    two sources of input scales.
    """
    for name in decisions:
        if name not in Decisions.__annotations__:
            raise TypeError(
                f"unexpected keyword argument {name!r}, expected one of {', '.join(Decisions.__annotations__)}"
            )
    recipe = load_recipe(named) if (named := decisions.get("recipe")) is not None else None
    if recipe is not None:
        decisions = cast("Decisions", with_recipe(decisions, recipe))
    method = _choice("method", decisions.get("method"), METHODS, str.lower)
    scheme = _choice("scheme", decisions.get("scheme"), SCHEMES, str.upper)
    _check_input_sources(decisions)
    target = size_target(decisions)
    ignore, targets = _patterns(decisions.get("ignore", ())), _patterns(decisions.get("targets", ()))
    return Settings(
        Rules(ignore, targets, decisions.get("default_ignore", True), force=decisions.get("force", False)),
        method,
        None if scheme is None else SCHEMES[scheme],
        input_margin=decisions.get("input_margin"),
        formats=tuple(parse_format_rule(text) for text in _patterns(decisions.get("formats", ()))),
        kv_cache=_choice("KV cache", decisions.get("kv_cache"), KV_CACHE_SCHEMES),
        recipe=recipe,
        smooth=decisions.get("smooth"),
        target=target,
        chosen=_chosen(decisions.get("chosen_formats"), target),
    )


def _choice(what: str, given: str | None, known: Collection[str], spelled: Callable[[str], str] = str) -> str | None:
    """Return what was chosen, spelled as it is known, or None; raises UsageError, with the nearest name, for any other."""
    name = None if given is None else spelled(given)
    if name is not None and name not in known:
        hint = did_you_mean(name, known)
        raise UsageError(f"{what} {quote(given)} is unknown, expected one of {', '.join(known)}{hint}")
    return name


def _check_input_sources(decisions: Decisions) -> None:
    """Raise UsageError for two sources of input scales, and for what needs a calibration file where there is none."""
    given = [name for name in INPUT_SOURCES if decisions.get(name) is not None]
    if len(given) > 1:
        number = "both" if len(given) == 2 else "all"
        raise UsageError(f"{' and '.join(given)} are mutually exclusive: {number} provide input scales")
    margin = decisions.get("input_margin")
    if margin is not None and "calibration" not in given:
        raise UsageError("input_margin widens the ranges of a calibration file: give one, or leave it out")
    if margin is not None and not 1 <= margin <= MAX_MARGIN:
        raise UsageError(f"input_margin is {margin}, expected a number from 1 to {MAX_MARGIN}")
    if decisions.get("smooth") and "calibration" not in given:
        raise UsageError("smooth takes its factors from a calibration file: give one, or leave it out")


def _chosen(rules: Iterable[str] | None, target: SizeTarget | None) -> tuple[FormatRule, ...] | None:
    """Return the rules that an earlier plan found for a target, with their reason."""
    if rules is None or target is None:
        return None
    found = map(parse_format_rule, rules)
    return tuple(rule._replace(why=f"{rule.format} for {target}") for rule in found)


def _patterns(given: Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def input_margin(settings: Settings, origin: str) -> float:
    """Return by how much the ranges of a calibration file are widened; `origin` is how the file came about.

    Text that was not calibrated on meets larger values, and those would be clipped; a wider range costs nothing. `minmax`
    and ranges that another tool found keep theirs.
    """
    if settings.input_margin is not None:
        return settings.input_margin
    return 1.0 if settings.method == "minmax" or origin == EXTRACT else DEFAULT_MARGIN

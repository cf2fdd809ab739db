"""Render what a calibration file holds. Called by `calibration show`, which prints what comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..calibration.overview import FEW_TOKENS
from ..errors import counted, quote

if TYPE_CHECKING:
    from ..calibration.overview import InputOverview, Overview

SHOWN_INPUTS = 10


def overview_text(found: Overview) -> str:
    """Return the overview as text: what was run, coverage, outliers, experts with little text."""
    about = found.description
    source = f"{quote(about['model'])}" + (f" at {quote(about['revision'])}" if about["revision"] else "")
    lines = [
        f"{source}: statistics {about['statistics']} of {len(found.inputs)} inputs, {found.modules} modules",
        _coverage(found),
        "inputs with the largest outliers: amax, and its ratio to the root mean square",
        *(_input_row(each) for each in found.inputs[:SHOWN_INPUTS]),
    ]
    thin = [each for each in found.experts if each.few]
    if found.experts:
        total, few = sum(each.experts for each in found.experts), sum(each.few for each in thin)
        without = sum(each.without for each in thin)
        lines.append(
            f"{total} routed experts: {counted(without, 'was', 'were')} given no token, {few} fewer than {FEW_TOKENS}"
        )
    lines += [
        f"  {each.least:9} to {each.most} tokens, few for {counted(each.few, 'expert', 'experts')}  {quote(each.name)}"
        for each in thin[:SHOWN_INPUTS]
    ]
    if found.sensitivities:
        lines.append(
            "layers whose rounding to NVFP4 changes the model's last hidden state most, by the square of its norm"
        )
        lines += [f"  {value:12.2%}  {quote(name)}" for name, value in [*found.sensitivities.items()][:SHOWN_INPUTS]]
    return "\n".join(lines)


def _coverage(found: Overview) -> str:
    about = found.description
    tokens = sorted(each.tokens for each in found.inputs if each.tokens is not None)
    if not tokens:
        return "ranges only, taken from another checkpoint: no text of ours"
    samples = f"{about['samples']} of {about['requested']} samples of up to {about['max_seq_length']} tokens"
    return f"{samples}; tokens of each input: {tokens[0]} to {tokens[-1]}, median {tokens[len(tokens) // 2]}"


def _input_row(each: InputOverview) -> str:
    ratio = "" if each.ratio is None else f"{each.ratio:9.1f} x"
    return f"  {each.amax:12.4g} {ratio:>11}  {quote(each.name)}"

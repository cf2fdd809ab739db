"""Write everything of an output that is not a shard, when all shards are there.

Called by `execution.whole_run` at the end of a run. `config.json` must come last: with it the folder is a checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from ..checkpoint.companions import CONFIG, INDEX, SMOOTHING
from ..checkpoint.small_files import read_file
from ..errors import SourceError, VerificationError, quote
from ..kernels import ErrorStats
from ..limits import MAX_CONFIG_BYTES
from ..smoothing.record import record_text
from .acceptance import refusal
from .claim import CARD, MANIFEST, RECIPE, REPORT
from .destination import Destination
from .report import report_text

if TYPE_CHECKING:
    from ..checkpoint.source import Source
    from ..planning.plan import ConversionPlan


def source_card(source: Source) -> str:
    """Return the text of the source's model card, "" if it has none that can be read."""
    try:
        return read_file(source, CARD, MAX_CONFIG_BYTES).decode(errors="replace")
    except SourceError:
        return ""


def finish(
    plan: ConversionPlan, out: Destination, patterns: Mapping[str, ErrorStats], card: str, *, gone: Collection[str] = ()
) -> dict[str, str]:
    """Write companions, report, card, index, manifest and config, and return the SHA-256 of every file by name.

    `card` is the model card's text; `gone` names shards that were uploaded and are not here any more.

    Raises VerificationError, before config.json is there, for a shard that the safetensors library refuses.
    """
    for shard in plan.shards:
        if shard.name in gone:
            continue
        if problem := refusal(out.root / shard.name, shard.tensors):
            raise VerificationError(f"{quote(shard.name)} {problem}; this is a fault of mfptq, please report it")
    source = plan.checkpoint.source
    sums = {result.name: result.sha256 for result in out.done.values()}
    for name in plan.checkpoint.companions:
        sums[name] = out.copy(name, source)
    texts = {REPORT: report_text(plan, patterns), CARD: card}
    if plan.smoothing is not None and plan.smoothing.powers:
        texts[SMOOTHING] = record_text(plan.smoothing.powers)
    if plan.settings.recipe is not None:
        texts[RECIPE] = plan.settings.recipe.text
    if plan.index_text is not None:
        texts[INDEX] = plan.index_text
    for name, text in texts.items():
        sums[name] = out.write(name, text.encode())
    config = plan.config_text.encode()
    sums[CONFIG] = hashlib.sha256(config).hexdigest()
    manifest = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()
    sums[MANIFEST] = out.write(MANIFEST, manifest)
    out.write(CONFIG, config)
    return sums

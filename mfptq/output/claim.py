"""Name the files of an output folder, and say which of them a run is going to write.

Read by whatever looks into such a folder, and by `output.destination`, which claims it for a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.companions import CONFIG, INDEX, SMOOTHING

if TYPE_CHECKING:
    from ..planning.plan import ConversionPlan

WORK = ".mfptq"
JOURNAL = "journal"
MANIFEST = "SHA256SUMS"
REPORT = "mfptq_report.json"
CARD = "README.md"
RECIPE = "mfptq_recipe.toml"
EVALUATION = "mfptq_evaluation.json"


@dataclass(frozen=True, slots=True)
class OutputClaim:
    """What a run is going to write: the plan's digests, its shards' sizes in bytes, and companions of the source.

    `source` is the source's folder, None for a repo. `uploaded` maps shards that need not be here any more to their SHA-256;
    `at_once` is how many shards lie here at one time, None for all.
    """

    source: Path | None
    digests: Mapping[str, str]
    shards: Mapping[str, int]
    companions: tuple[str, ...] = ()
    uploaded: Mapping[str, str] = field(default_factory=dict)
    at_once: int | None = None

    @classmethod
    def of(cls, plan: ConversionPlan) -> OutputClaim:
        """Return what a plan is going to write."""
        sizes = {shard.name: shard.size for shard in plan.shards}
        return cls(plan.checkpoint.origin.folder, plan.digests, sizes, plan.checkpoint.companions)

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that may be written, config.json first: while it is absent, the folder is no checkpoint."""
        return (CONFIG, *self.shards, *self.companions, INDEX, CARD, REPORT, EVALUATION, RECIPE, SMOOTHING, MANIFEST)

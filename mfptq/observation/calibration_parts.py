"""Spread a calibration over machines: each makes a part of the samples into a file of its own, and the parts are merged.

`calibrate` calls it with an executor, which runs the parts somewhere. They lie in `OUTPUT.parts` until all are whole: only then
does the output appear. A journal there names the parts and what they depend on, so that a rerun goes on with the same ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from ..calibration.file import SUFFIX, Description, parse_description, write_calibration
from ..calibration.merge import merged
from ..calibration.reading import Calibration, load_calibration
from ..checkpoint.folder import read_shard
from ..checkpoint.source import FolderSource
from ..errors import DestinationError, PlanMismatchError, ScaleError, SourceError, StorageError, quote
from ..execution.executors import Request
from ..output.claim import JOURNAL, WORK
from ..output.destination import create_folders, locked
from ..output.journal import Journal, JournalState, read_journal
from ..planning.plan import ConversionPlan
from ..storage.files import storage_errors
from .calibration_pass import CalibrationOptions, OnProgress, Share, described
from .sensitivity import short_texts
from .streaming import OFFLOAD
from .texts import Samples

PART = "part-"


@dataclass(frozen=True, slots=True)
class CalibrationOrder:
    """A calibration about to be made in parts; another machine makes the same plan by `request`."""

    plan: ConversionPlan
    request: Request
    options: CalibrationOptions
    samples: Samples

    @property
    def digests(self) -> Mapping[str, str]:
        """What the statistics depend on, by name."""
        options = self.options
        named = ("statistics", "max_seq_length", "dtype", "all_experts", "sensitivities")
        return {**self.plan.digests, "text": self.samples.digest} | {
            name: str(getattr(options, name)) for name in named
        }

    def shares(self, count: int) -> list[Share]:
        """Return the samples in `count` parts, neighbours together, as many in each; in fewer where there are fewer samples."""
        ids = self.samples.ids
        count = min(count, len(ids))
        texts = tuple(short_texts(ids)) if self.options.sensitivities else ()
        ends = [number * len(ids) // count for number in range(count + 1)]
        return [
            Share(Samples(ids[start:end], f"{self.samples.digest}:{number}/{count}"), texts, number, count)
            for number, (start, end) in enumerate(pairwise(ends), 1)
        ]

    def described(self, samples: Samples) -> Description:
        """Return what a file says in which all of these samples are."""
        return replace(described(self.plan, self.options, samples), samples=len(samples.ids))


@dataclass(frozen=True, slots=True)
class PartsFolder:
    """The folder where the parts of a calibration are made, held by one run."""

    path: Path
    order: CalibrationOrder

    def divided(self, count: int) -> dict[str, Share]:
        """Return the parts by file name: `count` of them, or as an earlier run has divided them; raises PlanMismatchError."""
        begun = self._begun()
        if begun is not None:
            return begun
        self.clear()
        shares = self.order.shares(count)
        names = tuple(f"{PART}{share.number:05}-of-{share.count:05}{SUFFIX}" for share in shares)
        Journal(self.path / WORK / JOURNAL, JournalState(self.order.digests, {}, names)).close()
        return dict(zip(names, shares, strict=True))

    def _begun(self) -> dict[str, Share] | None:
        """Return the parts that the journal names; None where nothing was begun."""
        journal, digests = self.path / WORK / JOURNAL, self.order.digests
        found = read_journal(journal) if journal.exists() else JournalState()
        if found.digests is None:
            return None
        changed = [name for name in {**digests, **found.digests} if digests.get(name) != found.digests.get(name)]
        if changed:
            raise PlanMismatchError(
                f"{quote(self.path)} holds an unfinished calibration with other {' and '.join(changed)}: rerun it as it was, "
                "choose another output, or overwrite it to start anew"
            )
        return dict(zip(found.files, self.order.shares(len(found.files)), strict=True))

    def is_whole(self, name: str) -> bool:
        """Return whether a part is there with all of its samples."""
        found = description_of(self.path / name)
        return found is not None and found.is_complete

    def merge(self, output: Path) -> Description:
        """Write the file that stands for all parts; raises DestinationError if one is not what it should be."""
        with ExitStack() as opened:
            files: list[Calibration] = []
            for name, share in (self._begun() or {}).items():
                file = load_calibration(self.path / name)
                opened.callback(file.close)
                if file.description != self.order.described(share.samples):
                    raise DestinationError(
                        f"{quote(file.path)} is not the whole part: rerun the same command to make it"
                    )
                files.append(file)
            if sum(file.description.samples for file in files) != len(self.order.samples.ids):
                raise DestinationError(f"{quote(self.path)} does not hold all samples: rerun the same command")
            contents, description = merged(files), self.order.described(self.order.samples)
            inputs = tuple(sorted(contents.inputs, key=lambda info: info.name))
            write_calibration(output, replace(contents, description=description, inputs=inputs))
        return description

    def clear(self) -> None:
        """Remove the parts, and what killed tasks have left."""
        with storage_errors("clear", self.path):
            (self.path / WORK / JOURNAL).unlink(missing_ok=True)
            for path in self.path.glob(f"{PART}*"):
                path.unlink()
            for path in self.path.glob(f"{OFFLOAD}*"):
                shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder, unless somebody has put something else there."""
        self.clear()
        shutil.rmtree(self.path / WORK, ignore_errors=True)
        with suppress(OSError):
            self.path.rmdir()


class CalibrationExecutor(Protocol):
    """Makes the parts of a calibration, somewhere."""

    def calibrate(self, order: CalibrationOrder, folder: PartsFolder, on_event: OnProgress) -> None:
        """Make every part of the folder that is not whole.

        `on_event` is called in this thread, at least once a second. What it raises stops the work.
        """


def calibrate_in_parts(
    order: CalibrationOrder,
    output: Path,
    executor: CalibrationExecutor,
    *,
    overwrite: bool,
    on_event: OnProgress | None,
) -> Description:
    """Make the parts by an executor, and the output of them; return what was done.

    Raises DestinationLockedError where another run makes the same output, PlanMismatchError where parts of another one lie.
    """
    folder = PartsFolder(parts_of(output), order)
    create_folders(folder.path)
    with locked(folder.path):
        if overwrite:
            folder.clear()
        try:
            executor.calibrate(order, folder, on_event or (lambda _progress: None))
            description = folder.merge(output)
        except BaseException:
            if not samples_kept(output):
                with suppress(StorageError):  # what is raised already says more
                    folder.remove()
            raise
        folder.remove()
    return description


def parts_of(output: Path) -> Path:
    """Return the folder where the parts of an output are made."""
    return output.with_name(f"{output.name}.parts")


def samples_kept(output: Path) -> int:
    """Return how many samples are in the parts of an output that is not there yet."""
    found = map(description_of, parts_of(output).glob(f"{PART}*{SUFFIX}"))
    return sum(each.samples for each in found if each is not None)


def description_of(path: Path) -> Description | None:
    """Return what a file says of its making, its statistics unread; None where it is not there, or no calibration file."""
    try:
        with closing(FolderSource(path.parent)) as source:
            return parse_description(read_shard(source, path.name).header.metadata)
    except (SourceError, ScaleError):
        return None

"""Find the files of text that a dataset's name stands for: a file here, or a split of a dataset on the Hub.

Called by `calibrate` and `evaluate`. `OWNER/NAME`, with `@REVISION` and `:SPLIT` if need be, names a dataset. Its files are fetched
into the client's cache one by one, as text is read, so that a large dataset costs no more than the samples that are taken of it. No
code of a dataset is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import UsageError, listed, quote
from ..hub.errors import hub_errors
from ..storage.files import expanded, relative_name

# huggingface_hub is imported where it is used: it takes 0.2 s, and a file of text needs none of it.
SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".txt")  # of files that can be read
DEFAULT_SPLIT = "train"
_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]+))?")


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A dataset's name, taken apart; `split` "" where none is named."""

    repo: str
    revision: str | None = None
    split: str = ""


def named_dataset(dataset: str | Path) -> HubDataset | None:
    """Return what a text names on the Hub; None where it is a path: of something that exists, or by its form."""
    text = str(dataset)
    found = _NAME.fullmatch(text)
    if found is None or (not found["split"] and text.endswith(SUFFIXES)) or expanded(text).exists():
        return None
    return HubDataset(found["repo"], found["revision"], found["split"] or "")


def dataset_files(
    dataset: str | Path, *, token: str | None = None, cache_dir: str | Path | None = None
) -> Iterator[Path]:
    """Yield the files of a dataset, in the order of their names; those on the Hub are fetched when their turn comes.

    Raises UsageError for a dataset without such a split, and HubError where the Hub refuses or cannot be reached.
    """
    named = named_dataset(dataset)
    if named is None:
        yield expanded(dataset)
        return
    from huggingface_hub import HfApi, hf_hub_download

    with hub_errors("read dataset", named.repo, named.revision):
        info = HfApi(token=token).dataset_info(named.repo, revision=named.revision)
    names = sorted(relative_name(each.rfilename) for each in info.siblings or ())
    card: Any = info.card_data or {}  # which behaves as a mapping, and says so nowhere
    for name in split_files(named, names, card):
        with hub_errors("fetch dataset", named.repo, named.revision):
            place = hf_hub_download(
                named.repo, name, repo_type="dataset", revision=info.sha, token=token, cache_dir=cache_dir
            )
        yield Path(place)


def split_files(dataset: HubDataset, names: list[str], card: Mapping[str, Any]) -> list[str]:
    """Return the names of a split's files: as the dataset's card tells, else by what files are called.

    Raises UsageError, naming some files, where there is none.
    """
    readable = [name for name in names if name.endswith(SUFFIXES)]
    split = dataset.split or DEFAULT_SPLIT
    patterns = _patterns(card, split)
    if patterns:
        found = [name for name in readable if any(fnmatchcase(name, pattern) for pattern in patterns)]
    else:
        called = re.compile(rf"(.*[/._-])?{re.escape(split)}([/._-].*)?")
        found = [name for name in readable if called.fullmatch(name)]
    if not found and not dataset.split and len(readable) == 1:
        found = readable
    if not found:
        held = f"its text is in {listed(readable)}" if readable else f"it holds no file of {', '.join(SUFFIXES)}"
        raise UsageError(
            f"dataset {quote(dataset.repo)} has no split {quote(split)}: {held}; name one as OWNER/NAME:SPLIT"
        )
    return found


def _patterns(card: Mapping[str, Any], split: str) -> list[str]:
    """Return the patterns of a split's files in the card's default configuration; none where it tells none."""
    configs = [each for each in _list(card.get("configs")) if isinstance(each, dict)]
    default = next((each for each in configs if each.get("default") or each.get("config_name") == "default"), None)
    chosen = default or (configs[0] if configs else {})
    for entry in _list(chosen.get("data_files")):
        if isinstance(entry, dict) and entry.get("split") == split:
            return [each.removeprefix("./") for each in _list(entry.get("path")) if isinstance(each, str)]
    return []


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]

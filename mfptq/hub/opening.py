"""Open a checkpoint by name: a local folder, or a Hub repo read by range, or from the client's cache where it is whole there.

The public functions call `open_checkpoint`. A branch or tag is resolved once; every later request names the commit.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoint.companions import UNWANTED, FileChoice, is_wanted
from ..checkpoint.folder import Checkpoint, Origin, read_checkpoint
from ..checkpoint.source import FolderSource
from ..errors import HubError, SourceError, did_you_mean, quote
from ..limits import MAX_FILES
from ..storage.files import expanded, relative_name
from .answers import PASSING, requested_wait
from .downloads import watched
from .errors import hub_errors, reason
from .file_digests import HubFile
from .ranges import LONGEST_REQUESTED_WAIT, RangeReader
from .source import HubSource, LocalFiles

# huggingface_hub is imported where it is used: it takes 0.2 s, and a checkpoint in a folder needs none of it.
logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_WAITS = (1.0, 2.0)  # seconds; who can fall back on the cache need not wait long
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How to read a repo: `revision` is a branch, tag or commit; the rest as in huggingface_hub.

    With `keep_source` its files go to the client's cache first, whole, and stay there.
    """

    revision: str | None = None
    token: str | None = None
    cache_dir: str | Path | None = None
    keep_source: bool = False


def open_checkpoint(source: str | Path, hub: HubOptions | None = None, choice: FileChoice | None = None) -> Checkpoint:
    """Return the checkpoint at `source`: a folder, else `org/name` or `hf://org/name[@revision]` on the Hub.

    Raises SourceError for what is wrong with the checkpoint, and HubError where the Hub refuses or cannot be reached.
    """
    text = str(source)
    folder = expanded(text)
    if not text.startswith("hf://") and folder.exists():
        return read_checkpoint(Origin(folder), choice=choice)
    options = hub or HubOptions()
    repo_id, _, revision = text.removeprefix("hf://").partition("@")
    if not names_repo(source):
        hint = did_you_mean(folder.name, _folders(folder.parent))
        raise SourceError(f"{quote(text)}: no such folder, and not a Hub repo id (org/name){hint}")
    return _open_repo(repo_id, replace(options, revision=revision or options.revision), choice)


def _folders(parent: Path) -> list[str]:
    """Return the names of the folders in one, of none where it cannot be listed."""
    try:
        return [each.name for each in parent.iterdir() if each.is_dir()]
    except OSError:
        return []


def names_repo(source: str | Path) -> bool:
    """Return whether a text is `org/name` or `hf://org/name`, with or without `@revision`, and nothing here has that name."""
    text = str(source)
    if isinstance(source, Path) or text.startswith((".", "/", "~")):
        return False
    is_id = _REPO_ID.fullmatch(text.removeprefix("hf://").partition("@")[0]) is not None
    return is_id and (text.startswith("hf://") or not expanded(text).exists())


def _open_repo(repo_id: str, options: HubOptions, choice: FileChoice | None) -> Checkpoint:
    from huggingface_hub import constants

    listing = None if options.keep_source or constants.HF_HUB_OFFLINE else _listing(repo_id, options)
    if listing is None:  # where nothing can be asked, what is in the cache must do
        kept = _download(repo_id, options, local_only=not options.keep_source)
        return read_checkpoint(Origin(kept, repo_id, kept.name), choice=choice)
    sha, files = listing
    folder, cached = _cached(repo_id, sha, files.values(), options)
    if folder is not None and all(name in cached or not is_wanted(name) for name in files):
        return read_checkpoint(Origin(folder, repo_id, sha), choice=choice)
    logger.info("reading %s at commit %s by range", repo_id, sha)
    local = FolderSource(folder) if folder is not None else None
    source = HubSource(RangeReader(repo_id, sha, options.token), files, LocalFiles(local, cached))
    return read_checkpoint(Origin(None, repo_id, sha), source, choice)


def _wanted(repo_id: str, options: HubOptions) -> list[HubFile]:
    listing = _listing(repo_id, options)
    return [] if listing is None else [file for file in listing[1].values() if is_wanted(file.name)]


def _listing(repo_id: str, options: HubOptions) -> tuple[str, dict[str, HubFile]] | None:
    """Return the commit and its files, with names that were checked; None where the Hub cannot be reached."""
    from huggingface_hub import HfApi, constants

    api, timeout = HfApi(token=options.token), constants.HF_HUB_ETAG_TIMEOUT
    with hub_errors("read", repo_id, options.revision):
        info = _patiently(lambda: api.model_info(repo_id, revision=options.revision, timeout=timeout))
        if info is None:
            return None
        sha = info.sha
        if not isinstance(sha, str) or not _COMMIT.fullmatch(sha):
            raise HubError(f"the Hub names no commit of {quote(repo_id)}: is HF_ENDPOINT right?")
        tree = _patiently(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=sha)))
    return None if tree is None else (sha, _checked(tree))


def _patiently(ask: Callable[[], Answer]) -> Answer | None:
    """Return an answer of the Hub, asked for again where what is wrong passes; None where there is none to be had."""
    from huggingface_hub import errors

    for wait in (*_WAITS, None):
        try:
            return ask()
        except errors.HfHubHTTPError as error:
            if error.response.status_code not in PASSING:
                raise
            why, wanted = reason(error), requested_wait(error.response.headers)
        except errors.HTTPError as error:  # type: ignore[attr-defined]  # no connection, no answer in time
            why, wanted = reason(error), None
        if wait is None or wait == _WAITS[0]:
            logger.warning("the Hub cannot be reached%s: %s", "" if wait is None else ", trying again", why)
        if wait is not None:
            time.sleep(min(LONGEST_REQUESTED_WAIT, wait if wanted is None else wanted))
    return None


def _checked(tree: Iterable[Any]) -> dict[str, HubFile]:
    """Return the files of a listing by name; no request is made for a name that is not checked."""
    files: dict[str, HubFile] = {}
    for entry in tree:
        if not hasattr(entry, "blob_id"):
            continue  # a folder
        name = relative_name(entry.path)
        if any(part.startswith(".") and part.strip(".") for part in name.split("/")):
            continue  # .gitattributes and the like
        files[name] = HubFile(name, entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
        if len(files) > MAX_FILES:
            raise SourceError(f"the repo holds more than {MAX_FILES} files: is it the right one?")
    return dict(sorted(files.items()))


def _cached(
    repo_id: str, sha: str, files: Iterable[HubFile], options: HubOptions
) -> tuple[Path | None, frozenset[str]]:
    """Return the commit's folder in the client's cache, if there is one, and the files that are whole in it."""
    from huggingface_hub import try_to_load_from_cache

    folder, found = None, set()
    for file in files:
        path = try_to_load_from_cache(repo_id, file.name, cache_dir=options.cache_dir, revision=sha)
        if isinstance(path, str) and Path(path).is_file() and Path(path).stat().st_size == file.size:
            folder = Path(path).parents[file.name.count("/")]
            found.add(file.name)
    return folder, frozenset(found)


def _download(repo_id: str, options: HubOptions, *, local_only: bool) -> Path:
    """Return the folder of a commit in the cache; with `local_only` it must be there, else what is missing is fetched."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    cache = Path(options.cache_dir or hub.constants.HF_HUB_CACHE)
    blobs = cache / f"models--{repo_id.replace('/', '--')}" / "blobs"
    with hub_errors("fetch", repo_id, options.revision), watched(blobs, lambda: _wanted(repo_id, options)) as bars:
        try:
            folder = hub.snapshot_download(
                repo_id,
                revision=options.revision,
                token=options.token,
                cache_dir=options.cache_dir,
                ignore_patterns=list(UNWANTED),
                local_files_only=local_only,
                tqdm_class=bars,
            )
        except errors.LocalEntryNotFoundError as error:
            why = f": {reason(error.__cause__)}" if error.__cause__ is not None and not local_only else ""
            raise HubError(
                f"there is no folder {quote(repo_id)}, and as a Hub repo it is not complete in the cache and "
                f"cannot be reached{why}"
            ) from None
    return Path(folder)

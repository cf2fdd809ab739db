"""Sources by name: a local folder, or a Hub repo through huggingface_hub's own cache, pinned to one commit."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import HubError, SourceError, quote
from ..storage.files import expanded
from .folder import Checkpoint, Origin, read_checkpoint

logger = logging.getLogger(__name__)

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = [
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "*.md",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
]
_UNWANTED = ["original/*", "consolidated*", "*/*"]


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How to fetch a repo: `revision` is a branch, tag or commit; the rest as in huggingface_hub."""

    revision: str | None = None
    token: str | None = None
    cache_dir: str | Path | None = None


def open_checkpoint(source: str | Path, hub: HubOptions | None = None) -> Checkpoint:
    """Return the checkpoint at `source`: a folder, else `org/name` or `hf://org/name[@revision]` on the Hub.

    Raises SourceError for what is wrong with the checkpoint, and HubError where the Hub refuses or cannot be reached.
    """
    text = str(source)
    folder = expanded(text)
    if not text.startswith("hf://") and folder.exists():
        return read_checkpoint(Origin(folder))
    options = hub or HubOptions()
    repo_id, _, revision = text.removeprefix("hf://").partition("@")
    if isinstance(source, Path) or not _REPO_ID.fullmatch(repo_id) or text.startswith((".", "/", "~")):
        raise SourceError(f"{quote(text)}: no such folder, and not a Hub repo id (org/name)")
    folder = _download(repo_id, HubOptions(revision or options.revision, options.token, options.cache_dir))
    return read_checkpoint(Origin(folder, repo_id, folder.name))


def _download(repo_id: str, options: HubOptions) -> Path:
    """Fetch the files that a conversion needs, all of one commit; the folder's name in the cache is its sha."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    logger.info("fetching %s from the Hub", repo_id)
    try:
        folder = hub.snapshot_download(
            repo_id,
            revision=options.revision,
            token=options.token,
            cache_dir=options.cache_dir,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
        )
    except errors.GatedRepoError:
        raise HubError(
            f"{quote(repo_id)} is gated: ask for access on its page, then give a token or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{quote(repo_id)} has no revision {quote(options.revision)}") from None
    except errors.RepositoryNotFoundError:
        raise HubError(f"no folder and no Hub repo named {quote(repo_id)} (private ones need a token)") from None
    except errors.LocalEntryNotFoundError as error:
        why = f": {_first_line(error.__cause__)}" if isinstance(error.__cause__, Exception) else ""
        raise HubError(
            f"there is no folder {quote(repo_id)}, and as a Hub repo it is not complete in the cache and cannot be reached{why}"
        ) from None
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:  # type: ignore[attr-defined]
        raise HubError(f"cannot fetch {quote(repo_id)}: {_first_line(error)}") from None
    return Path(folder)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return quote(lines[0]) if lines else type(error).__name__

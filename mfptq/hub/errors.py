"""Turn what huggingface_hub raises into one line that says what to do; called by everything that talks to the Hub.

A message never holds a token, nor the signed address of a file, which is as good as one.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from ..errors import HubError, MfptqError, quote

# huggingface_hub is imported where it is used: it takes 0.2 s, and is there by then.
_ADDRESS = re.compile(r"(?:https?|wss?)://\S+")
_TOKEN = re.compile(r"hf_\w+")


@contextlib.contextmanager
def hub_errors(action: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn the client's errors inside the block into HubError; `action` is what was being done, as `read`."""
    from huggingface_hub import errors

    try:
        yield
    except MfptqError:
        raise
    except errors.GatedRepoError:
        raise HubError(
            f"{quote(repo_id)} is gated: accept its conditions on its page, then give a token (HF_TOKEN, or `hf auth login`)"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{quote(repo_id)} has no revision {quote(revision)}: give a branch, tag or commit") from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"no folder and no Hub repo named {quote(repo_id)}: check the spelling; a private repo needs a token that may read it"
        ) from None
    except (errors.HTTPError, errors.HFValidationError, errors.OfflineModeIsEnabled, OSError) as error:  # type: ignore[attr-defined]
        raise HubError(f"cannot {action} {quote(repo_id)}: {reason(error)}") from None
    except RuntimeError as error:  # the client wraps what goes wrong with an upload
        if error.__cause__ is None:
            raise
        raise HubError(f"cannot {action} {quote(repo_id)}: {reason(error.__cause__)}") from None


def reason(error: BaseException) -> str:
    """Return an error's first line, without addresses and tokens."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401:
        return "the Hub does not accept the token (401): log in again, or give another one"
    if status == 403:
        return "the token may not do this (403): give one with the right permission"
    if status == 429:
        return (
            "the Hub asks for fewer requests (429), in spite of waiting: try again later, or log in for a higher limit"
        )
    lines = str(error).strip().splitlines()
    text = _TOKEN.sub("hf_...", _ADDRESS.sub("(address)", lines[0])) if lines else ""
    return quote(text) if text else type(error).__name__

"""Publish an output to a Hub repo: large files one by one, then one commit that makes the whole checkpoint visible.

`push` does it for a finished folder, `execution.whole_run` while later shards are made (`uploads`). Until the one commit, which
names its parent, the branch shows nothing of it. Success is claimed only after the Hub's listing agrees with every file here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._version import __version__
from ..checkpoint.companions import CONFIG
from ..errors import DestinationError, HubError, VerificationError, quote
from ..hub.errors import hub_errors
from ..limits import MAX_COMPANION_BYTES
from ..storage.files import beneath, read_small
from .claim import CARD, EVALUATION, MANIFEST, REPORT
from .evaluations import read_evaluations
from .manifest import manifest_entries, manifest_faults

POLL_SECONDS = 0.5
_OF_EVERY_REPO = {".gitattributes", "README.md"}


@dataclass(frozen=True, slots=True)
class PushTarget:
    """Where an output goes: a repo, made if need be, and a branch; with `create_pr`, a pull request instead of a commit."""

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    token: str | None = None


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file by what it holds: SHA-256, hexadecimal, and size in bytes."""

    name: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Pushed:
    """A finished publication: the commit, the page that shows it, and how many files it has."""

    repo_id: str
    commit: str
    url: str
    files: int


Progress = Callable[[StoredFile | None, int, int], object]


def push(output: str | Path, target: PushTarget, progress: Progress | None = None) -> Pushed:
    """Publish a finished output folder and return its commit; what is on the Hub already is not sent again.

    `progress` is called in this thread, with each uploaded file and every POLL_SECONDS with None, and told how many bytes of how
    many are there. Raises DestinationError for a folder that is no finished output, VerificationError if it is damaged, and HubError.
    """
    root = Path(output)
    missing = [name for name in (CONFIG, MANIFEST, REPORT) if not (root / name).is_file()]
    if missing:
        raise DestinationError(f"{quote(root)} is no finished output: {quote(missing[0])} is missing; convert first")
    _, faults = manifest_faults(root)
    if faults:
        raise VerificationError(f"{quote(root)} is damaged and was not pushed: {faults[0]}")
    publisher = Publisher(root, target)
    entries = manifest_entries(root) or {}
    names = [*entries, MANIFEST, *([EVALUATION] if read_evaluations(root) else [])]
    files = [_on_disk(root, name, entries) for name in sorted(names)]
    publisher.open()
    publisher.refuse_foreign(files)
    done, total, tell = 0, sum(file.size for file in files), progress or (lambda *_: None)
    with ThreadPoolExecutor(1) as pool:
        for file in sorted(files, key=lambda each: -each.size):
            upload = pool.submit(publisher.upload, file)
            while wait([upload], timeout=POLL_SECONDS).not_done:
                tell(None, done, total)
            upload.result()
            done += file.size
            tell(file, done, total)
    return publisher.commit(files)


class Publisher:
    """One publication, by one thread at a time: `open`, `upload` for every large file, `commit`."""

    def __init__(self, root: Path, target: PushTarget) -> None:
        from huggingface_hub import HfApi

        self.root = root
        self.target = target
        self._api = HfApi(token=target.token)
        self.parent: str | None = None
        self.listed: dict[str, Any] = {}
        self._operations: dict[str, Any] = {}

    def look(self) -> bool:
        """Look at what the repo holds, if it is there, and make nothing; return whether it is there."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        repo, revision = self.target.repo_id, self.target.revision
        self._check_token()
        with hub_errors("write to", repo, revision):
            try:
                self.parent = self._api.model_info(repo, revision=revision).sha
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return False
            self.listed = self._listed(self.parent)
        return True

    def _check_token(self) -> None:
        from huggingface_hub import get_token

        if not (self.target.token or get_token()):
            raise HubError(
                f"publishing to {quote(self.target.repo_id)} needs a token that may write: give one (HF_TOKEN, or `hf auth login`)"
            )

    def open(self) -> None:
        """Make the repo and the branch if need be, and look at what it holds."""
        repo, revision = self.target.repo_id, self.target.revision
        with hub_errors("write to", repo, revision):
            self._api.create_repo(repo, private=self.target.private or None, exist_ok=True)
            if revision is not None and not self.target.create_pr:
                self._make_branch(revision)
            self.parent = self._api.model_info(repo, revision=revision).sha
            self.listed = self._listed(self.parent)

    def _make_branch(self, name: str) -> None:
        """Make a branch, unless it is there, of the repo's first commit: what its other branches hold is no part of an output."""
        from huggingface_hub.errors import RevisionNotFoundError

        repo = self.target.repo_id
        with suppress(RevisionNotFoundError):
            self._api.model_info(repo, revision=name)
            return
        first = self._api.list_repo_commits(repo)[-1].commit_id
        self.listed = self._listed(first)
        self.refuse_foreign()
        self._api.create_branch(repo, branch=name, revision=first, exist_ok=True)

    def refuse_foreign(self, own: Iterable[StoredFile] = ()) -> None:
        """Raise HubError for a repo that holds anything but the files `own`, unless by a pull request."""
        repo, branch = self.target.repo_id, self.target.revision
        same = {file.name for file in own if file.name in self.listed and self._agrees(self.listed[file.name], file)}
        foreign = sorted(self.listed.keys() - same - _OF_EVERY_REPO)
        if foreign and not self.target.create_pr:
            where = f"{quote(repo)}, branch {quote(branch)}," if branch is not None else quote(repo)
            raise HubError(
                f"{where} holds other files already ({quote(foreign[0])}): push to an empty repo, or open a pull request"
            )

    def upload(self, file: StoredFile) -> None:
        """Send a file whose content goes to the large store; a small one waits for the commit."""
        from huggingface_hub import CommitOperationAdd

        path = beneath(self.root, file.name)
        with hub_errors("upload to", self.target.repo_id, self.target.revision):
            operation = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(path))
            self._api.preupload_lfs_files(
                self.target.repo_id, [operation], revision=self.target.revision, create_pr=self.target.create_pr
            )
            if operation.upload_info.sha256.hex() != file.sha256:
                raise VerificationError(f"{quote(file.name)} changed while it was being uploaded: push it again")
        self._operations[file.name] = operation

    def trust(self, file: StoredFile) -> bool:
        """Take a file for uploaded by an earlier run, if the Hub still has its content; it need not be here any more."""
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

        info = UploadInfo(sha256=bytes.fromhex(file.sha256), size=file.size, sample=b"")
        with hub_errors("write to", self.target.repo_id, self.target.revision):
            objects, *_ = post_lfs_batch_info(
                [info], token=self.target.token, repo_type="model", repo_id=self.target.repo_id
            )
        if any(each.get("actions") for each in objects):
            return False
        operation = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=b"")
        operation.upload_info = info  # what the client itself leaves of an operation once its content is stored
        operation._upload_mode, operation._is_uploaded = "lfs", True
        self._operations[file.name] = operation
        return True

    def commit(self, files: Iterable[StoredFile]) -> Pushed:
        """Make everything visible in one commit, and compare the Hub's listing with every file."""
        from huggingface_hub import CommitOperationAdd

        known = {file.name: file for file in files}
        repo = self.target.repo_id
        for name in known.keys() - self._operations.keys():
            path = beneath(self.root, name)
            self._operations[name] = CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
        with hub_errors("commit to", repo, self.target.revision):
            made = self._api.create_commit(
                repo,
                list(self._operations.values()),
                commit_message=f"NVFP4 by mfptq {__version__}",
                revision=self.target.revision,
                create_pr=self.target.create_pr,
                parent_commit=None if self.target.create_pr else self.parent,
            )
            listed = self._listed(made.pr_revision or made.oid)
        for name, file in known.items():
            if name not in listed or not self._agrees(listed[name], file):
                raise HubError(f"{quote(repo)} shows another {quote(name)} than was pushed: push again")
        return Pushed(repo, made.oid, made.pr_url or made.commit_url, len(known))

    def _listed(self, revision: str | None) -> dict[str, Any]:
        tree = self._api.list_repo_tree(self.target.repo_id, recursive=True, revision=revision)
        return {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}

    def _agrees(self, entry: Any, file: StoredFile) -> bool:
        """Return whether the Hub's listing names the very content of a file."""
        if entry.size != file.size:
            return False
        if entry.lfs is not None:
            return bool(entry.lfs.sha256 == file.sha256)
        data = read_small(beneath(self.root, file.name), MAX_COMPANION_BYTES)
        return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())


def _on_disk(root: Path, name: str, entries: Mapping[str, str]) -> StoredFile:
    """Return a file with its digest: that of the manifest, but for the card, which people edit, and what is not listed."""
    path, sha256 = beneath(root, name), entries.get(name)
    if sha256 is None or name == CARD:
        sha256 = hashlib.sha256(read_small(path, MAX_COMPANION_BYTES)).hexdigest()
    return StoredFile(name, sha256, path.stat().st_size)

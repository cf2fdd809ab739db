"""Sort a checkpoint's files by one rule, for folders and Hub repos alike: shards, companions to copy, and what is left out.

`folder.read_checkpoint` calls it with names and sizes; nothing here opens a file. What is left out is never left out without a
word: its name and size go into the plan.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import IndexMismatchError, SourceError, UsageError, quote
from ..limits import MAX_COMPANION_BYTES

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SMOOTHING = "mfptq_smoothing.json"  # the factors of an output whose inputs are smoothed
MODULES = "modules.json"  # of sentence-transformers: names folders that belong to the model
INDEX_SUFFIX = ".safetensors.index.json"
SHARD_SUFFIX = ".safetensors"
PARAMS = "params.json"  # Mistral's, and Meta's
GGUF = (".gguf", ".ggml")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_WEIGHTS = (
    *PICKLES, SHARD_SUFFIX, *GGUF, ".onnx", ".onnx_data", ".onnx.data", ".h5", ".hdf5", ".msgpack", ".ot",
    ".index.json", ".npz", ".npy", ".tflite", ".mlmodel", ".engine", ".nemo", ".pb",
)  # fmt: skip
_OTHER_FORMAT = "consolidated"  # Mistral's own, beside the Hugging Face files
_OTHER_FOLDERS = ("original",)  # Meta's own
_REPLACED = (
    CONFIG, INDEX, "README.md", "SHA256SUMS", "mfptq_report.json", SMOOTHING, "mfptq_evaluation.json",
)  # fmt: skip
REPLACED_FOLDED = {name.casefold() for name in _REPLACED}  # some systems take README.md and readme.md for one file
# What other tools wrote of how this checkpoint was quantized, and what Mistral's own format adds: a second truth beside ours.
_OF_OTHER_TOOLS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "recipe.yaml", PARAMS)
UNWANTED = (*(f"*{suffix}" for suffix in _WEIGHTS if suffix not in (SHARD_SUFFIX, ".index.json")), "original/*", ".*")
_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True, slots=True)
class FileChoice:
    """What the user said of safetensors files that no index names: take their tensors in, or leave them out.

    `output` are the shards of a finished output of the source: then the files that it took in are taken in again. With
    `follow_links` the files of a folder may be links that lead out of it.
    """

    include: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    output: frozenset[str] | None = None
    follow_links: bool = False

    def includes(self, name: str) -> bool:
        """Return whether a file is to be taken in."""
        return name in self.include or (self.output is not None and name in self.output)

    def check(self, files: Collection[str]) -> None:
        """Raise UsageError for a name that no safetensors file beside the config has."""
        for name in (*self.include, *self.skip):
            if name not in files or not name.endswith(SHARD_SUFFIX) or "/" in name:
                raise UsageError(
                    f"{quote(name)} is to be included or skipped, but the source has no such safetensors file"
                )
        both = sorted(set(self.include) & set(self.skip))
        if both:
            raise UsageError(f"{quote(both[0])} is to be both included and skipped: choose one")


def is_wanted(name: str) -> bool:
    """Return whether a file belongs into the Hub's cache where the source is to be kept."""
    return not any(fnmatchcase(name, pattern) for pattern in UNWANTED)


def top_level(files: Iterable[str]) -> list[str]:
    """Return the names that lie in no sub-folder."""
    return [name for name in files if "/" not in name]


def find_index(files: Iterable[str]) -> str | None:
    """Return the index that counts: Hugging Face's own, whatever other formats' lie beside it."""
    indexes = [name for name in top_level(files) if name.endswith(INDEX_SUFFIX)]
    if INDEX in indexes:
        return INDEX
    foreign = [name for name in indexes if not name.startswith(_OTHER_FORMAT)]
    if foreign:
        raise IndexMismatchError(f"expected an index named {INDEX}, got {', '.join(map(quote, foreign))}")
    return None


def unindexed_shards(files: Iterable[str], choice: FileChoice) -> list[str]:
    """Return the shards of a checkpoint without an index, in name order; raises SourceError where one is missing."""
    names = top_level(files)
    found = [name for name in names if name.endswith(SHARD_SUFFIX) and name not in choice.skip]
    shards = [name for name in found if not name.startswith(_OTHER_FORMAT)] or found
    if not shards:
        raise SourceError(f"no safetensors file here: expected {SINGLE} or shards with {INDEX}{unread_hint(names)}")
    if SINGLE in shards:
        return [SINGLE]
    _check_numbers(shards)
    return shards


def unread_hint(names: Iterable[str]) -> str:
    """Return what to add to a message that something is missing: which weights of another kind there are; "" for none."""
    found = sorted(names)
    for endings, kind in ((GGUF, "GGUF files"), (PICKLES, "pickle checkpoints")):
        first = next((name for name in found if name.endswith(endings)), None)
        if first is not None:
            return f"; {kind} ({quote(first)}) are not read: convert the original in safetensors"
    return f"; {PARAMS} is of a vendor's own format: convert the one of Hugging Face" if PARAMS in found else ""


def _check_numbers(shards: Iterable[str]) -> None:
    """Raise SourceError where files named i of N are not all there."""
    series: dict[tuple[str, str], set[int]] = {}
    for name in shards:
        match = _NUMBERED.fullmatch(name)
        if match is not None:
            series.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (stem, total), numbers in series.items():
        count = int(total) if len(total) < 7 else 0
        missing = next((number for number in range(1, count + 1) if number not in numbers), None)
        if missing is not None:
            raise SourceError(
                f"shard {missing} of {count} is missing ({quote(stem)}-...), and there is no {INDEX}: download it again"
            )


def unnamed_shards(files: Iterable[str], shards: Collection[str], choice: FileChoice) -> list[str]:
    """Return the safetensors files beside the shards that may hold tensors nobody else has."""
    names = top_level(files)
    others = [name.removesuffix(INDEX_SUFFIX) for name in names if name.endswith(INDEX_SUFFIX) and name != INDEX]
    foreign = (_OTHER_FORMAT, *others)
    return [
        name
        for name in names
        if name.endswith(SHARD_SUFFIX)
        and name not in shards
        and name not in choice.skip
        and (choice.includes(name) or (choice.output is None and not name.startswith(foreign)))
    ]


@dataclass(frozen=True, slots=True)
class Sorted:
    """Files to copy, by name, and files that are left out, with their sizes in bytes."""

    companions: tuple[str, ...]
    left_out: Mapping[str, int]


def sort_files(files: Mapping[str, int], shards: Collection[str], module_folders: Collection[str]) -> Sorted:
    """Return what becomes of every file that is neither a shard nor written anew.

    Copied: whatever is small and no weights, in sub-folders too. A sub-folder that holds weights is another model or another
    format, and is left out whole, unless `modules.json` names it as a part of this one.
    """
    foreign = {_folder(name) for name, size in files.items() if "/" in name and not _is_small_file(name, size)}
    foreign = (foreign | set(_OTHER_FOLDERS)) - set(module_folders)
    companions: list[str] = []
    left_out: dict[str, int] = {}
    for name, size in files.items():
        if name in shards or name.casefold() in REPLACED_FOLDED:
            continue
        of_module = _folder(name) in module_folders and name.endswith(SHARD_SUFFIX) and size <= MAX_COMPANION_BYTES
        small = _is_small_file(name, size) and _folder(name) not in foreign and name not in _OF_OTHER_TOOLS
        if small or of_module:
            companions.append(name)
        else:
            left_out[name] = size
    return Sorted(tuple(companions), left_out)


def _folder(name: str) -> str:
    """Return the first folder of a name; empty where it lies in none."""
    return name.partition("/")[0] if "/" in name else ""


def _is_small_file(name: str, size: int) -> bool:
    return size <= MAX_COMPANION_BYTES and not name.lower().endswith(_WEIGHTS)

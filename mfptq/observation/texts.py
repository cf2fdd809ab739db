"""Read calibration text as token ids: JSON lines, parquet or plain text, only as far as it is needed.

A row is a `text`, a conversation in `messages`, or token ids in `input_ids`; a line of JSON may also be a bare list of
ids. Plain text is one long document, cut into sequences. A multimodal processor encodes as a tokenizer does, but gives
nested lists with a batch dimension of its own: they are taken apart here, so that everything after sees flat ids.

Called by `calibrate` and `evaluate`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..checkpoint.strict_json import StrictJsonError, parse_json
from ..errors import SourceError, UsageError, listed, quote

TokenIds: TypeAlias = npt.NDArray[np.int64]
Encoder: TypeAlias = Any  # a tokenizer or a processor of transformers

COLUMNS = ("input_ids", "messages", "text")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_CHUNK = 2**16
PARQUET_ROWS = 64


@dataclass(frozen=True, slots=True)
class Samples:
    """Token ids of each sample, `[length]` int64, and the SHA-256 of them all, hexadecimal."""

    ids: tuple[TokenIds, ...]
    digest: str

    @property
    def highest(self) -> int:
        """The highest token id."""
        return max(int(ids.max()) for ids in self.ids)


def read_samples(dataset: Path | Iterable[Path], encoder: Encoder, *, samples: int, max_seq_length: int) -> Samples:
    """Return the first `samples` samples of a dataset, of one or several files, none empty, each cut to `max_seq_length` tokens.

    Fewer if the dataset ends before; raises UsageError if it cannot be read or holds none.
    """
    read: list[Path] = []

    def sequences() -> Iterator[TokenIds]:
        for path in [dataset] if isinstance(dataset, Path) else dataset:
            read.append(path)
            yield from _sequences(path, encoder, max_seq_length)

    found = tuple(islice(sequences(), samples))
    if not found:
        if not flat_ids(encoder(text="a")["input_ids"]):  # transformers makes an empty one where its files are missing
            raise SourceError("the model has no tokenizer: copy its files to the model, or give rows of token ids")
        raise UsageError(f"dataset {listed([str(path) for path in read])} holds no text")
    return Samples(found, _digest(found))


def _digest(samples: Iterable[TokenIds]) -> str:
    digest = hashlib.sha256()
    for ids in samples:
        digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes())
    return digest.hexdigest()


def _sequences(path: Path, encoder: Encoder, length: int) -> Iterator[TokenIds]:
    """Yield a file's samples, each cut to `length` tokens."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _encoded(path, _parquet_rows(path), encoder, length)
        elif suffix in JSON_SUFFIXES:
            yield from _encoded(path, _json_rows(path), encoder, length)
        else:
            yield from _cut(path, encoder, length)
    except OSError as error:
        raise UsageError(f"dataset {quote(path)}: cannot read it: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"dataset {quote(path)}: not UTF-8 near byte {error.start}") from None


def _encoded(path: Path, rows: Iterable[Any], encoder: Encoder, length: int) -> Iterator[TokenIds]:
    for number, row in enumerate(rows, 1):
        try:
            ids = row_ids(row, encoder)[:length]
        except UsageError as error:
            raise UsageError(f"dataset {quote(path)} row {number}: {error}") from None
        if ids:
            yield np.array(ids, np.int64)


def _json_rows(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield parse_json(line, infinity=True)
                except StrictJsonError as error:
                    raise UsageError(f"dataset {quote(path)} line {number}: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise UsageError("a parquet dataset needs pyarrow: pip install pyarrow, or give JSON lines") from None
    try:
        with parquet.ParquetFile(path) as file:
            known = [name for name in COLUMNS if name in file.schema_arrow.names]
            if not known:
                raise UsageError(f"dataset {quote(path)} has no column {', '.join(COLUMNS)}")
            for batch in file.iter_batches(PARQUET_ROWS, columns=known[:1]):
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise UsageError(f"dataset {quote(path)}: {quote(error)}") from None


def _cut(path: Path, encoder: Encoder, length: int) -> Iterator[TokenIds]:
    """Yield plain text in sequences of `length` tokens, each beginning as the encoder begins a text."""
    leading = _leading_ids(encoder)[: length - 1]
    step = length - len(leading)
    rest: list[int] = []
    with path.open(encoding="utf-8") as file:
        while lines := file.readlines(TEXT_CHUNK):
            rest += flat_ids(encoder(text="".join(lines), add_special_tokens=False)["input_ids"])
            while len(rest) >= step:
                yield np.array(leading + rest[:step], np.int64)
                rest = rest[step:]
    if rest:
        yield np.array(leading + rest, np.int64)


def _leading_ids(encoder: Encoder) -> list[int]:
    """Return the ids that the encoder puts before every text, as a beginning-of-sequence token."""
    tokenizer: Any = getattr(encoder, "tokenizer", encoder)
    first = flat_ids(encoder(text="a")["input_ids"])[:1]
    return first if first and first[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else []


def row_ids(row: Any, encoder: Encoder) -> list[int]:
    """Return the token ids of one row; raises UsageError for a row that is no text, conversation or list of ids."""
    if isinstance(row, Mapping):
        column = next((name for name in COLUMNS if row.get(name) is not None), None)
        if column is None:
            got = ", ".join(quote(name) for name in list(row)[:8]) or "nothing"
            raise UsageError(f"expected one of {', '.join(COLUMNS)}, got {got}")
        value = row[column]
    else:
        column, value = ("text" if isinstance(row, str) else "input_ids"), row
    if column == "input_ids":
        return flat_ids(value)
    if column == "messages":
        return _conversation_ids(value, encoder)
    if not isinstance(value, str):
        raise UsageError(f"its text is {quote(type(value).__name__)}, expected a string")
    return flat_ids(encoder(text=value)["input_ids"])


def _conversation_ids(messages: Any, encoder: Encoder) -> list[int]:
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise UsageError("its messages are not a list of a role and a text each (images and sound are not taken)")
    if not getattr(encoder, "chat_template", None):
        raise UsageError("messages need a chat template, which the model does not have: give a text column")
    return flat_ids(encoder.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, list):
        return all(isinstance(part, Mapping) and part.get("type") == "text" for part in content)
    return content is None or isinstance(content, str)


def flat_ids(ids: Any) -> list[int]:
    """Return ids as a flat list, whatever batch dimensions of one they come in: lists, arrays or tensors."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    while isinstance(ids, (list, tuple)) and len(ids) == 1 and isinstance(ids[0], (list, tuple)):
        ids = ids[0]
    if not isinstance(ids, (list, tuple)) or not all(type(number) is int and number >= 0 for number in ids):
        raise UsageError("its token ids are not one list of whole numbers")
    return list(ids)

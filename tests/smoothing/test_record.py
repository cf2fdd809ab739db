"""The record of factors: what is written is read again, and what makes no sense is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mfptq.checkpoint.companions import SMOOTHING
from mfptq.checkpoint.source import FolderSource
from mfptq.encodings.smoothed import Powers
from mfptq.errors import SourceError
from mfptq.smoothing.record import read_record, record_text


def read(folder: Path, text: str) -> dict[str, Powers]:
    (folder / SMOOTHING).write_text(text)
    source = FolderSource(folder)
    try:
        return read_record(source)
    finally:
        source.close()


def test_what_is_written_is_read_again(tmp_path):
    exponents = np.arange(-26, 27, dtype=np.int8)
    powers = {
        "norm": Powers(None, -exponents[None], 1.0),
        "rows": Powers(exponents, None),
        "stack": Powers(exponents, np.stack([exponents, -exponents])),
    }
    text = record_text(powers)
    assert len(json.loads(text)["vectors"]) == 2
    found = read(tmp_path, text)
    assert found.keys() == powers.keys()
    for name, each in powers.items():
        assert found[name].offset == each.offset
        for one, other in ((found[name].rows, each.rows), (found[name].columns, each.columns)):
            assert (one is None) == (other is None)
            assert one is None or np.array_equal(one, other)


def test_letters_are_what_the_format_says(tmp_path):
    entry = {"rows": 0, "columns": [1], "offset": 1.0}
    found = read(tmp_path, json.dumps({"format": 1, "vectors": [".Ab", "za.BZ"], "tensors": {"x": entry}}))["x"]
    assert found.rows.tolist() == [0, 1, -2]
    assert found.columns.tolist() == [[-26, -1, 0, 2, 26]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format '2', expected 1"),
        ({"vectors": ["A?"]}, "is damaged"),
        ({"vectors": ["A\u00e4"]}, "is damaged"),
        ({"vectors": 5}, "is damaged"),
        ({"vectors": []}, "is damaged"),
        ({"tensors": {"x": {"columns": [0, 1]}}, "vectors": ["A", "AB"]}, "is damaged"),
        ({"tensors": {"x": 3}}, "is damaged"),
        ({"tensors": {"x": {"rows": 0, "offset": "much"}}}, "is damaged"),
    ],
)
def test_records_that_make_no_sense_are_refused(change, message, tmp_path):
    sound = {"format": 1, "vectors": ["A"], "tensors": {"x": {"rows": 0}}}
    assert read(tmp_path, json.dumps(sound))["x"].rows.tolist() == [1]
    with pytest.raises(SourceError, match=message):
        read(tmp_path, json.dumps(sound | change))


def test_no_record_means_no_factors(tmp_path):
    source = FolderSource(tmp_path)
    assert read_record(source) == {}
    source.close()

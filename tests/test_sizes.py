"""Sizes and times: what people write is understood, what is shown is rounded to the side that is true."""

from __future__ import annotations

import pytest

from mfptq.errors import UsageError
from mfptq.sizes import duration, parse_size, size_text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9), ("512MiB", 2**29), ("1.5 GiB", 3 * 2**29), ("1000", 1000), (7, 7), ("2gb", 2 * 10**9),
        ("4G", 4 * 10**9), ("1g", 10**9), ("300M", 3 * 10**8), ("5k", 5000), ("1Gi", 2**30), ("8B", 8), ("1 TiB", 2**40),
    ],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4 parsecs", "GB", "-1GB", "1e9", "0x10", "1iB", "1PB", "4GG"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"size .* is not understood: write it as 500MB, 4G or 1GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text", "up"),
    [
        (0, "0 B", "0 B"), (999, "999 B", "999 B"), (1000, "1.00 kB", "1.00 kB"), (1234, "1.23 kB", "1.24 kB"),
        (97_310_001, "97.3 MB", "97.4 MB"), (512_400_000, "512 MB", "513 MB"), (54_740_000_000, "54.7 GB", "54.8 GB"),
        (1_580_000_000_000, "1580 GB", "1580 GB"),
    ],
)  # fmt: skip
def test_sizes_are_shown_with_three_digits(size: int, text: str, up: str) -> None:
    assert (size_text(size), size_text(size, up=True)) == (text, up)


@pytest.mark.parametrize(("seconds", "text"), [(0.1, "1 s"), (61, "61 s"), (600, "10 min"), (9000, "2.5 h")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text

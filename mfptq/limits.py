"""The limits that keep any source, hostile or broken, within bounded time and memory."""

from __future__ import annotations

MAX_HEADER_BYTES = 100_000_000
MAX_FILE_NAME_BYTES = 255
MAX_TENSOR_NAME_BYTES = 1_024
MAX_DIMENSIONS = 8
MAX_DIMENSION = 2**63 - 1
MAX_TENSORS = 2_000_000
MAX_INDEX_BYTES = 256 * 2**20
MAX_CONFIG_BYTES = 16 * 2**20
MAX_SCALES_BYTES = 64 * 2**20
MAX_RULES = 1_000
MAX_RULE_SECONDS = 2.0
MAX_INTEGER_DIGITS = 19

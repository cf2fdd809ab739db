"""Show the progress of downloads by huggingface_hub as lines, where its bars are not drawn. Called by commands that read from the Hub."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def download_lines(*, quiet: bool) -> Iterator[None]:
    """Let what is logged of downloads appear on stderr, off a terminal and unless `quiet`, for as long as the block lasts."""
    if quiet or sys.stderr is None or sys.stderr.isatty():
        yield
        return
    logger, handler = logging.getLogger("mfptq.checkpoint.downloads"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("mfptq: %(message)s"))
    level, logger.propagate = logger.level, False
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = True

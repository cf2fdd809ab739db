"""Types whose NVFP4 checkpoints transformers 5.24 cannot load or compute, whoever made them, and why."""

from __future__ import annotations

KNOWN: dict[str, str] = {}

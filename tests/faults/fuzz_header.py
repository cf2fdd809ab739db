"""Coverage-guided fuzzing of the header parser with atheris: `python -m tests.faults.fuzz_header RUNS SEED CORPUS`."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mfptq.checkpoint.header", "mfptq.checkpoint.strict_json", "mfptq.errors"]):
    import mfptq.checkpoint.header
    import mfptq.checkpoint.strict_json  # noqa: F401

from tests.faults.malformed import mutate, outcome, seeds


def one_input(blob: bytes) -> None:
    """Refuse with HeaderError or accept what safetensors accepts; anything else ends the run."""
    outcome(blob)


def custom_mutator(blob: bytes, limit: int, seed: int) -> bytes:
    """Change the header's JSON two times of three, bytes anywhere the third."""
    if seed % 3:
        return mutate(blob, random.Random(seed), limit=limit)
    return atheris.Mutate(blob, limit)


def main() -> None:
    """Fuzz; libFuzzer counts the inputs and ends with an error for the first that breaks a guarantee."""
    runs, seed, corpus = sys.argv[1:4]
    for number, blob in enumerate(seeds()):
        (Path(corpus) / f"seed{number}").write_bytes(blob)
    options = [f"-runs={runs}", f"-seed={seed}", "-max_len=4096", "-timeout=5", "-rss_limit_mb=2048", "-print_final_stats=1",
               "-verbosity=1"]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, corpus], one_input, custom_mutator=custom_mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""Run the command line with `python -m mfptq`."""

from .cli import run

run()

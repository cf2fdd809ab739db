"""Run the command line with `python -m mfptq`."""

from .cli.main import run

run()

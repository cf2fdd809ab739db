"""Put the commands together, define `inspect`, `verify` and `demo`, and turn every error into one line.

Thin: options become keywords of the library's functions. Data goes to stdout, everything else to stderr. Nothing heavy may
be imported before a command needs it.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from .._version import __version__
from ..errors import MfptqError, UsageError, VerificationError, counted, quote
from ..execution.memory_budget import memory_errors
from .calibrate import calibrate
from .calibration import calibration
from .check import check as check_command
from .cluster import finish
from .columns import fitted
from .convert import convert, plan
from .evaluate import evaluate
from .groups import Commands
from .options import json_option, links_option, source_options
from .process import (
    LOG_LEVELS,
    STOPPED,
    Interrupted,
    handle_signals,
    set_up_logging,
    tune_interpreter,
)
from .progress import progress
from .push import push
from .recipe import recipe
from .repair import repair
from .report import compare, report


def run() -> None:
    """Run the command line; every error of ours is one line on stderr and its exit code."""
    tune_interpreter()
    if sys.stderr is None or not sys.stderr.isatty():  # huggingface_hub draws its bars into files too
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        handle_signals()
        with memory_errors():
            main.main(standalone_mode=False)
        if sys.stdout is None:
            _fail("the work is done, but stdout is closed", 5)
        sys.stdout.flush()
    except MfptqError as error:
        _fail(str(error), error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (Interrupted, click.Abort) as stop:
        _fail(STOPPED, getattr(stop, "exit_code", 130))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(5)
    except OSError as error:
        _fail(f"cannot write the output: {error.strerror}", 5)


def _fail(message: str, code: int) -> None:
    with suppress(OSError):  # the exit code tells, where stderr cannot
        click.echo(f"mfptq: error: {message}", err=True)
    sys.exit(code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mfptq")
@click.option("-v", "--verbose", is_flag=True, help="Say what is being done: the same as --log-level info.")
@click.option(
    "--log-level", type=click.Choice(LOG_LEVELS), help="Least level of the messages on stderr; default warning."
)
def main(verbose: bool, log_level: str | None) -> None:
    """Convert Hugging Face checkpoints to NVFP4 without building the model.

    Example: mfptq convert Qwen/Qwen3.5-27B Qwen3.5-27B-NVFP4
    """
    set_up_logging(log_level or ("info" if verbose else "warning"))


CONVERTING = (convert, plan, finish, push, recipe)
CALIBRATING = (calibrate, calibration)
CHECKING = (check_command, repair, evaluate, report, compare)
for command in (*CONVERTING, *CALIBRATING, *CHECKING):
    main.add_command(command)


@main.command()
@click.argument("path")
@source_options
@links_option
@json_option
def inspect(path: str, as_json: bool, **options: Any) -> None:
    """Show what the checkpoint PATH (folder or Hub repo) holds, from headers alone.

    Example: mfptq inspect ./Qwen3.5-27B-NVFP4
    """
    from dataclasses import asdict

    from ..inspection import inspect as look
    from . import text

    found = look(path, **options)
    click.echo(json.dumps(asdict(found)) if as_json else fitted(text.inspection_text(found)))


@main.command()
@click.argument("output")
@click.option("--source", help="What it was made from: folder or Hub repo.")
@source_options
@links_option
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def verify(output: str, source: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Check a converted checkpoint; exit code 6 if anything is wrong.

    Example: mfptq verify Qwen3.5-27B-NVFP4 --source Qwen/Qwen3.5-27B
    """
    from dataclasses import asdict

    from ..output.claim import REPORT
    from ..storage.files import expanded
    from ..verification import verify as check
    from . import text

    with progress(quiet=quiet, what="verify") as on_event:
        found = check(output, source, on_event=on_event, **options)
    click.echo(json.dumps({**asdict(found), "ok": found.ok}) if as_json else fitted(text.verification_text(found)))
    if not found.ok:
        faults = counted(len(found.faults), "fault", "faults")
        foreign = (
            ""
            if (expanded(output) / REPORT).is_file()
            else "; without mfptq_report.json it is no output of mfptq: use check"
        )
        raise VerificationError(f"{quote(output)} has {faults}: {found.faults[0]}{foreign}")


@main.command()
@click.argument("output", type=click.Path(path_type=Path))
def demo(output: Path) -> None:
    """Make a small Qwen3.5-shaped checkpoint, convert and verify it, in the new folder OUTPUT.

    Example: mfptq demo ./mfptq-demo
    """
    from ..conversion import convert as run_conversion
    from ..demo import DemoShape, write_demo
    from ..storage.files import expanded, storage_errors
    from ..verification import verify as check
    from . import text

    output = expanded(output)
    with storage_errors("write", output):
        if output.exists() and any(output.iterdir()):
            raise UsageError(f"{quote(output)} is not empty: name a new folder")
    for name, shape in (("dense", DemoShape()), ("experts", DemoShape(experts=4, intermediate=128))):
        source, target = output / name, output / f"{name}-NVFP4"
        with storage_errors("write", output):
            write_demo(source, shape)
        with progress(quiet=False) as on_event:
            report = run_conversion(source, target, on_event=on_event)
        click.echo(text.summary(report, timings=False, serve=False))
        found = check(target, source)
        click.echo(fitted(text.verification_text(found)) + "\n")
        if not found.ok:
            raise VerificationError(str(found.faults[0]))
    click.echo(text.after_demo(output))

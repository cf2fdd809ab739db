"""Start the command line: what `mfptq` and `python -m mfptq` run. The library never imports it."""

import signal


def run() -> None:
    """Import the command line and run it; Ctrl-C ends the process without a traceback before that is imported, too."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in background jobs
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli.main import run as run_command_line  # only now: most of the imports are these

    run_command_line()


if __name__ == "__main__":
    run()

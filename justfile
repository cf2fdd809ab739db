# Tasks; each line is an ordinary command that works without `just` too.

# Style, types and tests, as CI runs them.
check:
    ruff check .
    ruff format --check .
    mypy
    python -m pytest

# All faults, exhaustively; writes the figures into docs/reliability-figures.md. About ten minutes on 2 cores.
faults:
    python -m tests.faults.exhaustive

# Coverage-guided fuzzing of the header parser alone (needs atheris): runs, seed, corpus folder.
fuzz runs="1000000" seed="1" corpus="/tmp/mfptq-corpus":
    mkdir -p {{corpus}}
    python -m tests.faults.fuzz_header {{runs}} {{seed}} {{corpus}}

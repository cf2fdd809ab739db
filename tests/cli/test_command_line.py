"""The command line as a newcomer meets it."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mfptq
from mfptq.cli.main import main
from mfptq.cli.process import Interrupted, _on_signal, _Request, deferred_signals
from mfptq.errors import StorageError
from tests.conftest import command, command_apart, digests


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['mfptq', '--help']\nfrom mfptq.cli.main import main\nmain(standalone_mode=False)\n"
    code += "print([name for name in ('numpy', 'torch', 'llvmlite', 'huggingface_hub', 'tqdm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_help_with_an_example(name: str) -> None:
    done = command(name, "--help")
    assert done.returncode == 0
    assert "Example: mfptq " in done.stdout or name == "calibration"


def test_dry_run_is_plan_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    before = digests(tmp_path)
    dry = command("convert", source, tmp_path / "out", "--dry-run", COLUMNS="200")
    plan = command("plan", source, COLUMNS="200")
    assert dry.returncode == plan.returncode == 0
    lines = [line for line in dry.stdout.splitlines() if line not in plan.stdout.splitlines()]
    measured = [line for line in lines if "peak memory" in line or "of computing here" in line]
    [output] = [line for line in lines if line not in measured]
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/out: \S+ \S+ needed, \S+ \S+ free", output)
    assert digests(tmp_path) == before


def refused(arguments: tuple[object, ...], code: int, message: str) -> None:
    """Check that a run and its preview say the same, and leave nothing."""
    for more in ((), ("--dry-run",)):
        done = command("convert", *arguments, *more)
        assert done.returncode == code, done.stderr
        assert message in done.stderr


def test_dry_run_finds_what_would_stop_the_run(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    refused((source, tmp_path / "file" / "out"), 5, "is a file")
    refused((source, tmp_path / "full"), 5, "is not empty and not ours")
    refused((source, source / "out"), 5, "inside the source")
    refused((source, "/proc/nothing/out"), 5, "/proc")
    refused((source, tmp_path / "out", "--max-workers", "0"), 2, "max_workers is 0")
    refused((source, tmp_path / "out", "--max-memory", "1MB"), 8, "the least that works here")
    refused((source, tmp_path / "out", "--device", "tpu"), 2, "'tpu' is unknown")
    refused((source, tmp_path / "out", "--input-scales-kind", "amax"), 2, "says nothing without")
    assert not (tmp_path / "out").exists()


def test_dry_run_says_what_is_there_already(source: Path, tmp_path: Path) -> None:
    assert command("convert", source, tmp_path / "out", "--shards", "1/3").returncode == 0
    before = digests(tmp_path / "out")
    begun = command("convert", source, tmp_path / "out", "--dry-run")
    assert "1 shard of an earlier run kept" in " ".join(begun.stdout.split())
    assert digests(tmp_path / "out") == before
    assert command("convert", source, tmp_path / "out").returncode == 0
    again = command("convert", source, tmp_path / "out", "--dry-run", COLUMNS="200")
    assert again.returncode == 0
    assert "is complete already" in " ".join(again.stdout.split())
    other = command("convert", source, tmp_path / "out", "--dry-run", "--method", "minmax")
    assert other.returncode == 5
    assert "holds a finished conversion with other settings" in other.stderr
    values = json.loads(command("convert", source, tmp_path / "out", "--dry-run", "--overwrite", "--json").stdout)
    assert values["output"]["needed_bytes"] > values["output_bytes"]
    assert values["output"]["free_bytes"] > values["output"]["needed_bytes"]
    assert values["fetch_bytes"] == 0


def test_json_is_all_that_stdout_holds(source: Path, tmp_path: Path) -> None:
    report = json.loads(command("convert", source, tmp_path / "out", "--json", "--timings").stdout)
    assert report["quantized"] == 25
    assert {"read", "amax", "quantize", "write", "wait"} <= report["timings"].keys()
    values = json.loads(command("plan", source, "--json").stdout)
    assert values["output_bytes"] == report["output_bytes"]
    assert values["output_tensors"] == report["tensors"]


def test_quiet_is_quiet_and_no_bar_is_drawn_off_a_terminal(source: Path, tmp_path: Path) -> None:
    done = command("convert", source, tmp_path / "out", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = command("convert", source, tmp_path / "out2")
    assert "\r" not in done.stderr
    assert f"vllm serve {tmp_path / 'out2'}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("covnert",), "Did you mean 'convert'"),
        (("convert", "a"), "Missing argument 'OUTPUT'"),
        (("plan", "{source}", "--methode", "x"), "--method"),
        (("plan", "{source}", "--method", "best"), "expected one of"),
        (("plan", "{source}", "--scheme", "NVFP5"), "expected one of"),
        (("convert", "{source}", "out", "--max-memory", "lots"), "500MB, 4G or 1GiB"),
        (("convert", "{source}", "{out}", "--max-workers", "0"), "at least 1"),
        (("convert", "{source}", "{out}", "--device", "abacus"), "abacus"),
    ],
)
def test_a_slip_says_what_to_do(arguments: tuple[str, ...], expected: str, source: Path, tmp_path: Path) -> None:
    places = {"source": source, "out": tmp_path / "out"}
    done = command(*(argument.format(**places) for argument in arguments))
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    done = command("plan", tmp_path / "nowhere")
    assert done.returncode == 3
    assert "no such folder" in done.stderr
    done = command_apart("plan", "someone/nowhere", HF_HOME=str(tmp_path))
    assert done.returncode == 7
    assert "no folder 'someone/nowhere'" in done.stderr


@pytest.mark.parametrize("scheme", ["nvfp4a16", "W4A16", "w4a16", "NVFP4A16"])
def test_names_of_schemes_and_methods_are_understood_in_any_case(scheme: str, source: Path) -> None:
    values = json.loads(command("plan", source, "--scheme", scheme, "--method", "MinMax", "--json").stdout)
    assert (values["scheme"], values["method"]) == ("NVFP4A16", "minmax")


def test_the_other_name_of_nvfp4_is_w4a4(source: Path) -> None:
    done = command("plan", source, "--scheme", "w4a4")
    assert done.returncode == 2
    assert "scheme NVFP4 (W4A4) needs input scales" in done.stderr


def test_home_is_expanded_where_the_shell_does_not(source: Path, tmp_path: Path) -> None:
    done = command("convert", f"~/{source.name}", "~/out", "-q", HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert command("verify", "~/out", f"--source=~/{source.name}", HOME=str(tmp_path)).returncode == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_a_plan_gives_the_rule_that_decided(source: Path) -> None:
    text = " ".join(command("plan", source, "--ignore", "re:.*mlp.*").stdout.split())
    assert "output head (re:.*lm_head$)" in text
    assert "ignored as asked (re:.*mlp.*)" in text
    rows = json.loads(command("plan", source, "--json").stdout)["patterns"]
    assert {row["rule"] for row in rows if row["action"] == "NVFP4"} == {""}
    assert r"re:.*lm_head$" in {row["rule"] for row in rows if row["action"] == "keep"}


def option_choices() -> list[tuple[str, str]]:
    """Return every (option, kind of input scale) that the help of a command names."""
    found = []
    for name, group in (("plan", main), ("convert", main), ("extract", main.commands["calibration"])):
        for option in group.commands[name].params:
            if "kind" in (option.name or ""):
                found += [(option.opts[0], choice) for choice in option.type.choices]
    return found


@pytest.mark.parametrize("choice", sorted({choice for _, choice in option_choices()}))
def test_every_kind_that_the_help_names_is_accepted(choice: str, source: Path, tmp_path: Path) -> None:
    modules = [row.name.removesuffix(".weight") for row in mfptq.plan(source).tensors if row.action == "NVFP4"]
    (tmp_path / "scales.json").write_text(
        json.dumps(dict.fromkeys(modules, 2.0 if choice == "amax" else 0.001 if choice == "input_scale" else 500.0))
    )
    options = ("--input-scales", tmp_path / "scales.json", "--input-scales-kind", choice)
    assert json.loads(command("plan", source, *options, "--json").stdout)["scheme"] == "NVFP4"
    assert command("plan", source, "--input-scales-kind", choice).returncode == 2


def test_the_help_names_kinds_everywhere() -> None:
    assert {option for option, _ in option_choices()} == {"--input-scales-kind", "--kind"}


def test_max_memory_that_cannot_work_is_refused_with_the_least_that_does(source: Path, tmp_path: Path) -> None:
    done = command_apart("convert", source, tmp_path / "out", "--max-memory", "20MB")
    assert done.returncode == 8
    least = done.stderr.rpartition(" is ")[2].strip()
    assert least.endswith(" MB")
    assert not (tmp_path / "out").exists()
    room = f"{float(least.split()[0]) + 8}MB"  # what a fresh process holds differs a little from run to run
    assert command_apart("convert", source, tmp_path / "out", "--max-memory", room, "-q").returncode == 0


def test_a_first_signal_is_noted_while_a_run_defers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr("os.write", lambda *_: 0)
    monkeypatch.setattr(_Request, "number", 0)
    with deferred_signals() as check:
        check()
        _on_signal(signal.SIGTERM, None)
        with pytest.raises(Interrupted) as caught:
            check()
        assert (caught.value.exit_code, ended) == (143, [])
        _on_signal(signal.SIGINT, None)
        assert ended == [130], "the second does not wait"
    monkeypatch.setattr(_Request, "number", 0)
    _on_signal(signal.SIGHUP, None)
    assert ended == [130, 129], "where nothing is half done, the first does not either"


@pytest.mark.parametrize(
    ("code", "advice"), [("EACCES", "ask for the permission"), ("ENOSPC", "rerun the same command")]
)
def test_a_rerun_is_advised_only_where_it_helps(code: str, advice: str) -> None:
    number = getattr(errno, code)
    assert advice in str(StorageError("write", "x", OSError(number, os.strerror(number))))

"""What a new user mistypes or misplaces is answered with what was meant."""

from __future__ import annotations

import shutil
from pathlib import Path

import click.testing
import pytest

import mfptq
from mfptq.cli.main import main
from mfptq.errors import StorageError
from tests.conftest import command


def said(*words: object) -> str:
    """Return the one line that a failing command leaves on stderr."""
    done = command(*words)
    assert done.returncode, done.stdout
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_help_is_whole_sentences() -> None:
    text = click.testing.CliRunner().invoke(main, ["--help"]).output
    assert "..." not in text.split("Commands:")[1]
    assert "exit code 6 on an error." in " ".join(text.split())


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("--method", "serach"), "did you mean search?"),
        (("--scheme", "nvfp4a61"), "did you mean NVFP4A16?"),
        (("--ignore", "mlp"), r"use 're:.*\.mlp\..*'"),
        (("--ignore", "down_proj"), r"use 're:.*\.down_proj$'"),
        (("--ignore", "model.language_model.layers.0.mlp"), r"use 're:model\.language_model\.layers\.0\.mlp\..*'"),
    ],
)
def test_near_names(words: tuple[str, str], hint: str, source: Path) -> None:
    error = said("plan", source, *words)
    assert hint in error
    if "use '" in error:  # and what is advised works
        advised = error.split("use '")[1].split("'")[0]
        assert command("plan", source, "--no-estimate", words[0], advised).returncode == 0


def test_a_name_that_explain_does_not_know(source: Path) -> None:
    assert "near names: 'lm_head.weight'" in said("plan", source, "--explain", "lm_head.wieght")
    assert "near names: 'model.language_model.layers.0.mlp.down_proj.weight'" in said(
        "plan", source, "--explain", "down_proj"
    )


def test_a_folder_that_holds_checkpoints_names_them(source: Path) -> None:
    assert "these folders in it have one: 'source'" in said("check", source.parent)


def test_a_folder_that_is_no_output(source: Path) -> None:
    assert f"'{source}' is no finished output of mfptq: it holds no mfptq_report.json" in said("report", source)


def test_tables_go_where_home_is(output: Path, tmp_path: Path) -> None:
    assert command("report", output, "--csv", "~/table.csv", HOME=str(tmp_path)).returncode == 0
    assert (tmp_path / "table.csv").read_text().startswith("layer,kind,")
    error = said("report", output, "--csv", tmp_path / "nowhere" / "table.csv")
    assert "name a file in a folder that exists" in error
    assert "rerun" not in error
    assert "rerun" in str(StorageError("write", "x", OSError(28, "No space left on device")))


def test_warnings_of_the_judge_are_told_by_convert(source: Path, tmp_path: Path) -> None:
    assert command("convert", source, tmp_path / "sound", "-q").stderr == ""
    for path in source.glob("tokenizer*"):
        path.unlink()
    assert "warning: no tokenizer file" in command("convert", source, tmp_path / "out", "-q").stderr


def test_a_repair_says_that_nothing_was_quantized_anew(output: Path, tmp_path: Path) -> None:
    done = command("repair", output, tmp_path / "again")
    assert "NVFP4A16, nothing quantized anew: 25 weights taken over" in done.stdout
    shares = [float(line.split(" MB of ")[0].split()[-1]) for line in done.stderr.splitlines() if " MB of " in line]
    assert all(share <= float(done.stdout.split(" MB -> ")[0].split()[-1]) for share in shares)


def test_a_model_without_a_tokenizer_says_so(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from tests.models import DENSE, write_checkpoint

    model = write_checkpoint(tmp_path / "model", DENSE)
    for path in model.glob("tokenizer*"):
        path.unlink()
    (tmp_path / "text.jsonl").write_text('{"text": "hello"}\n')
    shutil.rmtree(source)
    done = command(
        "calibrate", model, "--dataset", tmp_path / "text.jsonl", "--output", tmp_path / "x.calibration.safetensors"
    )
    assert done.returncode == 3
    assert "the model has no tokenizer" in done.stderr


def test_a_folder_that_is_mistyped(source: Path, tmp_path: Path) -> None:
    done = command("convert", tmp_path / "sorce", tmp_path / "out")
    assert done.returncode == 3
    assert "no such folder, and not a Hub repo id (org/name); did you mean source?" in done.stderr
    assert "did you mean" not in command("inspect", tmp_path / "elsewhere" / "sorce").stderr


def test_a_source_that_is_mistyped_is_no_fault_of_the_output(source: Path, output: Path, tmp_path: Path) -> None:
    done = command("verify", output, "--source", tmp_path / "sorce")
    assert done.returncode == 3
    assert done.stdout == ""
    assert "'out' has" not in done.stderr


def test_a_demo_says_where_it_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        done = command("demo", place)
        assert done.returncode == 5
        assert f"cannot write '{place}': Not a directory" in done.stderr


def test_small_memory_is_told_in_small_units(output: Path) -> None:
    done = command("check", output, "--gpu-memory", "100kB", COLUMNS="110")
    assert done.returncode == 6
    assert "of 90.0 kB that engines use by default" in done.stderr


def test_a_page_of_a_folder_whose_name_no_encoding_knows(source: Path, tmp_path: Path) -> None:
    """As where the locale is C: Python holds the bytes of such a name as lone surrogates."""
    output = tmp_path / "o\udcfct"
    mfptq.convert(source, output)
    done = command("report", output, "--html", tmp_path / "r.html")
    assert done.returncode == 0, done.stderr
    assert "<h1>&#x27;o\\udcfct&#x27;</h1>" in (tmp_path / "r.html").read_text()

"""A plan as people read it, and the judgement of engines before a byte is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mfptq
from mfptq.checking import unloadable
from mfptq.cli.main import main
from mfptq.cli.plan_text import ranges
from mfptq.engines.findings import Finding
from tests.conftest import command


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([4], "4"),
        (range(6), "0-5"),
        ([0, 1, 2, 4, 5, 6], "0-2,4-6"),
        (range(3, 64, 4), "3,7,...,63"),
        ([n for n in range(64) if n % 4 != 3], "0-2,4-6,...,60-62"),
        ([0, 1, 3, 4, 7, 8, 9, 12], "0-1,3-4,7-9,12"),
        ([1, 3, 5], "1,3,5"),
        ([2, 2, 0], "0,2"),
    ],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


@pytest.mark.parametrize("columns", [60, 100])
def test_a_plan_fits_the_terminal(moe_source: Path, columns: int) -> None:
    done = command("plan", moe_source, "--no-estimate", COLUMNS=str(columns))
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= columns
    lines = done.stdout.splitlines()
    fp4, kept = (next(n for n, line in enumerate(lines) if line.startswith(word)) for word in ("FP4: ", "kept: "))
    assert fp4 < kept
    assert any("layers.0-2.linear_attn.out_proj" in line for line in lines[fp4:kept])
    assert not any("norm" in line and "->" in line for line in lines)


def test_an_estimate_is_measured_unless_it_is_not_wanted(source: Path) -> None:
    assert "of computing here" in command("plan", source).stdout
    assert "of computing here" not in command("plan", source, "--no-estimate").stdout


def test_all_lists_every_tensor(source: Path) -> None:
    with mfptq.plan(source) as plan:
        names = [tensor.name for tensor in plan.tensors]
    text = " ".join(command("plan", source, "--all", "--no-estimate", COLUMNS="110").stdout.split())
    for name in names:
        assert name.removesuffix(".weight").removeprefix("model.language_model.") in text


def test_one_tensor_is_explained(source: Path) -> None:
    done = command("plan", source, "--explain", "model.language_model.layers.0.linear_attn.in_proj_z", COLUMNS="100")
    assert "becomes FP4" in done.stdout
    assert "one global scale with: model.language_model.layers.0.linear_attn.in_proj_qkv" in done.stdout
    kept = command("plan", source, "--explain", "lm_head.weight")
    assert "kept as it is: output head" in kept.stdout
    assert "rule: re:.*lm_head$" in kept.stdout
    missing = command("plan", source, "--explain", "lm_hed.weight")
    assert missing.returncode == 2
    assert "near names: 'lm_head.weight'" in missing.stderr


def finding(engine: str, severity: str = "error", code: str = "built-plain") -> Finding:
    return Finding(code, severity, engine, "quantized, but a table", ("a.*",), "a.0", 1, "no load", "keep it")


@pytest.mark.parametrize(
    ("findings", "engines", "count"),
    [
        ([finding("vLLM 1, SGLang 2")], ["vllm", "sglang"], 1),
        ([finding("vLLM 1"), finding("SGLang 2")], ["vllm", "sglang"], 1),
        ([finding("vLLM 1")], ["vllm", "sglang"], 0),  # SGLang would load it
        ([finding("vLLM 1")], ["vllm"], 1),
        ([finding("vLLM 1")], ["sglang"], 0),
        ([finding("vLLM 1", "warning")], ["vllm"], 0),
        ([finding("")], ["vllm"], 0),  # the source's own state
        ([finding("vLLM 1"), finding("vLLM 1", "warning", "unknown-architecture")], ["vllm"], 0),
        ([finding("vLLM 1")], [], 0),
    ],
)
def test_what_no_engine_would_load(findings: list[Finding], engines: list[str], count: int) -> None:
    assert len(unloadable(findings, engines)) == count


def test_it_is_refused_before_a_byte_is_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfptq.conversion.check_plan", lambda *_: (finding("vLLM 1, SGLang 2"),))
    words = ["convert", str(source), str(tmp_path / "out"), "--quiet"]
    with pytest.raises(mfptq.UsageError, match=r"would not load the output: 'a\.0' .*--for transformers"):
        main.main(words, standalone_mode=False)
    assert not (tmp_path / "out").exists()
    main.main([*words, "--for", "transformers"], standalone_mode=False)
    assert (tmp_path / "out" / "config.json").exists()


def test_findings_of_a_plan_are_those_of_its_output(source: Path, tmp_path: Path) -> None:
    forced = ("--target", "re:.*embed_tokens$", "--force")
    planned = json.loads(command("plan", source, "--json", "--for", "vllm", *forced).stdout)["findings"]
    assert {each["code"] for each in planned} == {"built-plain"}
    command("convert", source, tmp_path / "out", *forced)
    found = json.loads(command("check", tmp_path / "out", "--json", "--for", "vllm").stdout)["findings"]
    assert planned == found


def test_the_library_judges_a_plan(source: Path) -> None:
    for path in source.glob("tokenizer*"):
        path.unlink()
    with mfptq.plan(source) as plan:
        assert {finding.code for finding in plan.check(engines=["vllm"])} == {"no-tokenizer"}


def test_a_plan_of_an_nvfp4_source_quantizes_nothing_anew(source: Path, tmp_path: Path) -> None:
    assert command("convert", source, tmp_path / "out", "-q").returncode == 0
    told = " ".join(command("plan", tmp_path / "out", "--no-estimate").stdout.split())
    assert "NVFP4A16 (W4A16), nothing quantized anew" in told
    assert "4.51 bits per FP4 weight" in told, "codes, block scales, and what a small model's global scales add"
    values = json.loads(command("plan", tmp_path / "out", "--json").stdout)
    assert sum(row["source_bytes"] for row in values["patterns"]) == values["source_bytes"], "scales are counted too"

"""Interrupted evaluations go on where they stopped, and leave their figures with the output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mfptq
from mfptq.cli.main import main
from mfptq.errors import DestinationError
from mfptq.observation import evaluation_pass, unfinished
from mfptq.observation.evaluate import EvaluationProgress, evaluate
from mfptq.output import evaluations
from mfptq.output.evaluations import read_evaluations
from mfptq.reporting.compare import compare
from mfptq.reporting.data import read_report
from mfptq.reporting.page import page
from tests.conftest import sampled
from tests.models import write_companions
from tests.smoothing.models import write_model

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS: dict[str, Any] = {"max_seq_length": 32, "dtype": "float32"}


class Stopped(BaseException):
    """What an interruption raises."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("of") / "source", "llama")
    write_companions(folder)
    return folder


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    mfptq.convert(source, source.with_name("converted"))
    return source.with_name("converted")


@pytest.fixture
def output(converted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(converted, tmp_path / "output")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    generator = np.random.default_rng(5)
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps(generator.integers(0, 150, 20).tolist()) + "\n" for _ in range(4)))
    return path


def stopping_at(step: int, seen: list[int]) -> Callable[[EvaluationProgress], None]:
    def event(progress: EvaluationProgress) -> None:
        seen.append(progress.steps)
        if progress.steps == step:
            raise Stopped

    return event


@pytest.mark.parametrize(
    ("left", "streamed"),  # steps before the end: within the head, at its beginning, in a block
    sampled([(3, False), (12, True)], [(9, False), (3, True), (9, True), (12, False)]),
)
def test_what_is_done_is_not_done_again_and_figures_are_the_same(
    left: int, streamed: bool, source: Path, output: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(evaluation_pass, "is_streamed", lambda *_: streamed)
    seen: list[int] = []
    whole = evaluate(output, source, dataset, on_event=stopping_at(-1, seen), record=False, **OPTIONS)
    total = len(seen)
    with pytest.raises(Stopped):
        evaluate(output, source, dataset, on_event=stopping_at(total - left, []), **OPTIONS)
    assert (output / unfinished.FOLDER).is_dir()
    again: list[int] = []
    assert evaluate(output, source, dataset, on_event=stopping_at(-1, again), **OPTIONS) == whole
    assert len(again) < total
    assert again[-1] == total
    assert not (output / unfinished.FOLDER).exists()


@pytest.mark.parametrize("change", sampled(["text", "torn", "output"], ["foreign"]))
def test_notes_that_are_torn_or_of_another_evaluation_count_as_nothing(
    change: str, source: Path, output: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "SAVE_SECONDS", 0.0)
    with pytest.raises(Stopped):
        evaluate(output, source, dataset, on_event=stopping_at(12, []), **OPTIONS)
    states = output / unfinished.FOLDER / "states.pt"
    if change == "text":
        dataset.write_text(dataset.read_text().replace("[", "[7, ", 1))
    elif change == "torn":
        states.write_bytes(states.read_bytes()[:-100])
    elif change == "foreign":
        states.write_bytes(b"no states")
    else:
        mfptq.convert(source, output, method="minmax", overwrite=True)
    seen: list[int] = []
    found = evaluate(output, source, dataset, on_event=stopping_at(-1, seen), **OPTIONS)
    assert seen[0] == 1
    assert found == evaluate(output, source, dataset, record=False, **OPTIONS)


def test_figures_are_kept_with_the_output_and_shown_by_its_report(
    source: Path, output: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (output / "README.md").write_text("# Edited by hand\n\n```bash\nvllm serve it\n```\n")
    found = evaluate(output, source, dataset, **OPTIONS)
    evaluate(output, source, dataset, **OPTIONS)  # replaces what is known of the same text
    (kept,) = read_evaluations(output)
    assert kept["kl_divergence"]["value"] == found.kl_divergence.value
    assert (kept["dataset"], kept["source"]) == ("ids.jsonl", source.name)
    assert str(source.parent) not in (output / "mfptq_evaluation.json").read_text()
    card = (output / "README.md").read_text()
    figure = f"{found.kl_divergence.value:.4g}"
    assert card.count(figure) == 1
    assert card.startswith("# Edited by hand\n\n<!-- mfptq evaluation -->\n")
    assert card.endswith("<!-- end of mfptq evaluation -->\n\n```bash\nvllm serve it\n```\n")
    report = read_report(output)
    assert figure in page(report, "output")
    main(["report", str(output)], standalone_mode=False)
    assert f"evaluated on ids.jsonl, 4 windows: perplexity {found.perplexity.value:.4g}" in capsys.readouterr().out
    assert mfptq.verify(output, source).ok
    other = dataset.with_name("other.jsonl")
    other.write_text("[1, 2, 3, 4]\n")
    evaluate(output, source, other, **OPTIONS)
    assert [each["dataset"] for each in read_evaluations(output)] == ["ids.jsonl", "other.jsonl"]
    mfptq.convert(source, output.with_name("rounded"), method="minmax")
    rounded = evaluate(output.with_name("rounded"), source, dataset, **OPTIONS)
    (both,) = compare(report, read_report(output.with_name("rounded"))).evaluated
    assert both.difference.value == pytest.approx(rounded.kl_divergence.value - found.kl_divergence.value)
    assert both.difference.standard_error is not None
    main(["compare", str(output), str(output.with_name("rounded"))], standalone_mode=False)
    assert f"KL divergence on ids.jsonl: {figure} -> {rounded.kl_divergence.value:.4g}, by" in capsys.readouterr().out
    mfptq.convert(source, output)  # nothing to do
    assert len(read_evaluations(output)) == 2
    mfptq.convert(source, output, method="minmax", overwrite=True)
    assert read_evaluations(output) == []


def test_a_record_of_another_plan_or_a_damaged_one_says_nothing(source: Path, output: Path, dataset: Path) -> None:
    evaluate(output, source, dataset, samples=1, **OPTIONS)
    path = output / "mfptq_evaluation.json"
    content = json.loads(path.read_text())
    for changed in (
        content | {"plan": "0" * 64},
        content | {"format": 2},
        content | {"evaluations": [{"dataset": "x"}]},
        content | {"evaluations": [content["evaluations"][0] | {"perplexity": {"value": "<b>"}}]},
        content | {"evaluations": None},
        [],
    ):
        path.write_text(json.dumps(changed))
        assert read_evaluations(output) == []
    path.write_text("{")
    assert read_evaluations(output) == []


def test_an_output_that_cannot_be_written_is_refused_at_once(
    source: Path, output: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluations.os, "access", lambda *_: False)
    with pytest.raises(DestinationError, match="make it writable"):
        evaluate(output, source, dataset, **OPTIONS)
    before = {path: path.read_bytes() for path in output.iterdir()}
    evaluate(output, source, dataset, record=False, samples=1, **OPTIONS)
    assert before == {path: path.read_bytes() for path in output.iterdir()}

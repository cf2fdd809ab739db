"""Evaluations of tiny models: every figure against the twin that means the same, computed directly by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mfptq
from mfptq.cli.evaluate import evaluation_text
from mfptq.cli.main import main
from mfptq.errors import MemoryBudgetError, SourceError, UsageError
from mfptq.observation import evaluation_pass, models
from mfptq.observation.evaluate import BUILT_IN, evaluate
from mfptq.output.estimates import Estimate
from tests.clients.dequantize import read_tensors
from tests.conftest import sampled
from tests.models import DENSE, MOE, write_checkpoint
from tests.observation.cases import LENGTH, OPTIONS, Case, load, windows
from tests.observation.test_rounded_nvfp4 import reference

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(
    scope="module", params=sampled([((DENSE, False),), ((MOE, True),)], [((DENSE, True),), ((MOE, False),)]), ids=str
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind, calibrated = request.param
    if (kind, calibrated) == (DENSE, False):
        return request.getfixturevalue("dense")
    return Case(tmp_path_factory.mktemp(kind), kind, calibrated=calibrated)


@contextmanager
def forced(*, streamed: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_pass, "is_streamed", lambda *_: streamed)
        yield


def places_of(model: Any, output: Path) -> dict[int, float]:
    """Return the input scale of each quantized matrix in a model, by the address of its first number."""
    found = {}
    for name, stored in read_tensors(output).items():
        if not name.endswith(".input_global_scale"):
            continue
        module = name.removesuffix(".input_global_scale")
        parent, _, leaf = module.rpartition(".")
        if ".experts." in module:
            stack, _, number = parent.rpartition(".")
            part = "down_proj" if leaf == "down_proj" else "gate_up_proj"
            matrix = getattr(model.get_submodule(stack), part)[int(number)]
            if leaf == "up_proj":
                continue
        else:
            matrix = model.get_submodule(module).weight
        found[matrix.data_ptr()] = float(stored.values[0])
    return found


@contextmanager
def rounded_inputs(model: Any, output: Path) -> Iterator[None]:
    """Round what meets a quantized matrix, wherever the model multiplies, by the numpy reference."""
    places, original = places_of(model, output), torch.nn.functional.linear

    def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        scale = places.get(weight.data_ptr())
        given = inputs if scale is None else torch.from_numpy(reference(inputs.numpy(), scale))
        return original(given, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        yield


def keep(hidden: list[torch.Tensor], _module: Any, _args: Any, output: Any) -> None:
    hidden.append(output[0] if isinstance(output, tuple) else output)


def direct(
    folder: Path, text: list[list[int]], output: Path | None = None
) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Return the logits and the hidden states behind each block, for each window, in one forward pass each."""
    model = load(folder)
    found = []
    for ids in text:
        hidden: list[torch.Tensor] = []
        hooks = [layer.register_forward_hook(partial(keep, hidden)) for layer in model.model.language_model.layers]
        with torch.no_grad(), rounded_inputs(model, output or folder):
            logits = model(torch.tensor([ids])).logits[0].double()
        for hook in hooks:
            hook.remove()
        found.append((logits, [each.double() for each in hidden]))
    return found


def test_figures_are_those_of_a_direct_computation(case: Case, dataset: Path) -> None:
    text = windows(dataset)
    found = evaluate(case.output, case.source, dataset, **OPTIONS)
    loss = {"source": 0.0, "output": 0.0}
    divergence, agreed, errors = 0.0, 0, np.zeros(len(found.hidden_errors))
    for ids, (exact, before), (given, after) in zip(
        text, direct(case.source, text, case.source), direct(case.twin, text, case.output), strict=True
    ):
        p, q = exact.log_softmax(-1)[:-1], given.log_softmax(-1)[:-1]
        rows, following = torch.arange(len(ids) - 1), torch.tensor(ids[1:])
        loss["source"] -= p[rows, following].sum().item()
        loss["output"] -= q[rows, following].sum().item()
        divergence += (p.exp() * (p - q)).sum().item()
        agreed += (p.argmax(-1) == q.argmax(-1)).sum().item()
        errors += [((b - a).norm(dim=-1) / a.norm(dim=-1)).sum().item() for a, b in zip(before, after, strict=True)]
    tokens = sum(len(ids) - 1 for ids in text)
    assert (found.tokens, found.samples, found.dtype) == (tokens, 3, "float32")
    assert found.source_perplexity.value == pytest.approx(np.exp(loss["source"] / tokens), rel=1e-4)
    assert found.perplexity.value == pytest.approx(np.exp(loss["output"] / tokens), rel=2e-3)
    assert found.kl_divergence.value == pytest.approx(divergence / tokens, rel=2e-2)
    assert found.kl_divergence.value > 0.01
    assert abs(found.top1_agreement.value * tokens - agreed) <= 2
    np.testing.assert_allclose(
        [each.value for each in found.hidden_errors.values()], errors / sum(map(len, text)), rtol=2e-2
    )
    assert found.scheme == case.scheme


def test_streamed_figures_are_the_same_to_the_bit(case: Case, dataset: Path) -> None:
    with forced(streamed=False):
        held = evaluate(case.output, case.source, dataset, max_seq_length=LENGTH)
    with forced(streamed=True):
        streamed = evaluate(case.output, case.source, dataset, max_seq_length=LENGTH)
    assert held == streamed
    assert held.dtype == "bfloat16"
    assert not list(case.output.parent.glob(".mfptq-*"))


def test_an_output_equal_to_its_source_shows_no_difference(dense: Case, dataset: Path, tmp_path: Path) -> None:
    """A source whose weights are NVFP4 values already loses nothing: quantizing them again gives them back."""
    mfptq.convert(dense.twin, tmp_path / "again")
    found = evaluate(tmp_path / "again", dense.twin, dataset, max_seq_length=LENGTH)
    assert found.loss_difference.value == found.kl_divergence.value == 0.0
    assert found.top1_agreement.value == 1.0
    assert {each.value for each in found.hidden_errors.values()} == {0.0}


@pytest.mark.usefixtures("evaluated")
def test_progress_ends_at_its_total(events: list[mfptq.EvaluationProgress]) -> None:
    assert [event.steps for event in events] == list(range(1, events[-1].total_steps + 1))
    assert events[-1].total_steps == 2 * 3 * 5


def tied(folder: Path) -> Path:
    """Write a tiny Gemma 3, whose head is its embedding table, with the companions of the other models."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from tests.models import write_companions

    folder.mkdir()
    config = Gemma3TextConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, sliding_window=16, max_position_embeddings=512, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["Gemma3ForCausalLM"]
    torch.manual_seed(0)
    state = Gemma3ForCausalLM(config).to(torch.bfloat16).state_dict()
    state.pop("lm_head.weight")
    save_file(
        {name: tensor * 8 if tensor.ndim > 1 else tensor for name, tensor in state.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config.save_pretrained(folder)
    write_companions(folder)
    return folder


def test_a_head_tied_to_the_embeddings_is_streamed_too(dataset: Path, tmp_path: Path) -> None:
    source = tied(tmp_path / "source")
    mfptq.convert(source, tmp_path / "output")
    found = []
    for streamed in (False, True):
        with forced(streamed=streamed):
            found.append(evaluate(tmp_path / "output", source, dataset, max_seq_length=LENGTH))
    assert found[0] == found[1]
    assert found[0].kl_divergence.value > 1e-4


def test_the_built_in_text_is_there(dense: Case) -> None:
    text = BUILT_IN.read_text()
    assert len(text.split()) > 1000
    found = evaluate(dense.output, dense.source, samples=2, max_seq_length=16, dtype="float32")
    assert (found.dataset, found.samples, found.tokens) == ("built-in", 2, 30)


def test_modules_that_text_does_not_reach_are_named(dataset: Path, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", DENSE)
    targets = ["re:.*visual\\.blocks\\.0\\.mlp\\.linear_fc1", "re:mtp\\.layers\\.0\\.mlp\\..*"]
    mfptq.convert(source, tmp_path / "output", targets=targets)
    found = evaluate(tmp_path / "output", source, dataset, **OPTIONS)
    assert sorted(found.left_out) == [
        "model.visual.blocks.0.mlp.linear_fc1",
        "mtp.layers.0.mlp.down_proj",
        "mtp.layers.0.mlp.gate_proj",
        "mtp.layers.0.mlp.up_proj",
    ]
    assert "4 quantized modules are not part of reading text" in evaluation_text(found)


def test_too_little_memory_is_refused_at_once(dense: Case, dataset: Path) -> None:
    with pytest.raises(MemoryBudgetError, match=r"needs about \d+ MB on cpu, .* MB are allowed"):
        evaluate(dense.output, dense.source, dataset, max_memory="1MB", **OPTIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"samples": 0}, "at least 1"), ({"max_seq_length": 1}, "at least 2"), ({"dtype": "int8"}, "is unknown")],
)
def test_options_are_checked(dense: Case, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(dense.output, dense.source, **change)


def test_text_of_single_tokens_is_refused(dense: Case, tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text("[1]\n[2]\n")
    with pytest.raises(UsageError, match="no sample of two tokens"):
        evaluate(dense.output, dense.source, tmp_path / "ids.jsonl")


def test_outputs_that_do_not_fit_their_source_are_refused(dense: Case, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no quantized weight"):
        evaluate(dense.source, dense.source, dataset)
    with pytest.raises(SourceError, match="is quantized: give the model it was made from"):
        evaluate(dense.output, dense.output, dataset)
    other = write_checkpoint(tmp_path / "moe", MOE)
    with pytest.raises(SourceError, match="is it made from this source"):
        evaluate(dense.output, other, dataset)
    broken = shutil.copytree(dense.output, tmp_path / "broken")
    [shard, *_] = [path for path in broken.glob("*.safetensors") if any("global" in name for name in load_file(path))]
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith(".weight_global_scale"))
    save_file(tensors | {name: torch.tensor([float("nan")])}, shard, {"format": "pt"})
    with pytest.raises(SourceError, match="is nan, expected a positive number"):
        evaluate(broken, dense.source, dataset)


def test_the_extra_is_asked_for(dense: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "EXTRA", ("transformers_that_nobody_has",))
    with pytest.raises(
        UsageError, match=r"evaluate needs transformers_that_nobody_has: pip install 'mfptq\[calibrate\]'"
    ):
        evaluate(dense.output, dense.source)


def test_the_command_shows_every_figure(
    dense: Case, dataset: Path, evaluated: mfptq.Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "evaluate",
        str(dense.output),
        "--source",
        str(dense.source),
        "--dataset",
        str(dataset),
        "--dtype",
        "float32",
    ]
    main.main([*words, "--max-seq-length", str(LENGTH)], standalone_mode=False)
    shown = capsys.readouterr().out
    assert shown == evaluation_text(evaluated) + "\n"
    assert f"KL divergence       {evaluated.kl_divergence.value:.4g} +- " in shown
    main.main([*words, "--max-seq-length", str(LENGTH), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asdict(evaluated)))


def test_long_models_show_twelve_blocks(evaluated: mfptq.Evaluation) -> None:
    long = replace(evaluated, hidden_errors={f"layers.{number}": Estimate(number / 1000, None) for number in range(64)})
    lines = [line for line in evaluation_text(long).splitlines() if "layers." in line]
    assert len(lines) == 12
    assert lines[0].endswith("layers.0")
    assert lines[-1].endswith("layers.63")

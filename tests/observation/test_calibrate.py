"""Calibration of tiny Qwen3.5 models: every statistic against float64, on disk and in memory, interrupted and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mfptq
from mfptq.calibration.file import LEVELS
from mfptq.calibration.reading import Calibration, load_calibration
from mfptq.cli import process
from mfptq.errors import MemoryBudgetError, ScaleError, SourceError, UsageError
from mfptq.names.engine import experts_parent
from mfptq.observation import calibration_pass, models
from mfptq.observation.calibrate import calibrate
from mfptq.observation.calibration_pass import CalibrationProgress
from mfptq.observation.residency import Residency
from mfptq.planner import make_plan
from tests.conftest import command, sampled
from tests.models import DENSE, MOE, write_checkpoint, write_companions
from tests.smoothing.models import write_model

pytestmark = pytest.mark.filterwarnings("ignore")
SAMPLES = 5
STEPS = 2
SMALL = "qwen3_moe"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    write_companions(write_model(folder / SMALL, SMALL))
    return {SMALL: folder / SMALL} | {kind: write_checkpoint(folder / kind, kind) for kind in (DENSE, MOE)}


@pytest.fixture(params=[DENSE, MOE])
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Path:
    return checkpoints[request.param]


@pytest.fixture
def moe(checkpoints: dict[str, Path]) -> Path:
    return checkpoints[MOE]


@pytest.fixture
def small(checkpoints: dict[str, Path]) -> Path:
    """A model with two layers and experts, for what does not depend on the model."""
    return checkpoints[SMALL]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(5)
    lengths = (1, 30, 66, 5, 90, 20, 20)
    path = tmp_path_factory.mktemp("text") / "ids.jsonl"
    path.write_text("".join(json.dumps(generator.integers(0, 150, n).tolist()) + "\n" for n in lengths))
    return path


def samples_of(dataset: Path, length: int = 80) -> list[list[int]]:
    return [json.loads(line)[:length] for line in dataset.read_text().splitlines()][:SAMPLES]


OPTIONS: dict[str, Any] = {"samples": SAMPLES, "max_seq_length": 80, "batch_size": STEPS}


def made(source: Path, dataset: Path, output: Path, **changes: Any) -> Calibration:
    calibrate(source, dataset, output, **OPTIONS | changes)
    return load_calibration(output)


Held = Callable[..., Path]


@pytest.fixture(scope="module")
def held(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Held:
    """Calibrate a model held in memory, once for all tests that read the file."""
    known: dict[tuple[str, str], Path] = {}

    def file(source: Path, **changes: Any) -> Path:
        changes = {"statistics": "hessian"} | changes
        key = (source.name, repr(changes))
        if key not in known:
            known[key] = tmp_path_factory.mktemp("held") / "a.safetensors"
            with pytest.MonkeyPatch.context() as patch, forced(patch, streamed=False, batch=SAMPLES):
                calibrate(source, dataset, known[key], **OPTIONS | changes)
        return known[key]

    return file


@contextmanager
def forced(monkeypatch: pytest.MonkeyPatch, *, streamed: bool, batch: int = STEPS) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(calibration_pass, "choose_residency", lambda *_: Residency(streamed, batch))
        yield


class Reference:
    """What reaches every linear layer of a model that transformers runs by itself, recorded whole."""

    def __init__(self, folder: Path, samples: list[list[int]]) -> None:
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        self.model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype="auto").eval()
        self.inputs: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.chosen: dict[str, list[torch.Tensor]] = defaultdict(list)
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(self.keep(self.inputs, name))
            if name.endswith("mlp.gate"):
                module.register_forward_hook(self.keep(self.inputs, name))
                module.register_forward_hook(self.keep_choice(name.removesuffix("gate") + "experts"))
        with torch.no_grad():
            for ids in samples:
                self.model(input_ids=torch.tensor([ids]), use_cache=False)

    def keep(self, target: dict[str, list[torch.Tensor]], name: str) -> Any:
        return lambda _module, args, _output: target[name].append(args[0].reshape(-1, args[0].shape[-1]).clone())

    def keep_choice(self, name: str) -> Any:
        return lambda _module, _args, output: self.chosen[name].append(output[2].clone())

    def rows(self, module: str, *, all_experts: bool = True) -> torch.Tensor:
        """Return the activations that reach a logical weight of the checkpoint."""
        parent = experts_parent(module)
        if parent is None:
            return torch.cat(self.inputs[module])
        expert, leaf = module.removeprefix(f"{parent}.").split(".")
        tokens = torch.cat(self.inputs[parent.removesuffix("experts") + "gate"])
        if not all_experts:
            tokens = tokens[(torch.cat(self.chosen[parent]) == int(expert)).any(dim=1)]
        if leaf != "down_proj":
            return tokens
        stack = self.model.get_submodule(parent).gate_up_proj[int(expert)].detach()
        half = len(stack) // 2
        return torch.nn.functional.silu(tokens @ stack[:half].T) * (tokens @ stack[half:].T)

    def routed(self, parent: str, experts: int) -> list[int]:
        chosen = torch.cat(self.chosen[parent])
        return [int((chosen == expert).sum()) for expert in range(experts)]


@pytest.fixture(scope="module")
def reference(dataset: Path) -> Callable[[Path], Reference]:
    """Run a model by transformers, once for all tests that compare with it."""
    return cache(lambda folder: Reference(folder, samples_of(dataset)))


def check_statistics(found: Calibration, reference: Reference, *, all_experts: bool = True) -> None:
    """Compare every module's statistics, not only one of those that share an input."""
    for info in found.inputs.values():
        ours = found.read(info)
        assert ours.second_moment is not None
        assert ours.hessian is not None
        for module in info.modules:
            rows = reference.rows(module, all_experts=all_experts).double().numpy()
            blocks = rows.reshape(len(rows), -1, 16)
            hessian = np.einsum("tbi,tbj->bij", blocks, blocks) / len(rows)
            moment = (rows**2).mean(axis=0)
            scale = np.sqrt(np.einsum("bi,bj->bij", moment.reshape(-1, 16), moment.reshape(-1, 16)))
            assert (ours.tokens, ours.amax) == (len(rows), np.abs(rows).max()), module
            np.testing.assert_allclose(ours.second_moment, moment, rtol=1e-6, err_msg=module)
            assert (np.abs(ours.hessian - hessian) <= 1e-6 * scale).all(), module


def quantized_columns(folder: Path, targets: tuple[str, ...] = ()) -> dict[str, int]:
    plan = make_plan(folder, targets=targets)
    plan.checkpoint.source.close()
    return {weight.module: weight.columns for weight in plan.weights()}


def test_every_statistic_equals_float64(checkpoint: Path, held: Held, reference: Callable[[Path], Reference]) -> None:
    found = load_calibration(held(checkpoint))
    found.of_model(quantized_columns(checkpoint))
    assert {module for info in found.inputs.values() for module in info.modules} == quantized_columns(checkpoint).keys()
    expected = reference(checkpoint)
    check_statistics(found, expected)
    for parent, counts in found.routed().items():
        assert counts.tolist() == expected.routed(parent, len(counts))
        assert counts.sum() == 2 * len(torch.cat(expected.chosen[parent]))
    assert len(found.routed()) == (4 if checkpoint.name == MOE else 0)
    assert found.description.is_complete
    assert (found.description.samples, found.description.model) == (SAMPLES, checkpoint.name)


def tokens_of(found: Calibration, module: str) -> int:
    """Return how many tokens a module's statistics are over; 0 where the file knows nothing of it."""
    return next((found.read(info).tokens or 0 for info in found.inputs.values() if module in info.modules), 0)


def test_threads_of_this_process_are_no_cluster(small: Path, dataset: Path, tmp_path: Path, held: Held) -> None:
    path = tmp_path / "a.calibration.safetensors"
    made(small, dataset, path, statistics="amax", executor=mfptq.ThreadExecutor())
    assert path.read_bytes() == held(small, statistics="amax").read_bytes()


def test_experts_with_their_own_tokens_only(
    moe: Path, dataset: Path, tmp_path: Path, reference: Callable[[Path], Reference]
) -> None:
    found = made(moe, dataset, tmp_path / "a.safetensors", all_experts=False)
    check_statistics(found, reference(moe), all_experts=False)
    for parent, counts in found.routed().items():
        assert counts.tolist() == [tokens_of(found, f"{parent}.{expert}.up_proj") for expert in range(len(counts))]


def test_experts_that_no_token_reached_are_left_out(moe: Path, dataset: Path, tmp_path: Path) -> None:
    changes = {"samples": 1, "max_seq_length": 1, "all_experts": False, "statistics": "moments"}
    found = made(moe, dataset, tmp_path / "a.safetensors", **changes)
    found.of_model(quantized_columns(moe))
    for parent, counts in found.routed().items():
        assert counts.sum() == 2
        for expert, count in enumerate(counts):
            assert tokens_of(found, f"{parent}.{expert}.down_proj") == count


def test_a_level_includes_those_before(small: Path, held: Held) -> None:
    files = {level: load_calibration(held(small, statistics=level)) for level in LEVELS}
    for info in files["hessian"].inputs.values():
        amax, moments, hessian, factors = (files[level].read(info) for level in files)
        assert hessian.factors is None
        assert factors.factors.shape == (min(64, info.columns), info.columns)
        assert np.array_equal(factors.hessian, hessian.hessian)
        assert amax.amax == moments.amax == hessian.amax
        assert amax.second_moment is None
        assert moments.hessian is None
        np.testing.assert_allclose(moments.second_moment, hessian.second_moment, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes"),
    sampled(
        [(DENSE, {}), (SMALL, {"statistics": "factors"})],
        [(MOE, {"statistics": "factors"}), (MOE, {}), (MOE, {"all_experts": False}), (MOE, {"dtype": "float32"})],
    ),
    ids=["dense", "small factors", "factors", "default", "routed", "float32"],
)
def test_from_disk_and_in_memory_are_the_same_bytes(
    kind: str,
    changes: dict[str, Any],
    checkpoints: dict[str, Path],
    dataset: Path,
    held: Held,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = checkpoints[kind]
    written = {held(checkpoint, **changes).read_bytes()}
    for name, batch in (("pairs", 2), ("all", SAMPLES)):
        output = tmp_path / f"{name}.safetensors"
        with forced(monkeypatch, streamed=True, batch=batch):
            calibrate(checkpoint, dataset, output, **OPTIONS | changes)
        written.add(output.read_bytes())
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    assert len(written) == 1


def test_each_weight_is_read_once_for_all_samples_of_a_pass(
    moe: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.utils import OffloadedWeightsLoader

    read: dict[str, int] = defaultdict(int)
    original = OffloadedWeightsLoader.__getitem__

    def counted(self: OffloadedWeightsLoader, name: str) -> torch.Tensor:
        read[name] += 1
        return original(self, name)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counted)
    with forced(monkeypatch, streamed=True, batch=3):  # 5 samples: two passes
        calibrate(moe, dataset, tmp_path / "a.safetensors", **OPTIONS)
    layers = {name: count for name, count in read.items() if ".layers." in name}
    assert set(layers.values()) == {2}
    assert {name for name in read if "embed_tokens" in name or "lm_head" in name or "visual" in name} == set()


class StoppedError(BaseException):
    """Stands for Ctrl-C."""


def test_an_interrupted_run_goes_on(
    checkpoint: Path, dataset: Path, held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[CalibrationProgress] = []

    def stop(event: CalibrationProgress) -> None:
        if event.samples == STEPS and event.steps > STEPS * event.total_steps // event.requested:
            raise StoppedError

    whole = load_calibration(held(checkpoint))
    with forced(monkeypatch, streamed=checkpoint.name == MOE):
        with pytest.raises(StoppedError):
            calibrate(checkpoint, dataset, tmp_path / "parts.safetensors", **OPTIONS, on_event=stop)
        half = load_calibration(tmp_path / "parts.safetensors").description
        assert (half.samples, half.requested, half.is_complete) == (STEPS, SAMPLES, False)
        parts = made(checkpoint, dataset, tmp_path / "parts.safetensors", on_event=events.append)
    assert events[-1] == CalibrationProgress(SAMPLES, SAMPLES, events[-1].total_steps, events[-1].total_steps)
    assert (parts.description, parts.inputs) == (whole.description, whole.inputs)
    assert {name: counts.tolist() for name, counts in parts.routed().items()} == {
        name: counts.tolist() for name, counts in whole.routed().items()
    }
    for info in whole.inputs.values():
        ours, theirs = parts.read(info), whole.read(info)
        assert (ours.amax, ours.tokens) == (theirs.amax, theirs.tokens)
        np.testing.assert_allclose(ours.second_moment, theirs.second_moment, rtol=3e-7)
        limit = 3e-7 * np.abs(theirs.hessian).max(axis=(1, 2), keepdims=True)
        assert (np.abs(ours.hessian - theirs.hessian) <= limit).all()


def test_an_unfinished_file_of_another_run_is_kept(small: Path, dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"

    def stop(event: CalibrationProgress) -> None:
        if event.samples == STEPS:
            raise StoppedError

    with pytest.raises(StoppedError):
        calibrate(small, dataset, output, **OPTIONS, on_event=stop)
    before = output.read_bytes()
    other = tmp_path / "other.jsonl"
    other.write_text("".join(f"[{number}, 2, 3]\n" for number in range(SAMPLES)))
    for message, text, changes in (
        ("another dataset", other, {}),
        ("another statistics", dataset, {"statistics": "amax"}),
        ("another requested", dataset, {"samples": 4}),
        ("other inputs", dataset, {"all_experts": False}),
    ):
        with pytest.raises(UsageError, match=f"unfinished run with {message}"):
            calibrate(small, text, output, **OPTIONS | changes)
    assert output.read_bytes() == before
    calibrate(small, other, output, **OPTIONS, overwrite=True)
    with pytest.raises(UsageError, match="exists"):
        calibrate(small, other, output, **OPTIONS)


def test_experts_stored_one_by_one_keep_their_names(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixtral's checkpoint says block_sparse_moe.experts.0.w1 where transformers has one stack under mlp.experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, dtype="bfloat16",
    )  # fmt: skip
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "mixtral")
    written = set()
    for streamed in (False, True):
        output = tmp_path / f"{streamed}.safetensors"
        with forced(monkeypatch, streamed=streamed):
            found = made(tmp_path / "mixtral", dataset, output, encoder=object())
        written.add(output.read_bytes())
    assert len(written) == 1
    parent = "model.layers.1.block_sparse_moe.experts"
    assert found.inputs[f"{parent}.3.w2"].columns == 96
    assert f"{parent}.3.w1" in found.inputs[f"{parent}.gate_up_proj"].modules
    found.of_model(quantized_columns(tmp_path / "mixtral"))
    assert found.routed()[parent].sum() == 2 * sum(map(len, samples_of(dataset)))


def test_layers_outside_of_the_blocks(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BERT's pooler follows the last block: the pass goes on to it, but a streamed one ends before."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    asked = {"targets": ("pooler.dense",), "encoder": object()}
    found = made(tmp_path / "bert", dataset, tmp_path / "a.safetensors", **asked)
    found.of_model(quantized_columns(tmp_path / "bert", ("pooler.dense",)))
    assert found.known("pooler.dense").tokens == SAMPLES  # it sees one token of each
    assert found.known("encoder.layer.1.attention.self.key").tokens == sum(map(len, samples_of(dataset)))
    with forced(monkeypatch, streamed=True), pytest.raises(ScaleError, match=r"'pooler\.dense' lies outside"):
        calibrate(tmp_path / "bert", dataset, tmp_path / "b.safetensors", **OPTIONS, **asked)


def test_ignored_modules_are_left_out(small: Path, dataset: Path, tmp_path: Path) -> None:
    found = made(small, dataset, tmp_path / "a.safetensors", ignore=["re:.*self_attn.*"])
    assert found.inputs
    assert not [name for name in found.inputs if "self_attn" in name]


def test_activations_that_overflow_stop_the_run(dataset: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = write_checkpoint(tmp_path / "broken", DENSE, "single")
    tensors = load_file(source / "model.safetensors")
    tensors["model.language_model.layers.1.mlp.up_proj.weight"][:] = 3e38
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ScaleError, match=r"reaches 'model\.language_model\.layers\.1\.mlp\.down_proj' is not finite"):
        calibrate(source, dataset, tmp_path / "a.safetensors", **OPTIONS)
    assert not (tmp_path / "a.safetensors").exists()


def test_what_cannot_be_calibrated_is_refused(moe: Path, dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    far = tmp_path / "far.jsonl"
    far.write_text("[1, 320]\n")
    with pytest.raises(UsageError, match="token id 320, the model knows 320"):
        calibrate(moe, far, output, **OPTIONS)
    with pytest.raises(UsageError, match="should end in"):
        calibrate(moe, dataset, tmp_path / "a.bin", **OPTIONS)
    for device in ("banana", "cuda:77"):
        with pytest.raises(UsageError, match=f"device '{device}' cannot be used"):
            calibrate(moe, dataset, output, **OPTIONS | {"device": device})
    with pytest.raises(UsageError, match="samples is 0"):
        calibrate(moe, dataset, output, samples=0)
    with pytest.raises(MemoryBudgetError, match="raise max_memory"):
        calibrate(moe, dataset, output, **OPTIONS | {"max_memory": "10MB"})
    with pytest.raises(SourceError, match="no such folder"):
        calibrate(tmp_path / "none", dataset, output, **OPTIONS)
    assert not output.exists()


def test_the_model_must_be_whole(dataset: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = write_checkpoint(tmp_path / "broken", DENSE, "single")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.language_model.layers.1.input_layernorm.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks 1 weights of its model: .*layers\.1\.input_layernorm"):
        calibrate(source, dataset, tmp_path / "a.safetensors", **OPTIONS)


def test_missing_packages_are_one_line(moe: Path, dataset: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"needs torch and transformers and accelerate: pip install 'mfptq\[calibrate\]'"
    ):
        calibrate(moe, dataset, tmp_path / "a.safetensors")


def test_the_rest_of_mfptq_stays_light() -> None:
    code = "import sys, mfptq, mfptq.cli.main; print({'transformers', 'accelerate', 'torch'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.usefixtures("default_signals")
def test_the_command_stops_on_ctrl_c_and_goes_on(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first signal ends the run between two blocks; what was written after the last batch stays."""
    text, output = tmp_path / "text.jsonl", tmp_path / "a.calibration.safetensors"
    text.write_text("".join(json.dumps({"text": f"number {number}"}) + "\n" for number in range(20)))
    monkeypatch.setattr(process._Request, "number", 0)
    process.handle_signals()

    def interrupt() -> None:
        deadline = time.monotonic() + 100
        while not output.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    user = threading.Thread(target=interrupt)
    user.start()
    options = ("--output", output, "--samples", 20, "--batch-size", 1, "--statistics", "amax")
    run = command("calibrate", moe, "--dataset", text, *options)
    user.join()
    done = load_calibration(output).description
    assert run.returncode == 130, run.stderr
    assert 0 < done.samples < done.requested == 20
    assert f"{done.samples} of 20 samples are kept in {output}: rerun the same command to go on" in run.stderr
    assert "Traceback" not in run.stderr
    rest = {"samples": 20, "max_seq_length": 4096, "batch_size": 20, "statistics": "amax"}
    assert made(moe, text, output, **rest).description.is_complete

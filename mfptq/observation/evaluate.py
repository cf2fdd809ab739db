"""Measure what quantization does to a model's predictions: source and output side by side on the same text.

`evaluate` is public. It opens both checkpoints and reads the text; the models are run by `evaluation_pass`. The figures are written
into the output's folder (`output.evaluations`), and what streaming needs beside it; nothing else of the output changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeAlias

from ..checkpoint.companions import FileChoice
from ..checkpoint.folder import Checkpoint, Origin, read_checkpoint
from ..errors import SourceError, UsageError, quote
from ..hub.opening import HubOptions, open_checkpoint
from ..output.estimates import Estimate, WindowSums
from ..output.evaluations import check_writable, record_evaluation
from ..storage.files import expanded
from . import models
from .forward_options import ForwardOptions
from .hub_datasets import dataset_files
from .texts import Encoder, Samples, read_samples

OnProgress: TypeAlias = "Callable[[EvaluationProgress], object]"
BUILT_IN = Path(__file__).with_name("evaluation.txt")


@dataclass(frozen=True, slots=True)
class EvaluationProgress:
    """How far an evaluation is: blocks run for a sample, for source and output together, done of all."""

    steps: int
    total_steps: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How an output's predictions differ from its source's; losses and divergences are in nats for each token.

    `dataset` is a path or "built-in", `digest` the SHA-256 of the token ids. `samples` are windows of text, `tokens` the
    positions judged: all whose next token is known. `loss_difference` is the output's loss minus the source's, and its
    standard error is that of the pairs. `kl_divergence` is KL(source || output). `top1_agreement` is the share of positions
    where both rank the same token first. `hidden_errors` has, for each block in order, the mean over tokens of the relative
    error of the hidden state behind it. `windows` has the sums that all figures but these are made of. `left_out` are quantized modules that the model does not build or run for text.
    """

    source: str
    output: str
    scheme: str
    dtype: str
    dataset: str
    digest: str
    samples: int
    tokens: int
    source_perplexity: Estimate
    perplexity: Estimate
    loss_difference: Estimate
    kl_divergence: Estimate
    top1_agreement: Estimate
    hidden_errors: Mapping[str, Estimate]
    left_out: tuple[str, ...] = ()
    windows: tuple[WindowSums, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions(ForwardOptions):
    """How an evaluation is made: the keywords of `evaluate` that decide neither what is read nor written, checked."""

    def __post_init__(self) -> None:
        ForwardOptions.__post_init__(self)
        if self.max_seq_length < 2:
            raise UsageError(f"max_seq_length is {self.max_seq_length}, expected at least 2: a token and the next")


def evaluate(  # noqa: PLR0913 - one keyword for each option of the command
    output: str | Path,
    source: str | Path,
    dataset: str | Path | None = None,
    *,
    samples: int = 64,
    max_seq_length: int = 512,
    device: str = "cpu",
    dtype: str = "auto",
    max_memory: str | int | None = None,
    record: bool = True,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    encoder: Encoder | None = None,
    on_event: OnProgress | None = None,
) -> Evaluation:
    """Run text through a converted checkpoint and its source, and return how their predictions differ.

    `output` is a folder that `convert` wrote, `source` what it was made from: a folder or a Hub repo id, for which
    `revision`, `token` and `cache_dir` are. `dataset` is text as `calibrate` takes it; without it a short built-in text is
    used. Weights of the output are decoded by the reference; where it has input scales, inputs are rounded to NVFP4 as
    engines do. `dtype` is that of the computation, `auto` the source's. `encoder` is a tokenizer or processor of
    transformers, the source's own by default. Tensors that were kept are read from the source alone: `verify` compares them. With
    `record` the figures go into the output's folder and its model card, and an interrupted evaluation goes on where it stopped.

    Raises MfptqError and its subclasses; UsageError if transformers and accelerate are not installed.
    """
    options = EvaluationOptions(
        samples=samples, max_seq_length=max_seq_length, device=device, max_memory=max_memory, dtype=dtype
    )
    models.require_extra("evaluate")
    models.check_device(device)
    from .evaluation_pass import run_pass  # these need what is there by now
    from .quantized import read_quantized
    from .unfinished import discard_notes

    hub = HubOptions(revision, token, cache_dir, keep_source=True)
    with _checkpoints(output, source, hub, record=record) as (made, original):
        quantized = read_quantized(made, original)
        with models.quiet_transformers():
            skeleton = models.build_skeleton(original, dtype)
            dataset, called = (BUILT_IN, "built-in") if dataset is None else (dataset, str(dataset))
            files = dataset_files(dataset, token=token, cache_dir=cache_dir)
            encoder = models.DeferredEncoder(original.origin.local) if encoder is None else encoder
            text = _windows(read_samples(files, encoder, samples=samples, max_seq_length=max_seq_length), dataset)
            found = run_pass(skeleton, quantized, text, options, dataset=called, record=record, on_event=on_event)
    if record:
        record_evaluation(made.origin.local, asdict(found))
        discard_notes(made.origin.local)
    return found


@contextmanager
def _checkpoints(
    output: str | Path, source: str | Path, hub: HubOptions, *, record: bool
) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Lend the output and its source; with `record` the output's folder must be writable."""
    made = read_checkpoint(Origin(expanded(output)))
    with closing(made.source):
        if record:
            check_writable(made.origin.local)
        choice = FileChoice(output=frozenset(shard.name for shard in made.shards))
        original = open_checkpoint(source, hub, choice)
        with closing(original.source):
            if "quantization_config" in original.config:
                raise SourceError(f"the source {quote(original.origin)} is quantized: give the model it was made from")
            yield made, original


def _windows(text: Samples, dataset: str | Path) -> Samples:
    """Return the samples in which something can be predicted; the digest stays that of all."""
    windows = tuple(ids for ids in text.ids if len(ids) > 1)
    if not windows:
        raise UsageError(f"dataset {quote(dataset)} holds no sample of two tokens: nothing can be predicted")
    return replace(text, ids=windows)

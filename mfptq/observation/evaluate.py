"""Measure what quantization does to a model's predictions: source and output side by side on the same text.

`evaluate` is public. Both models walk through the text block by block, in step: a block's weights are read once for all the
text, first the source's, then the output's in their place. Nothing is written but what streaming needs, beside the output.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.companions import FileChoice
from ..checkpoint.folder import Origin, read_checkpoint
from ..checkpoint.hub import HubOptions, open_checkpoint
from ..errors import SourceError, UsageError, quote
from ..sizes import parse_size
from ..storage.files import expanded
from .texts import Encoder, Samples, TokenIds, read_samples

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint
    from .comparison import Estimate, WindowSums
    from .models import Skeleton
    from .quantized import QuantizedCheckpoint
    from .side_by_side import SideBySide

BUILT_IN = Path(__file__).with_name("evaluation.txt")
DTYPES = ("auto", "bfloat16", "float32")


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
    error of the hidden state behind it. `left_out` are quantized modules that the model does not build or run for text.
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


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """How an evaluation is made: the keywords of `evaluate`, checked."""

    samples: int = 64
    max_seq_length: int = 512
    device: str = "cpu"
    dtype: str = "auto"
    max_memory: str | int | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"samples is {self.samples}, expected at least 1")
        if self.max_seq_length < 2:
            raise UsageError(f"max_seq_length is {self.max_seq_length}, expected at least 2: a token and the next")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {quote(self.dtype)} is unknown, expected one of {', '.join(DTYPES)}")

    @property
    def budget(self) -> int | None:
        """The ceiling for the process, in bytes."""
        return None if self.max_memory is None else parse_size(self.max_memory)


@dataclass(slots=True)
class _Sums:
    """What is known of each window so far."""

    windows: list[WindowSums] = field(default_factory=list)
    hidden: dict[str, list[float]] = field(default_factory=dict)


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
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    encoder: Encoder | None = None,
    on_event: Callable[[EvaluationProgress], object] | None = None,
) -> Evaluation:
    """Run text through a converted checkpoint and its source, and return how their predictions differ.

    `output` is a folder that `convert` wrote, `source` what it was made from: a folder or a Hub repo id, for which
    `revision`, `token` and `cache_dir` are. `dataset` is a file as `calibrate` takes it; without one a short built-in text is
    used. Weights of the output are decoded by the reference; where it has input scales, inputs are rounded to NVFP4 as
    engines do. `dtype` is that of the computation, `auto` the source's. `encoder` is a tokenizer or processor of
    transformers, the source's own by default. Tensors that were kept are read from the source alone: `verify` compares them.

    Raises MfptqError and its subclasses; UsageError if transformers and accelerate are not installed.
    """
    from . import models
    from .quantized import read_quantized

    options = EvaluationOptions(samples, max_seq_length, device, dtype, max_memory)
    path = BUILT_IN if dataset is None else expanded(dataset)
    models.require_extra("evaluate")
    models.check_device(device)
    with ExitStack() as opened:
        made = read_checkpoint(Origin(expanded(output)))
        opened.callback(made.source.close)
        choice = FileChoice(output=frozenset(shard.name for shard in made.shards))
        checkpoint = open_checkpoint(source, HubOptions(revision, token, cache_dir, keep_source=True), choice)
        opened.callback(checkpoint.source.close)
        if "quantization_config" in checkpoint.config:
            raise SourceError(f"the source {quote(checkpoint.origin)} is quantized: give the model it was made from")
        quantized = read_quantized(made, checkpoint)
        opened.enter_context(models.quiet_transformers())
        skeleton = models.build_skeleton(checkpoint, dtype)
        encoder = encoder if encoder is not None else models.load_encoder(skeleton.folder)
        text = read_samples(path, encoder, samples=samples, max_seq_length=max_seq_length)
        windows = tuple(ids for ids in text.ids if len(ids) > 1)
        if not windows:
            raise UsageError(f"dataset {quote(path)} holds no sample of two tokens: nothing can be predicted")
        models.check_vocabulary(skeleton.model, text.highest)
        pair = opened.enter_context(_opened(skeleton, (checkpoint, quantized), options, windows))
        sums = _Sums()
        _run(pair, windows, sums, on_event)
    return _summed(pair, sums, text, ("built-in" if dataset is None else str(path), checkpoint))


@contextmanager
def _opened(
    skeleton: Skeleton,
    checkpoints: tuple[Checkpoint, QuantizedCheckpoint],
    options: EvaluationOptions,
    windows: tuple[TokenIds, ...],
) -> Iterator[SideBySide]:
    """Load the source's model, whole or on disk as memory allows, and lend what runs both."""
    from . import models
    from .side_by_side import SideBySide, decoder_blocks, measure
    from .streaming import Runner, open_stream

    source, output = checkpoints
    blocks = decoder_blocks(skeleton.model, skeleton.config.get_text_config().num_hidden_layers)
    streamed = measure(skeleton, checkpoints, windows).is_streamed(options.budget, options.device)
    with ExitStack() as stack:
        if streamed:
            folder = tempfile.TemporaryDirectory(prefix=".mfptq-", dir=output.checkpoint.origin.local.parent)
            model = models.load_on_disk(skeleton, Path(stack.enter_context(folder)))
            runner: Runner = open_stream(model, blocks, source, device=options.device, dtype=options.dtype)
        else:
            runner = Runner(models.load_whole(skeleton, options.device), blocks, options.device)
        runner.to_end = True
        pair = SideBySide(runner, output)
        stack.enter_context(runner.engaged())
        yield pair


def _run(
    pair: SideBySide,
    windows: tuple[TokenIds, ...],
    sums: _Sums,
    on_event: Callable[[EvaluationProgress], object] | None,
) -> None:
    """Walk both models through all windows."""
    from .comparison import compare_logits, hidden_error

    total = 2 * len(windows) * (len(pair.runner.blocks) + 1)
    steps = 0

    def tick() -> None:
        nonlocal steps
        steps += 1
        if on_event is not None:
            on_event(EvaluationProgress(steps, total))

    for name in pair.runner.blocks:
        sums.hidden[name] = [hidden_error(*both) for both in pair.run_block(name, windows, tick)]
    for ids, (exact, found) in zip(windows, pair.run_head(windows, tick), strict=True):
        sums.windows.append(compare_logits(exact, found, ids))


def _summed(pair: SideBySide, sums: _Sums, text: Samples, about: tuple[str, Checkpoint]) -> Evaluation:
    from .comparison import exponential, ratio

    counts = [window.positions for window in sums.windows]
    lengths = [len(ids) for ids in text.ids if len(ids) > 1]

    def mean(take: Callable[[WindowSums], float]) -> Estimate:
        return ratio([take(window) for window in sums.windows], counts)

    return Evaluation(
        source=str(about[1].origin),
        output=str(pair.output.checkpoint.origin),
        scheme=pair.output.scheme,
        dtype=pair.dtype,
        dataset=about[0],
        digest=text.digest,
        samples=len(counts),
        tokens=sum(counts),
        source_perplexity=exponential(mean(lambda window: window.source_loss)),
        perplexity=exponential(mean(lambda window: window.loss)),
        loss_difference=mean(lambda window: window.loss - window.source_loss),
        kl_divergence=mean(lambda window: window.divergence),
        top1_agreement=mean(lambda window: window.agreed),
        hidden_errors={name: ratio(errors, lengths) for name, errors in sums.hidden.items()},
        left_out=tuple(pair.substitution.left_out),
    )

"""Measure what quantization does to a model's predictions: source and output side by side on the same text.

`evaluate` is public. Both models walk through the text block by block, in step: a block's weights are read once for all the
text, first the source's, then the output's in their place. What is written lies in the output's folder: notes while it goes on, then
the figures (`output.evaluations`); and what streaming needs, beside the output.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .._version import __version__
from ..checkpoint.companions import FileChoice
from ..checkpoint.folder import Origin, read_checkpoint
from ..checkpoint.hub import HubOptions, open_checkpoint
from ..errors import SourceError, UsageError, quote
from ..output.estimates import Estimate, WindowSums, exponential, ratio
from ..output.evaluations import check_writable, record_evaluation
from ..storage.files import expanded
from .forward_options import ForwardOptions
from .hub_datasets import dataset_files
from .texts import Encoder, Samples, TokenIds, read_samples

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint
    from .models import Skeleton
    from .quantized import QuantizedCheckpoint
    from .side_by_side import SideBySide
    from .unfinished import Progress, Unfinished

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
    on_event: Callable[[EvaluationProgress], object] | None = None,
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
    from . import models
    from .quantized import read_quantized
    from .unfinished import Unfinished

    options = EvaluationOptions(
        samples=samples, max_seq_length=max_seq_length, device=device, max_memory=max_memory, dtype=dtype
    )
    files = dataset_files(BUILT_IN if dataset is None else dataset, token=token, cache_dir=cache_dir)
    models.require_extra("evaluate")
    models.check_device(device)
    with ExitStack() as opened:
        hub = HubOptions(revision, token, cache_dir, keep_source=True)
        made, checkpoint = _checkpoints(opened, output, (source, hub), record=record)
        quantized = read_quantized(made, checkpoint)
        opened.enter_context(models.quiet_transformers())
        skeleton = models.build_skeleton(checkpoint, dtype)
        encoder = encoder if encoder is not None else models.DeferredEncoder(skeleton.folder)
        text = read_samples(files, encoder, samples=samples, max_seq_length=max_seq_length)
        windows = tuple(ids for ids in text.ids if len(ids) > 1)
        if not windows:
            raise UsageError(f"dataset {quote(dataset)} holds no sample of two tokens: nothing can be predicted")
        models.check_vocabulary(skeleton.model, text.highest)
        pair = opened.enter_context(_opened(skeleton, (checkpoint, quantized), options, windows))
        notes = Unfinished(made.origin.local if record else None, _key(pair, checkpoint, text))
        progress = notes.restore(device)
        _run(pair, windows, progress, (notes, on_event))
    found = _summed(pair, progress, text, ("built-in" if dataset is None else str(dataset), checkpoint))
    if record:
        record_evaluation(made.origin.local, asdict(found))
    notes.finished()
    return found


def _checkpoints(
    opened: ExitStack, output: str | Path, source: tuple[str | Path, HubOptions], *, record: bool
) -> tuple[Checkpoint, Checkpoint]:
    """Return the output and its source, open until `opened` is closed; with `record` the output's folder must be writable."""
    made = read_checkpoint(Origin(expanded(output)))
    opened.callback(made.source.close)
    if record:
        check_writable(made.origin.local)
    checkpoint = open_checkpoint(*source, FileChoice(output=frozenset(shard.name for shard in made.shards)))
    opened.callback(checkpoint.source.close)
    if "quantization_config" in checkpoint.config:
        raise SourceError(f"the source {quote(checkpoint.origin)} is quantized: give the model it was made from")
    return made, checkpoint


def _key(pair: SideBySide, source: Checkpoint, text: Samples) -> tuple[object, ...]:
    """Return what tells an evaluation from others: all that its figures depend on."""
    files = [
        (shard.name, shard.size, shard.digest, (checkpoint.origin.local / shard.name).stat().st_mtime_ns)
        for checkpoint in (source, pair.output.checkpoint)
        for shard in checkpoint.shards
    ]
    return (__version__, files, pair.dtype, pair.runner.device, text.digest)


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
    progress: Progress,
    about: tuple[Unfinished, Callable[[EvaluationProgress], object] | None],
) -> None:
    """Walk both models through all windows, from where `progress` stands on."""
    from .comparison import compare_logits, hidden_error

    (notes, on_event), blocks = about, pair.runner.blocks
    pair.given = progress.given
    done, judged = len(progress.hidden), len(progress.windows)
    steps, total = 2 * (len(windows) * done + judged), 2 * len(windows) * (len(blocks) + 1)

    def tick() -> None:
        nonlocal steps
        steps += 1
        if on_event is not None:
            on_event(EvaluationProgress(steps, total))

    for name in blocks[done:]:
        progress.hidden[name] = [hidden_error(*both) for both in pair.run_block(name, windows, tick)]
        progress.given = pair.given
        notes.block_done(progress, last=name == blocks[-1])
    for ids, (exact, found) in zip(windows[judged:], pair.run_head(windows, tick, first=judged), strict=True):
        progress.windows.append(compare_logits(exact, found, ids))
        notes.window_done(progress.windows[-1])


def _summed(pair: SideBySide, progress: Progress, text: Samples, about: tuple[str, Checkpoint]) -> Evaluation:
    counts = [window.positions for window in progress.windows]
    lengths = [len(ids) for ids in text.ids if len(ids) > 1]

    def mean(take: Callable[[WindowSums], float]) -> Estimate:
        return ratio([take(window) for window in progress.windows], counts)

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
        hidden_errors={name: ratio(errors, lengths) for name, errors in progress.hidden.items()},
        left_out=tuple(pair.substitution.left_out),
        windows=tuple(progress.windows),
    )

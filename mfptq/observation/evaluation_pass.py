"""Run a source model and its quantized output over windows of text, in step, and sum up how their predictions differ.

Called by `evaluate`. Both models walk through the text block by block: a block's weights are read once for all the text, first the
source's, then the output's in their place. What is found is noted in the output's folder while it goes on (`unfinished`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch

from .._version import __version__
from ..calibration.file import InputInfo
from ..checkpoint.folder import Checkpoint
from ..output.estimates import Estimate, WindowSums, exponential, ratio
from . import models
from .evaluate import Evaluation, EvaluationOptions, EvaluationProgress, OnProgress
from .quantized import DECODED_AT_ONCE, QuantizedCheckpoint
from .residency import Room, measure_demand
from .side_by_side import SideBySide, decoder_blocks
from .streaming import load_runner
from .texts import Samples, TokenIds
from .unfinished import Progress, Unfinished

LOGIT_COPIES = 6  # of a window, float32: both models', their logarithms, and what the model holds meanwhile
DECODING_BYTES = 32  # for each weight that is decoded at once
CHUNK_ELEMENTS = 2**24  # log-probabilities that are in memory at once, for each model


def run_pass(
    skeleton: models.Skeleton,
    output: QuantizedCheckpoint,
    text: Samples,
    options: EvaluationOptions,
    *,
    dataset: str,
    record: bool,
    on_event: OnProgress | None,
) -> Evaluation:
    """Return how the predictions of an output and its source differ; go on where an interrupted pass has left notes.

    `dataset` is what the text is called. With `record` notes are kept in the output's folder.
    """
    models.check_vocabulary(skeleton.model, text.highest)
    blocks = decoder_blocks(skeleton.model, skeleton.config.get_text_config().num_hidden_layers)
    streamed = is_streamed(skeleton, output, text, options)
    folder = output.checkpoint.origin.local
    with load_runner(skeleton, blocks, options, stream_in=folder.parent if streamed else None) as runner:
        pair = SideBySide(runner, output)
        notes = Unfinished(folder if record else None, _key(pair, skeleton.checkpoint, text))
        progress = notes.restore(options.device)
        if on_event is not None:
            runner.tick = _counted(on_event, progress, len(text.ids), len(blocks))
        _compare(pair, text, progress, notes)
    return _summed(pair, progress, text, source=str(skeleton.checkpoint.origin), dataset=dataset)


def is_streamed(
    skeleton: models.Skeleton, output: QuantizedCheckpoint, text: Samples, options: EvaluationOptions
) -> bool:
    """Return whether the model has to be read block by block to run both over the text, from names and shapes alone.

    Raises MemoryBudgetError, naming the least that works, where not even a block fits.
    """
    length = max(len(ids) for ids in text.ids)
    infos = [InputInfo(each.module, each.columns, (each.module,)) for each in output.weights.values()]
    demand = measure_demand(skeleton, infos, level="amax", length=length)
    hidden = 2 * sum(len(ids) for ids in text.ids) * demand.sample // length
    embeddings = skeleton.model.get_input_embeddings().weight  # type: ignore[operator]
    logits = LOGIT_COPIES * 4 * length * embeddings.shape[0]
    elements = max(1, sum(parameter.numel() for parameter in skeleton.model.parameters()))
    block = max(demand.block, demand.model * embeddings.numel() // elements)  # the head is as large as the embeddings
    common = hidden + demand.work + logits + DECODING_BYTES * DECODED_AT_ONCE
    room = Room.on(options.device, options.budget)
    if common + block + demand.model <= room.free:
        return False
    room.check("the evaluation", common + 2 * block, "samples or max_seq_length")
    return True


def _key(pair: SideBySide, source: Checkpoint, text: Samples) -> tuple[object, ...]:
    """Return what tells an evaluation from others: all that its figures depend on."""
    files = [
        (shard.name, shard.size, shard.digest, (checkpoint.origin.local / shard.name).stat().st_mtime_ns)
        for checkpoint in (source, pair.output.checkpoint)
        for shard in checkpoint.shards
    ]
    return (__version__, files, pair.dtype, pair.runner.device, text.digest)


def _counted(on_event: OnProgress, progress: Progress, windows: int, blocks: int) -> Callable[[], object]:
    """Return what tells of one step more at every call: a block, or the head, that was run for a window by one of the models."""
    steps = count(2 * (windows * len(progress.hidden) + len(progress.windows)) + 1)
    return lambda: on_event(EvaluationProgress(next(steps), 2 * windows * (blocks + 1)))


def _compare(pair: SideBySide, text: Samples, progress: Progress, notes: Unfinished) -> None:
    """Walk both models through all windows, from where `progress` stands on."""
    blocks = pair.runner.blocks
    pair.given = progress.given
    for name in blocks[len(progress.hidden) :]:
        progress.hidden[name] = [hidden_error(*both) for both in pair.run_block(name, text.ids)]
        progress.given = pair.given
        notes.block_done(progress, last=name == blocks[-1])
    first = len(progress.windows)
    for ids, (exact, found) in zip(text.ids[first:], pair.run_head(text.ids, first=first), strict=True):
        progress.windows.append(compare_logits(exact, found, ids))
        notes.window_done(progress.windows[-1])


def compare_logits(source: torch.Tensor, output: torch.Tensor, ids: TokenIds) -> WindowSums:
    """Return the sums for logits `[L, V]` of both models on the same `L` tokens.

    `divergence` is that of the output's distribution from the source's, KL(source || output), in nats; `loss` the negative
    log-probability of the next token. Logarithms are taken in float32, sums in float64.
    """
    count = len(ids) - 1
    following = torch.from_numpy(ids[1:]).to(source.device)[:, None]
    sums = torch.zeros(4, dtype=torch.float64)
    step = max(1, CHUNK_ELEMENTS // source.shape[-1])
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        exact, found = (torch.log_softmax(logits[part].float(), dim=-1) for logits in (source, output))
        sums[0] -= exact.gather(1, following[part]).sum(dtype=torch.float64).cpu()
        sums[1] -= found.gather(1, following[part]).sum(dtype=torch.float64).cpu()
        sums[2] += (exact.exp() * (exact - found)).sum(dtype=torch.float64).cpu()
        sums[3] += (exact.argmax(dim=-1) == found.argmax(dim=-1)).sum().cpu()
    return WindowSums(count, float(sums[0]), float(sums[1]), float(sums[2]), int(sums[3]))


def hidden_error(source: torch.Tensor, output: torch.Tensor) -> float:
    """Return the sum over tokens of `|output - source| / |source|` for hidden states `[..., L, H]`."""
    exact = source.float()
    norms = exact.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((output.float() - exact).norm(dim=-1) / norms).sum(dtype=torch.float64))


def _summed(pair: SideBySide, progress: Progress, text: Samples, *, source: str, dataset: str) -> Evaluation:
    counts = [window.positions for window in progress.windows]
    lengths = [len(ids) for ids in text.ids]

    def mean(take: Callable[[WindowSums], float]) -> Estimate:
        return ratio([take(window) for window in progress.windows], counts)

    return Evaluation(
        source=source,
        output=str(pair.output.checkpoint.origin),
        scheme=pair.output.scheme,
        dtype=pair.dtype,
        dataset=dataset,
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

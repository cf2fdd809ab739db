"""Make a calibration file: run the model on text and sum up what reaches its linear layers, here or on many machines.

`calibrate` is public. It reads the text and plans; the work is done by `calibration_pass`, or spread by `calibration_parts`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from ..calibration.file import Description, Level, check_output
from ..execution.executors import Request, ThreadExecutor
from ..hub.opening import HubOptions, open_checkpoint
from ..planning.building import build_plan
from ..planning.settings import Decisions, check_decisions
from ..storage.files import expanded
from . import models
from .calibration_pass import CalibrationOptions, OnProgress, Share, run_pass
from .hub_datasets import dataset_files
from .texts import Encoder, read_samples

if TYPE_CHECKING:
    from .calibration_parts import CalibrationExecutor


def calibrate(  # noqa: PLR0913 - one keyword for each option of the command
    source: str | Path,
    dataset: str | Path,
    output: str | Path,
    *,
    samples: int = 256,
    max_seq_length: int = 4096,
    batch_size: int | None = None,
    statistics: Level = "hessian",
    device: str = "cpu",
    max_memory: str | int | None = None,
    dtype: str = "auto",
    all_experts: bool = True,
    sensitivities: bool = False,
    ignore: Iterable[str] = (),
    targets: Iterable[str] = (),
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    overwrite: bool = False,
    encoder: Encoder | None = None,
    on_event: OnProgress | None = None,
    executor: CalibrationExecutor | ThreadExecutor | None = None,
) -> Description:
    """Run a model over text and write the statistics of its linear layers' inputs; returns what was done.

    `source` is a checkpoint as `convert` takes it, `dataset` a file of JSON lines, parquet or plain text, or a dataset on the
    Hub as `OWNER/NAME[@REVISION][:SPLIT]`. An `output` that an interrupted run left is gone on with. `batch_size` None means
    what memory allows, `max_memory` None what the machine has. `dtype` is that of the computation, `auto` the checkpoint's;
    many CPUs are several times faster in float32. `all_experts` shows every token to every expert. `sensitivities` also
    measures how much the model's last hidden state changes where the layers of each input alone are rounded. `encoder` is a
    tokenizer or processor of transformers, the checkpoint's own by default. The file is written anew after every batch of
    samples, so it can be used at any time.

    `executor` spreads the samples over a cluster, as `RayExecutor`, or none does, as `ThreadExecutor`; memory is then that of
    each task, by default a node's in equal shares, and the file appears when all of it is done.

    Raises MfptqError and its subclasses; UsageError if transformers and accelerate are not installed.
    """
    options = CalibrationOptions(
        samples=samples, max_seq_length=max_seq_length, batch_size=batch_size, statistics=statistics, device=device,
        max_memory=max_memory, dtype=dtype, all_experts=all_experts, sensitivities=sensitivities,
    )  # fmt: skip
    output, cluster = expanded(output), None if isinstance(executor, ThreadExecutor) else executor
    check_output(output, overwrite=overwrite or cluster is None)
    models.require_extra()
    if cluster is None:
        models.check_device(device)
    decisions: Decisions = {"ignore": tuple(ignore), "targets": tuple(targets), "cache_dir": cache_dir}
    checkpoint = open_checkpoint(source, HubOptions(revision, token, cache_dir, keep_source=True))
    with closing(checkpoint.source), models.quiet_transformers():
        plan = build_plan(checkpoint, check_decisions(decisions))
        files = dataset_files(dataset, token=token, cache_dir=cache_dir)
        encoder = models.DeferredEncoder(checkpoint.origin.local) if encoder is None else encoder
        text = read_samples(files, encoder, samples=samples, max_seq_length=max_seq_length)
        if cluster is None:
            return run_pass(plan, Share.whole(text), output, options, overwrite=overwrite, on_event=on_event)
        from .calibration_parts import CalibrationOrder, calibrate_in_parts  # which few runs need

        order = CalibrationOrder(plan, Request.of(plan, decisions), options, text)
        return calibrate_in_parts(order, output, cluster, overwrite=overwrite, on_event=on_event)

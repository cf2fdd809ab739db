"""Load models and tokenizers by transformers: whole, or left on disk by accelerate, to be read block by block.

Called by `calibrate`, `evaluate` and `cluster.tasks`, before torch is known to be there: what needs it is imported in functions.
No code of a checkpoint is ever run (`trust_remote_code`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError, UsageError, quote

if TYPE_CHECKING:
    from torch import nn

    from ..checkpoint.folder import Checkpoint

EXTRA = ("torch", "transformers", "accelerate")
_LOADING = (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError, TypeError)


def require_extra(command: str = "calibrate") -> None:
    """Raise UsageError unless the packages that calibration and evaluation need are there."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{command} needs {' and '.join(missing)}: pip install 'mfptq[calibrate]'")


def check_device(name: str) -> None:
    """Raise UsageError for a device that torch does not have here."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(f"device {quote(name)} cannot be used: {quote(reason)}") from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the bars and hints of transformers off stderr inside the block; its errors still show."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    offload_hints = getLogger("accelerate.big_modeling")
    level = offload_hints.level
    offload_hints.setLevel(ERROR)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        offload_hints.setLevel(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def loading_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn what transformers raises inside the block into SourceError, one line."""
    try:
        yield
    except _LOADING as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise SourceError(f"transformers cannot load the {what} of {quote(folder)}: {quote(lines[0])}") from error


class DeferredEncoder:
    """A checkpoint's tokenizer or processor, loaded when the first text meets it: rows of token ids need none.

    A large vocabulary takes transformers several seconds.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _loaded(self) -> Any:
        return load_encoder(self._folder)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Encode, as a tokenizer does."""
        return self._loaded(*arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the tokenizer."""
        return getattr(self._loaded, name)


def load_encoder(folder: Path) -> Any:
    """Return the checkpoint's tokenizer, or its processor where it has no tokenizer of its own or no chat template."""
    from transformers import AutoProcessor, AutoTokenizer

    with loading_errors("tokenizer", folder):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except _LOADING:
            return AutoProcessor.from_pretrained(folder)
        if not tokenizer.chat_template and (folder / "chat_template.json").is_file():
            return AutoProcessor.from_pretrained(folder)
        return tokenizer


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A checkpoint's model without weights: `model` is on the meta device, `factory` loads it in earnest, to compute in `dtype`."""

    checkpoint: Checkpoint
    model: nn.Module
    config: Any
    factory: Any
    dtype: str


def build_skeleton(checkpoint: Checkpoint, dtype: str) -> Skeleton:
    """Return the model that the checkpoint's config describes, without weights; raises SourceError if there is none."""
    import transformers
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    folder = checkpoint.origin.local
    with loading_errors("model", folder):
        config = transformers.AutoConfig.from_pretrained(folder)
        for part in (config, config.get_text_config()):
            part.use_cache = False
        factory = getattr(transformers, next(iter(config.architectures or ()), ""), None)
        with init_empty_weights(include_buffers=False), no_init_weights():  # random numbers for no weights take longest
            if factory is None:
                factory = transformers.AutoModelForCausalLM
                model = factory.from_config(config)
            else:
                model = factory(config)
    return Skeleton(checkpoint, model, config, factory, dtype)


def check_vocabulary(model: nn.Module, highest: int) -> None:
    """Raise UsageError if a text's highest token id is beyond the model's embedding table."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if highest >= rows:
        raise UsageError(f"the dataset has token id {highest}, the model knows {rows} tokens")


def load_whole(skeleton: Skeleton, device: str) -> nn.Module:
    """Return the model with its weights on the device."""
    return _load(skeleton, skeleton.dtype, {"": device}, None)


def load_on_disk(skeleton: Skeleton, offload: Path) -> nn.Module:
    """Return the model with its weights left where they are; what has to be rearranged goes to the folder `offload`.

    accelerate's hooks read each module's weights when it runs; `Stream` takes them over for the repeated blocks. They
    keep the checkpoint's dtype here: transformers would read all of them to convert them.
    """
    return _load(skeleton, "auto", {"": "disk"}, offload)


def _load(skeleton: Skeleton, dtype: str, device_map: dict[str, str], offload: Path | None) -> nn.Module:
    folder = skeleton.checkpoint.origin.local
    with loading_errors("model", folder):
        model, info = skeleton.factory.from_pretrained(
            folder,
            config=skeleton.config,
            dtype=dtype,
            device_map=device_map,
            offload_folder=offload,
            use_safetensors=True,
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise SourceError(f"the checkpoint lacks {len(missing)} weights of its model: {quote(missing[0])}")
    loaded: nn.Module = model.eval()
    return loaded

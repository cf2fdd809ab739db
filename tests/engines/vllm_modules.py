"""Build vLLM's own class for a config, empty, and say of each of its layers by which scheme vLLM builds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def built_layers(folder: Path) -> dict[str, str]:
    """Return the format of every layer that vLLM builds for a folder's config.json, by name: `none` for an unquantized one."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.utils.torch_utils import set_default_torch_dtype

    arguments = EngineArgs(
        str(folder), dtype="bfloat16", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True, max_num_seqs=2
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config), torch.no_grad(), set_default_torch_dtype(torch.bfloat16):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        destroy_model_parallel()  # groups are those of the model before: one for experts is made only where there are some
        ensure_model_parallel_initialized(1, 1)
        loader = DefaultModelLoader(config.load_config)
        model = loader.create_model(vllm_config=config, model_config=config.model_config)
    return {name: form for name, module in model.named_modules() if (form := _format(module))}


def _format(module: torch.nn.Module) -> str:
    """Return a layer's format; "" for what is no layer with weights."""
    method: Any = getattr(module, "quant_method", None)
    if method is None:
        return "none" if isinstance(module, torch.nn.Linear) else ""
    name = type(getattr(module, "scheme", None) or method).__name__.lower()
    if "unquantized" in name:
        return "none"
    return next((known for part, known in (("fp4", "nvfp4"), ("fp8", "fp8")) if part in name), "")

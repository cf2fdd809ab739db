"""Build vLLM's own classes for a checkpoint, load it by vLLM's own loader, and see what each parameter holds.

Parameters are filled with a mark before, so that what was not loaded shows. Nothing runs: NVFP4 kernels, which processors lack,
are not needed.
"""

from __future__ import annotations

import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tests.clients.dequantize import E2M1

MARK = 0xA5
_COMPRESSED = "vllm.model_executor.layers.quantization.compressed_tensors"
_MOE = "vllm.model_executor.layers.fused_moe"
DRAFTER = {"method": "mtp", "num_speculative_tokens": 1}
# Of the key-value cache, which any quantization config has, and of inputs, which experts have even where none are quantized.
_UNUSED = re.compile(r".*attn(_per_step\.\d+)?\.[kqv]_(scale|zero_point)$|.*\.w(13|2)_input_global_scale$")


_ROOM = tempfile.TemporaryDirectory()  # for the store of this one process, which groups of every model ask


def prepare_vllm(monkeypatch: Any) -> None:
    """Take the place of the kernels that this processor lacks: none of them is asked to compute."""
    from vllm.platforms import current_platform

    class Kernel:
        def input_quant_key(self) -> None:
            """Inputs are not quantized."""

    linear = f"{_COMPRESSED}.schemes.compressed_tensors_w4a4_nvfp4"
    experts = f"{_COMPRESSED}.compressed_tensors_moe.compressed_tensors_moe_w4a4_nvfp4"
    monkeypatch.setattr(f"{linear}.init_nvfp4_linear_kernel", lambda *_, **__: Kernel())
    monkeypatch.setattr(f"{experts}.select_nvfp4_moe_backend", lambda *_, **__: (None, None))
    monkeypatch.setattr(f"{experts}.is_global_sf_supported_for_nvfp4_backend", lambda *_: False)
    monkeypatch.setattr(f"{_MOE}.config.FusedMoEConfig.__post_init__", take_any_activation())
    monkeypatch.setattr("vllm.triton_utils.allocation.triton.set_allocator", lambda *_: None, raising=False)
    select = f"{_MOE}.unquantized_fused_moe_method.select_unquantized_moe_backend"
    monkeypatch.setattr(select, lenient_selection())
    choose = current_platform.get_attn_backend_cls

    def dense(selected_backend: Any, attn_selector_config: Any, **options: Any) -> str:
        return choose(selected_backend, attn_selector_config=attn_selector_config._replace(use_sparse=False), **options)

    monkeypatch.setattr(type(current_platform), "get_attn_backend_cls", staticmethod(dense))


def take_any_activation() -> Any:
    """Return how experts are configured, without the error that processors have none without a gate (Nemotron-H)."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    configure = FusedMoEConfig.__post_init__

    def post_init(config: Any) -> None:
        with suppress(NotImplementedError):
            configure(config)

    return post_init


def lenient_selection() -> Any:
    """Return how kernels of experts in bfloat16 are selected, or none where a processor has none."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    select = method.select_unquantized_moe_backend

    def selected(*arguments: Any, **options: Any) -> Any:
        try:
            return select(*arguments, **options)
        except NotImplementedError:
            return UnquantizedMoeBackend.CPU, None

    return selected


def load(folder: Path, *, drafter: bool = False, runner: str = "auto") -> dict[str, torch.Tensor]:
    """Return the parameters of the model, or of the drafter that speculates for it, as the loader left them."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import destroy_model_parallel, ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.utils.torch_utils import set_default_torch_dtype

    arguments = EngineArgs(
        str(folder), dtype="bfloat16", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True, max_num_seqs=2,
        speculative_config=DRAFTER if drafter else None, runner=runner,
    )  # fmt: skip
    config = arguments.create_engine_config()
    with set_current_vllm_config(config), torch.no_grad():
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{_ROOM.name}/store", 0, "gloo")
        destroy_model_parallel()  # groups are those of the model before: one for experts is made only where there are some
        ensure_model_parallel_initialized(1, 1)
        described = config.speculative_config.draft_model_config if drafter else config.model_config
        loader = DefaultModelLoader(config.load_config)
        with set_default_torch_dtype(described.dtype):
            model = loader.create_model(vllm_config=config, model_config=described)
            found = {name: parameter for name, parameter in model.named_parameters() if not _UNUSED.match(name)}
            for parameter in found.values():
                parameter.data.untyped_storage().fill_(MARK)
            loader.load_weights(model, described)
    return {name: parameter.data for name, parameter in found.items()}


def unfilled(parameters: dict[str, torch.Tensor]) -> list[str]:
    """Return the parameters that hold the mark in whole elements still: the loader did not reach them."""
    return [name for name, values in parameters.items() if values.numel() and _is_marked(values)]


def _is_marked(values: torch.Tensor) -> bool:
    raw = values.contiguous().reshape(-1, 1).view(torch.uint8)
    if values.element_size() == 1:  # such a byte may be a value: all must be
        return bool((raw == MARK).all())
    return bool((raw == MARK).all(dim=1).any())


def weights(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return every parameter under the name that it has without quantization, NVFP4 as the bfloat16 that it stands for."""
    result = {}
    for name, values in parameters.items():
        match = re.fullmatch(r"(.*weight)_packed", name)
        if match:
            scale, divisor = (parameters[f"{match[1]}_{part}"] for part in ("scale", "global_scale"))
            members = divisor.reshape(
                len(values) if values.dim() == 3 else 1, -1
            )  # of each expert, or of the one matrix
            assert torch.equal(members, members[:, :1].expand_as(members)), f"{name}: members with scales of their own"
            result[match[1]] = _dequantized(
                values, scale, members[:, :1, None] if values.dim() == 3 else members[:, :1]
            )
        elif not re.search(r"weight_(scale|global_scale)$", name):
            result[name] = values
    return result


def _dequantized(packed: torch.Tensor, scale: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
    return (torch.from_numpy(E2M1)[nibbles] * (scale.float() / divisor).repeat_interleave(16, -1)).to(torch.bfloat16)

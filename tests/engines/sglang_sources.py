"""SGLang's own look-up of ModelOpt configs, taken out of its installed sources: the package itself wants a GPU."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Optional, Union

WANTED = {
    "layers/quantization/modelopt_quant.py": {
        "_compile_exclusion_pattern": None,
        "ModelOptQuantConfig": {"apply_weight_name_mapper", "is_layer_excluded"},
        "ModelOptMixedPrecisionConfig": {
            "apply_weight_name_mapper", "_resolve_quant_algo", "_quantized_layer_prefix_candidates",
        },
    },
    "layers/quantization/utils.py": {"_module_path_match": None, "_FALLBACK_FUSED_SHARDS": None, "is_layer_skipped": None},
}  # fmt: skip


def sources() -> Path | None:
    """Return the folder of SGLang's sources, None where it is not installed."""
    found = importlib.util.find_spec("sglang")
    return Path(next(iter(found.submodule_search_locations or ()))) / "srt" if found is not None else None


def functions(root: Path) -> dict[str, Any]:
    """Return SGLang's functions and classes for ModelOpt by name, without the methods that need torch."""
    known: dict[str, Any] = {
        "re": re, "lru_cache": lru_cache, "Mapping": Mapping, "MappingProxyType": MappingProxyType, "Dict": dict,
        "List": list, "Optional": Optional, "Tuple": tuple, "Union": Union, "QuantizationConfig": object, "WeightsMapper": Any,
    }  # fmt: skip
    for name in reversed(WANTED):
        tree = ast.parse((root / name).read_text(encoding="utf-8"))
        for node in tree.body:
            wanted = WANTED[name]
            if isinstance(node, ast.ClassDef) and node.name in wanted:
                methods = wanted[node.name] or set()
                node.body = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name in methods]
            elif _name(node) not in wanted:
                continue
            exec(compile(ast.Module([node], []), name, "exec"), known)
    return known


def _name(node: ast.stmt) -> str:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id
    return node.name if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ""

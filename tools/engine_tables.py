"""Write mfptq/engines/data/<engine>.json from an engine's sources, which are parsed.

    vllm-env/bin/python tools/engine_tables.py vllm .../site-packages/vllm --version 0.32.0 --imported
    python tools/engine_tables.py sglang .../site-packages/sglang --version 0.5.23

`--imported` takes names and fused layers from vLLM's classes themselves, where this machine can import them.

For every architecture that the engine registers the table says how the engine renames tensors, which layers it fuses,
and, by the last two parts of their names, which layers it builds with the quantization config and which without.
What the parser cannot evaluate is left out, never guessed; tests compare the table with the engine itself.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent.parent / "mfptq" / "engines" / "data"
LINEARS = {
    "ColumnParallelLinear", "RowParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear", "ReplicatedLinear",
    "GateLinear", "MinimaxM3QKVParallelLinearWithIndexer", "MergedColumnParallelRepeatedLinear", "LinearBase",
}  # fmt: skip
PLAIN = {"Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "Conv2dLayer", "Conv3dLayer"}
TABLES = {"VocabParallelEmbedding"}
HEADS = {"ParallelLMHead"}
EXPERTS = {"FusedMoE", "FusedMoEFactory", "RoutedExperts", "SharedFusedMoE", "EPMoE", "DeepEPMoE", "get_moe_impl_class"}
MAPPER_PARTS = ("prefix", "substr", "suffix", "regex", "stacked")


class CannotEvaluateError(Exception):
    """The expression is not one that this tool knows."""


@dataclass
class Module:
    """One source file: its classes, functions and constants by name, and where imported names come from."""

    name: str
    is_package: bool
    defined: dict[str, ast.AST] = field(default_factory=dict)
    imported: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """A class, function or constant with the module that defines it."""

    module: Module
    node: ast.AST


class Sources:
    """All source files below a package's folder, by dotted name."""

    def __init__(self, root: Path) -> None:
        self.modules: dict[str, Module] = {}
        for path in sorted(root.rglob("*.py")):
            parts = [root.name, *path.relative_to(root).with_suffix("").parts]
            package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if package else parts)
            if any(part in ("tests", "benchmarks", "entrypoints") for part in parts):
                continue
            self.modules[name] = self._parse(name, path, is_package=package)

    def _parse(self, name: str, path: Path, *, is_package: bool) -> Module:
        module = Module(name, is_package)
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except SyntaxError:
            return module
        for node in self._statements(tree.body):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                module.defined[node.name] = node
            elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                module.defined[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                module.defined[node.target.id] = node.value
            elif isinstance(node, ast.ImportFrom):
                origin = self._origin(module, node)
                for alias in node.names:
                    module.imported.setdefault(alias.asname or alias.name, []).append((origin, alias.name))
        return module

    def _statements(self, body: list[ast.stmt]) -> Iterator[ast.stmt]:
        """Yield a module's statements, those under `if` and `try` too, in order: platforms differ in imports only."""
        for node in body:
            yield node
            if isinstance(node, ast.If):
                yield from self._statements([*node.body, *node.orelse])
            elif isinstance(node, ast.Try):
                yield from self._statements(node.body)

    @staticmethod
    def _origin(module: Module, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.name.split(".")
        base = parts[: len(parts) - node.level + module.is_package]
        return ".".join([*base, *([node.module] if node.module else [])])

    def resolve(self, module: Module, name: str, depth: int = 0) -> Found | None:
        """Return what a name in a module stands for; the first import that leads to a definition is taken."""
        if name in module.defined:
            return Found(module, module.defined[name])
        for origin, original in module.imported.get(name, []) if depth < 8 else []:
            other = self.modules.get(origin)
            found = self.resolve(other, original, depth + 1) if other else None
            if found is not None:
                return found
        return None

    def classes(self, module: Module, node: ast.ClassDef) -> Iterator[Found]:
        """Yield a class and its bases, nearest first, as attribute look-up finds them for ordinary hierarchies."""
        seen: set[int] = set()
        queue = [Found(module, node)]
        while queue:
            found = queue.pop(0)
            if id(found.node) in seen or not isinstance(found.node, ast.ClassDef):
                continue
            seen.add(id(found.node))
            yield found
            names = [base.id for base in found.node.bases if isinstance(base, ast.Name)]
            queue = [each for name in names if (each := self.resolve(found.module, name))] + queue


class Evaluator:
    """Evaluates the expressions in which models state their mappings: dicts, unions, and references to other classes."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources

    def attribute(self, found: Found, name: str) -> Any:
        """Return a class attribute's value, or None if no class of the hierarchy sets it."""
        assert isinstance(found.node, ast.ClassDef)
        for each in self.sources.classes(found.module, found.node):
            for node in each.node.body:  # type: ignore[attr-defined]
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    target, value = node.targets[0].id, node.value
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                    target, value = node.target.id, node.value
                elif isinstance(node, ast.FunctionDef) and node.name == name:
                    raise CannotEvaluateError(name)
                else:
                    continue
                if target == name:
                    return self.value(each.module, value)
        return None

    def value(self, module: Module, node: ast.AST) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self.value(module, each) for each in node.elts]
        if isinstance(node, ast.Dict):
            result: dict[Any, Any] = {}
            for key, each in zip(node.keys, node.values, strict=True):
                found = self.value(module, each)
                if key is None:
                    result.update(found)
                else:
                    result[self.value(module, key)] = found
            return result
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return self._union(self.value(module, node.left), self.value(module, node.right))
        if isinstance(node, ast.Name):
            return self._name(module, node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = self.sources.resolve(module, node.value.id)
            if owner is not None and isinstance(owner.node, ast.ClassDef):
                return self.attribute(owner, node.attr)
        if isinstance(node, ast.Call):
            return self._call(module, node)
        raise CannotEvaluateError(ast.unparse(node)[:80])

    def _name(self, module: Module, name: str) -> Any:
        found = self.sources.resolve(module, name)
        if found is None or isinstance(found.node, (ast.ClassDef, ast.FunctionDef)):
            raise CannotEvaluateError(name)
        return self.value(found.module, found.node)

    def _call(self, module: Module, node: ast.Call) -> Any:
        name = ast.unparse(node.func)
        if name.endswith("WeightsMapper") and not node.args:
            return {
                str(keyword.arg).removeprefix("orig_to_new_"): self.value(module, keyword.value)
                for keyword in node.keywords
            }
        if name.endswith("re.compile") and len(node.args) == 1:
            return self.value(module, node.args[0])
        if name == "replace":
            changes = {str(k.arg).removeprefix("orig_to_new_"): self.value(module, k.value) for k in node.keywords}
            return {**self.value(module, node.args[0]), **changes}
        raise CannotEvaluateError(name)

    @staticmethod
    def _union(one: Any, other: Any) -> Any:
        if set(one) | set(other) <= set(MAPPER_PARTS):
            return {part: {**one.get(part, {}), **other.get(part, {})} for part in {**one, **other}}
        return {**one, **other}


@dataclass
class Layers:
    """How layers are built, by the last two parts of their names."""

    quantized: set[str] = field(default_factory=set)
    plain: set[str] = field(default_factory=set)
    heads: set[str] = field(default_factory=set)
    tables: set[str] = field(default_factory=set)
    experts: set[str] = field(default_factory=set)
    expert_names: set[tuple[str, ...]] = field(default_factory=set)
    conditional: dict[str, list[str]] = field(default_factory=dict)
    stacked: dict[str, set[str]] = field(default_factory=dict)


class Walker:
    """Follows the classes that an architecture builds, attribute by attribute."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources

    def layers(self, top: Found) -> Layers:
        result, seen = Layers(), set[tuple[str, int]]()
        queue = [("", top)]
        while queue:
            parent, found = queue.pop()
            if (parent, id(found.node)) in seen:
                continue
            seen.add((parent, id(found.node)))
            assert isinstance(found.node, ast.ClassDef)
            hierarchy = list(self.sources.classes(found.module, found.node))
            for each in hierarchy:
                queue += self._members(parent, each, result, _own_names(hierarchy))
        return result

    def _members(
        self, parent: str, owner: Found, result: Layers, own: dict[str, list[ast.AST]]
    ) -> list[tuple[str, Found]]:
        """Record the layers that a class's methods assign to attributes; return the modules that they build."""
        children: list[tuple[str, Found]] = []
        for function in owner.node.body:  # type: ignore[attr-defined]
            _record_stacked(function, result)
            if not isinstance(function, ast.FunctionDef):
                continue
            scope = {**own, **_local_values(function)}
            for node in ast.walk(function):
                if isinstance(node, ast.Assign):
                    _record_conditional(node, result)
                    for attribute in _attributes(node.targets):
                        children += self._built(parent, attribute, _Expression(owner.module, node.value, scope), result)
        return children

    def _built(self, parent: str, attribute: str, made: _Expression, result: Layers) -> list[tuple[str, Found]]:
        children: list[tuple[str, Found]] = []
        tail = f"{parent}.{attribute}" if parent else attribute
        for name, call in made.calls():
            kind = name.rpartition(".")[2]
            if call is None and kind in LINEARS | HEADS | PLAIN | TABLES | EXPERTS:
                continue  # a class that is handed on, with arguments that are not seen here
            quantized = call is None or _is_quantized(call)
            if kind in HEADS and quantized:
                result.heads.add(tail)
            elif kind in LINEARS | HEADS:
                (result.quantized if quantized else result.plain).add(tail)
            elif kind in PLAIN and (name.startswith(("nn.", "torch.nn.")) or kind.startswith("Conv")):
                result.plain.add(tail)
            elif kind in TABLES:
                result.tables.add(tail)
            elif kind in EXPERTS:
                if quantized:
                    result.experts.add(tail)
                result.expert_names |= {tuple(names) for names in _expert_names(call)}
            else:
                found = self.sources.resolve(made.module, kind)
                named = _class_names(found.node) if found and isinstance(found.node, ast.Dict) else []
                candidates = (found, *(self.sources.resolve(found.module, name) for name in named if found))
                children += [(attribute, each) for each in candidates if each and isinstance(each.node, ast.ClassDef)]
        return children


@dataclass
class _Expression:
    module: Module
    node: ast.AST
    scope: dict[str, list[ast.AST]]

    def calls(self) -> Iterator[tuple[str, ast.Call | None]]:
        """Yield the names that are called, also through local variables, functions and lambdas, with their calls."""
        queue, seen = [self.node], set[int]()
        while queue:
            node = queue.pop()
            if id(node) in seen or (isinstance(node, ast.Call) and ast.unparse(node.func).startswith("is_")):
                continue
            seen.add(id(node))
            called = {id(each.func) for each in ast.walk(node) if isinstance(each, ast.Call)}
            for each in ast.walk(node):
                if isinstance(each, ast.Call):
                    name = ast.unparse(each.func)
                    if name.startswith("is_"):
                        continue  # asks about classes, and builds none
                    yield name, each
                    if isinstance(each.func, ast.Name) or name.startswith("self."):
                        for value in self.scope.get(name, []):
                            yield from ((name, each) for name in _class_names(value))
                            queue.append(value)
                elif isinstance(each, ast.Name) and id(each) not in called:
                    queue += self.scope.get(each.id, [])
                    yield each.id, None


def _own_names(hierarchy: list[Found]) -> dict[str, list[ast.AST]]:
    """Return what `self.name` stands for where a class, or the nearest base, defines the name."""
    names: dict[str, list[ast.AST]] = {}
    for owner in hierarchy:
        for node in owner.node.body:  # type: ignore[attr-defined]
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                names.setdefault(f"self.{node.name}", [node])
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                names.setdefault(f"self.{node.targets[0].id}", [node.value])
    return names


def _record_conditional(node: ast.Assign, result: Layers) -> None:
    """Record `self.packed_modules_mapping["fused"] = [...]`: a layer that some configs fuse."""
    for target in node.targets:
        if isinstance(target, ast.Subscript) and ast.unparse(target.value) == "self.packed_modules_mapping":
            key, value = target.slice, node.value
            if isinstance(key, ast.Constant) and isinstance(value, ast.List):
                result.conditional[str(key.value)] = [e.value for e in value.elts if isinstance(e, ast.Constant)]


def _record_stacked(node: ast.stmt, result: Layers) -> None:
    """Record which tensors a loader puts into one parameter: `("qkv_proj", "q_proj", "q")`, or a mapper's entries."""
    pairs: list[tuple[ast.AST, ast.AST]] = []
    if isinstance(node, ast.FunctionDef) and "stacked_params_mapping" in {
        each.id for each in ast.walk(node) if isinstance(each, ast.Name)
    }:
        pairs += [(e.elts[0], e.elts[1]) for e in ast.walk(node) if isinstance(e, ast.Tuple) and len(e.elts) == 3]
    for call in ast.walk(node) if not isinstance(node, ast.FunctionDef) else ():
        for keyword in call.keywords if isinstance(call, ast.Call) else ():
            if keyword.arg == "orig_to_new_stacked" and isinstance(keyword.value, ast.Dict):
                entries = zip(keyword.value.values, keyword.value.keys, strict=True)
                pairs += [(new.elts[0], old) for new, old in entries if isinstance(new, ast.Tuple) and old is not None]
    for fused, member in pairs:
        if isinstance(fused, ast.Constant) and isinstance(member, ast.Constant):
            new, old = (str(each.value).removesuffix(".weight").strip(".") for each in (fused, member))
            if new.rpartition(".")[0] == old.rpartition(".")[0] and "expert" not in new:
                result.stacked.setdefault(new.rpartition(".")[2], set()).add(old.rpartition(".")[2])


def _expert_names(call: ast.Call | None) -> Iterator[list[str]]:
    for keyword in call.keywords if call is not None else []:
        if keyword.arg == "ckpt_names" and isinstance(keyword.value, (ast.Tuple, ast.List)):
            yield [each.value for each in keyword.value.elts if isinstance(each, ast.Constant)]


def _class_names(node: ast.AST) -> list[str]:
    return [ast.unparse(each) for each in ast.walk(node) if isinstance(each, (ast.Name, ast.Attribute))]


def _local_values(function: ast.FunctionDef) -> dict[str, list[ast.AST]]:
    values: dict[str, list[ast.AST]] = {}
    arguments = [*function.args.args, *function.args.kwonlyargs]
    defaults = [*function.args.defaults, *function.args.kw_defaults]
    for argument, default in zip(reversed(arguments), reversed(defaults), strict=False):
        if default is not None:
            values[argument.arg] = [default]
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    values.setdefault(target.id, []).append(node.value)
        elif isinstance(node, ast.FunctionDef) and node is not function:
            values.setdefault(node.name, []).append(node)
    return values


def _attributes(targets: list[ast.expr]) -> Iterator[str]:
    for target in targets:
        for node in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr


def _is_quantized(call: ast.Call) -> bool:
    """Return whether a layer is given a quantization config; a variable is taken for one."""
    for keyword in call.keywords:
        if keyword.arg == "quant_config":
            return not (isinstance(keyword.value, ast.Constant) and keyword.value.value is None)
        if keyword.arg is None:
            return True  # **arguments may hold it
    return any(isinstance(each, ast.Name) and each.id == "quant_config" for each in call.args)


def vllm_architectures(sources: Sources) -> dict[str, Found]:
    """Return the classes of vLLM's registry by architecture."""
    registry = sources.modules["vllm.model_executor.models.registry"]
    found: dict[str, Found] = {}
    for name, node in registry.defined.items():
        if not (name.endswith("_MODELS") and isinstance(node, ast.Dict)):
            continue
        if name in ("_PREVIOUSLY_SUPPORTED_MODELS", "_OOT_SUPPORTED_MODELS", "_TRANSFORMERS_BACKEND_MODELS"):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            if not (isinstance(key, ast.Constant) and isinstance(value, ast.Tuple)):
                continue
            place, cls = (each.value for each in value.elts if isinstance(each, ast.Constant))
            module = sources.modules.get(place if "." in place else f"vllm.model_executor.models.{place}")
            made = sources.resolve(module, cls) if module else None
            if made is not None and isinstance(made.node, ast.ClassDef):
                found[str(key.value)] = made
    return found


def sglang_architectures(sources: Sources) -> dict[str, Found]:
    """Return the classes that SGLang's model files name as their entries, by their own names."""
    found: dict[str, Found] = {}
    for name, module in sources.modules.items():
        entry = module.defined.get("EntryClass") if name.startswith("sglang.srt.models.") else None
        for node in entry.elts if isinstance(entry, (ast.List, ast.Tuple)) else [entry]:
            made = sources.resolve(module, node.id) if isinstance(node, ast.Name) else None
            if made is not None and isinstance(made.node, ast.ClassDef):
                found[made.node.name] = made
    return found


def table(sources: Sources, found: Found, mapper: str) -> dict[str, Any]:
    """Return what is known of one architecture; a part that cannot be evaluated is absent."""
    evaluator, result = Evaluator(sources), dict[str, Any]()
    for key, attribute in (("fused", "packed_modules_mapping"), ("renames", mapper)):
        try:
            value = evaluator.attribute(found, attribute)
        except CannotEvaluateError:
            continue
        result[key] = value or {}
    if "renames" in result:
        for name in ("renaming", "stacked"):
            result["renames"].pop(name, None)
        # Regexes of the engine's own: only those that Python's re module reads are kept.
        for pattern in result["renames"].get("regex", {}):
            re.compile(pattern)
    layers = Walker(sources).layers(found)
    result["quantized"] = sorted(layers.quantized - layers.plain)
    result["plain"] = sorted(layers.plain - layers.quantized)
    result["either"] = sorted(layers.plain & layers.quantized)
    result["heads"] = sorted(layers.heads - layers.plain)
    result["tables"] = sorted(layers.tables)
    result["experts"] = sorted(layers.experts)
    result["expert_names"] = sorted(list(names) for names in layers.expert_names)
    result["conditional"] = layers.conditional
    result["stacked"] = {key: sorted(members) for key, members in sorted(layers.stacked.items()) if len(members) > 1}
    return {key: value for key, value in result.items() if value or key in ("fused", "renames")}


def imported(rows: dict[str, Any]) -> None:
    """Replace what was evaluated by what vLLM's classes say, for each class that can be imported here."""
    import torch
    from vllm import ModelRegistry

    operators = torch.library.Library("torchvision", "FRAGMENT")  # a torchvision for another torch lacks them
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name, row in rows.items():
        try:
            cls = ModelRegistry.models[name].load_model_cls()
        except Exception as error:  # whatever a class for other hardware raises here
            print(f"{name}: not imported: {error}")
            continue
        row["fused"] = {
            key: list(members) for key, members in (getattr(cls, "packed_modules_mapping", 0) or {}).items()
        }
        mapper = getattr(cls, "hf_to_vllm_mapper", None)
        parts = {part: getattr(mapper, f"orig_to_new_{part}", {}) for part in ("regex", "substr", "prefix", "suffix")}
        row["renames"] = {
            part: {getattr(key, "pattern", key): new for key, new in rules.items()}
            for part, rules in parts.items()
            if rules
        }


ENGINES = {"vllm": (vllm_architectures, "hf_to_vllm_mapper"), "sglang": (sglang_architectures, "hf_to_sglang_mapper")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("package", type=Path, help="the package's folder, installed or unpacked")
    parser.add_argument("--version", required=True)
    parser.add_argument("--imported", action="store_true", help="ask vLLM's own classes too")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    sources = Sources(options.package.resolve())
    architectures, mapper = ENGINES[options.engine]
    found = sorted(architectures(sources).items())
    rows = {name: table(sources, each, mapper) for name, each in found}
    if options.imported:
        imported(rows)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row, separators=(',', ':'))}" for name, row in rows.items())
    head = f'{{\n "engine": "{options.engine}",\n "version": "{options.version}",\n "architectures": {{\n'
    output = options.output or DATA / f"{options.engine}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(f"{head}{lines}\n }}\n}}\n")


if __name__ == "__main__":
    main()

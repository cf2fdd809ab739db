"""Judge tensors and config as an engine's model class and loader would: which layer gets which scheme, and what it finds.

Called by `checking.judge`, on a checkpoint or on a plan before a byte is written. It reads no weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import RuleError
from .configs import CannotLoadError, CompressedTensors, Resolver
from .findings import Fault, Severity, Text
from .layers import Layer, Layers, build_layers, text_config
from .modelopt import Declared, ModelOpt, SglangModelOpt
from .modules import Module, StoredModules, stored_modules
from .schemes import Scheme, Shape
from .tables import Architecture, Engine, architecture

QUANTIZATION_CONFIG = "quantization_config"
_NO_LINEARS = ("embed", "norm", "conv", "pos", "rotary", "token", "bias", "scale")
ALIKE = "treat all members of a fused layer alike in ignore and targets"
GARBAGE = "the engine computes with uninitialised memory"
DRAFT_REMEDY = "add 're:.*mtp.*', or the number of its layer, to ignore"
NOT_LOADED = "the model does not load: no module or parameter of that name"


@dataclass(frozen=True)
class Subject:
    """What an engine is given: config.json, tensors by name, file names, and the values of small tensors if known.

    Where many modules have equal tensors, those of one may stand for all: `alike` has all their names, by that one's.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Shape]
    files: tuple[str, ...] = ()
    scalars: Mapping[str, float] = field(default_factory=dict)
    alike: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @cached_property
    def stored(self) -> StoredModules:
        """The modules that the tensors form."""
        return stored_modules(self.tensors, self.alike)

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The quantization config that engines take: the outer one, else that of the text model."""
        for owner in (self.config, text_config(self.config)):
            found = owner.get(QUANTIZATION_CONFIG)
            if isinstance(found, dict):
                return found
        return None

    @property
    def architectures(self) -> tuple[str, ...]:
        """The model classes that config.json names."""
        names = self.config.get("architectures")
        return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


@dataclass(slots=True)
class View:
    """A subject as one engine sees it."""

    subject: Subject
    architecture: Architecture
    layers: Layers
    schemes: dict[str, Scheme | None] = field(default_factory=dict)


def view(subject: Subject, engine: Engine) -> View:
    """Return a subject's modules as the layers that an engine builds."""
    model = architecture(engine, subject.architectures)
    return View(subject, model, build_layers(subject.stored, model, subject.config))


def resolver(quantization: Mapping[str, Any], model: Architecture) -> Resolver | None:
    """Return the reader of a quantization config, None for a method that is not judged."""
    method = str(quantization.get("quant_method", "")).lower()
    if method == "compressed-tensors" or (not method and "config_groups" in quantization):
        return CompressedTensors(quantization, model)
    if method.startswith("modelopt") or "quant_algo" in quantization or "quantization" in quantization:
        if model.engine == "vllm":
            return ModelOpt(quantization, model)
        said = Declared(quantization)
        return None if said.is_mixed and not said.has_fp4 else SglangModelOpt(quantization, model)
    return None


def structure_faults(seen: View) -> Iterator[Fault]:
    """Yield what is wrong with the way an engine resolves layers to schemes, compared with the tensors."""
    quantization, model = seen.subject.quantization, seen.architecture
    if not model.known:
        yield Fault(
            "unknown-architecture", "warning", model.title, model.name or "config.json",
            "the engine has no model class of this name", "it was judged by rules that most classes share",
            "check by loading it",
        )  # fmt: skip
    reader = resolver(quantization, model) if quantization is not None else None
    if reader is None:
        return
    queries = [(layer.name, layer.kind) for layer in seen.layers.served.values()]
    queries += [(module.name, "unknown") for module in seen.layers.drafts]
    try:
        reader.prepare(queries)
    except RuleError as error:
        yield Fault("bad-pattern", "error", model.title, "config.json", f"an entry of ignore or targets: {error}",
                    "the model does not load", "correct the pattern")  # fmt: skip
        return
    for layer in seen.layers.served.values():
        yield from _layer_faults(layer, reader, seen)
    yield from _draft_faults(seen.layers.drafts, reader, model)


def _layer_faults(layer: Layer, reader: Resolver, seen: View) -> Iterator[Fault]:
    model = seen.architecture
    first = [module._replace(names=module.names[:1]) for module in layer.members[:1]]
    if layer.kind in ("plain", "table"):
        how = "as an embedding table" if layer.kind == "table" else "without quantization"
        told = Text(f"quantized, but the engine builds this layer {how}", NOT_LOADED, "keep it, and name it in ignore")
        yield from (_fault("built-plain", model, each, told) for each in layer.members if each.scheme is not None)
        return
    if layer.kind == "unknown" and not any(each.rows or each.scheme is not None for each in layer.members):
        return  # a norm or the like: engines ask for linear layers only
    try:
        built = reader.scheme(layer.name, layer.kind)
    except CannotLoadError as error:
        told = Text("the engine refuses the layer", _general(error, layer.name), ALIKE)
        yield from (_fault("refused", model, each, told) for each in first)
        return
    seen.schemes[layer.name] = built
    if built is not None and built.problem:
        told = Text(built.problem, "the model does not load", "change the config group")
        yield from (_fault("no-scheme", model, each, told) for each in first)
        return
    for module in layer.members:
        yield from _module_faults(module, layer, built, model)
    if layer.stacks and built is not None:
        told = Text(
            f"kept, but the engine builds these experts as {built}",
            "the model does not load, or loads with experts of uninitialised memory",
            f"add {_experts_pattern(layer.name)} to ignore",
        )
        yield from (Fault("kept-experts", "error", model.title, stack, *told) for stack in layer.stacks)


def _experts_pattern(name: str) -> str:
    return f"'re:.*\\.{name.rpartition('.')[2]}(\\..*)?$'"


def _general(error: CannotLoadError, layer: str) -> str:
    """Return an engine's message without the one layer's name, so that all layers share a finding."""
    return f"the model does not load: {str(error).replace(f' of {layer}', '').replace(f' for {layer}', '')}"


def _module_faults(module: Module, layer: Layer, built: Scheme | None, model: Architecture) -> Iterator[Fault]:
    stored = module.scheme
    if built is None and stored is not None:
        what = f"stored as {stored}, but the engine builds it unquantized"
        told = Text(what, NOT_LOADED, "take it out of ignore, and name it in targets")
        yield _fault("built-unquantized", model, module, told)
    elif built is not None and stored is None:
        yield from _kept_faults(module, layer, built, model)
    elif built is not None and stored is not None:
        if (built.format, built.layout) != (stored.format, stored.layout) and {built.format, stored.format} != {"fp8"}:
            what = f"stored as {stored}, but the engine builds it as {built}"
            told = Text(what, "the model does not load", "name it in the targets of its own group")
            yield _fault("other-scheme", model, module, told)
        else:
            yield from _part_faults(module, built, model)


def _kept_faults(module: Module, layer: Layer, built: Scheme, model: Architecture) -> Iterator[Fault]:
    if layer.kind != "unknown":
        told = Text(f"kept, but the engine builds it as {built}", NOT_LOADED, "add it to ignore")
        yield _fault("kept-not-ignored", model, module, told)
    elif _may_be_linear(module):
        what = f"kept and not ignored: the engine would build it as {built} if it is a linear layer"
        told = Text(what, "if it is one, the model does not load", "add it to ignore")
        yield _fault("kept-not-ignored", model, module, told, severe=False)


def _may_be_linear(module: Module) -> bool:
    return bool(module.rows) and not any(part in module.name.lower() for part in _NO_LINEARS)


def _part_faults(module: Module, built: Scheme, model: Architecture) -> Iterator[Fault]:
    """Yield the tensors of a module that its scheme does not have, lacks, or has in another form."""
    expected = built.expected(module.rows, module.columns)
    if not expected or not module.rows:
        return
    for suffix, forms in expected.items():
        found = module.parts.get(suffix)
        if found is None:
            told = Text(
                f"{suffix} is missing, which {built} needs", GARBAGE, f"store {suffix}, or declare another scheme"
            )
            yield _fault("missing-tensor", model, module, told)
        elif found not in forms:
            what = f"{suffix} is not of the dtype and shape that {built} has"
            told = Text(what, "the model does not load", f"store {suffix} as {forms[0].dtype} of the right shape")
            yield _fault("wrong-form", model, module, told)
    for suffix in sorted(module.parts.keys() - expected.keys()):
        what = f"{suffix} is stored, which {built} does not have"
        told = Text(what, NOT_LOADED, f"leave {suffix} out, or declare a scheme that has it")
        yield _fault("extra-tensor", model, module, told)


def _draft_faults(drafts: Iterable[Module], reader: Resolver, model: Architecture) -> Iterator[Fault]:
    quantized = Text(
        "a drafter's layer (MTP) is quantized to 4 bits",
        "the model loads, but speculative decoding with it fails or accepts few tokens",
        "keep the drafter unquantized, and name it in ignore",
    )
    for module in drafts:
        stored = module.scheme
        if stored is not None and stored.format != "fp8":
            yield _fault("quantized-draft", model, module, quantized, severe=False)
        elif stored is not None or _may_be_linear(module):
            try:
                built = reader.scheme(module.name, "unknown")
            except CannotLoadError:
                continue
            if stored is not None and (built is None or built.format != stored.format):
                what = f"a drafter's layer (MTP) is stored as {stored}, but would be built {built or 'unquantized'}"
                told = Text(
                    what, "the model loads, but its drafter does not", "name it in the targets of its own group"
                )
                yield _fault("other-draft", model, module, told, severe=False)
            elif stored is None and built is not None:
                what = f"a drafter's layer (MTP) is kept and not ignored: it would be built as {built}"
                told = Text(what, "the model loads, but its drafter does not", DRAFT_REMEDY)
                yield _fault("draft-not-ignored", model, module, told, severe=False)


def _fault(code: str, model: Architecture, module: Module, told: Text, *, severe: bool = True) -> Fault:
    """Return a fault; of a class that the engine does not know, nothing is certain."""
    severity: Severity = "error" if severe and model.known else "warning"
    return Fault(code, severity, model.title, module.name, *told, count=len(module.names))

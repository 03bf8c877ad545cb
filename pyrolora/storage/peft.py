"""LoRA adapters in PEFT's file format, written and read without PEFT.

A folder with ``adapter_config.json`` and ``adapter_model.safetensors``, whose tensors are named
``base_model.model.<layer>.lora_A.weight`` (r, in), ``.lora_B.weight`` (out, r), and
``base_model.model.<module>.<tensor>`` for the modules of ``modules_to_save``. The rules by which
names are matched are those of PEFT 0.21 (``peft/utils/other.py``, ``peft/tuners/tuners_utils.py``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mode
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import conversion_mapping
from transformers.pytorch_utils import Conv1D

from pyrolora.adapters import LayerSpec, features, linear_layers, refuse_foreign, unwrapped, walk
from pyrolora.adapters.config import AdapterConfig
from pyrolora.adapters.modules import model_type
from pyrolora.errors import CheckpointError, ConfigError, PyroLoraError
from pyrolora.files import read_json, replacing, shown, write_whole
from pyrolora.options import check_options, short
from pyrolora.storage.numbers import as_json
from pyrolora.storage.patterns import Patterns
from pyrolora.storage.tensor_file import TensorFile, tensor_file

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
WEIGHT = "weight"
# PEFT saves these of a sequence classifier, whether its configuration names them or not.
CLASSIFIER_HEADS = ("classifier", "score")

# The targets that PEFT 0.21 turns into fused experts, by the kinds to which transformers maps its
# types of models (`peft/utils/transformers_weight_conversion.py`).
FUSED_TARGETS: Mapping[str | None, Sequence[str]] = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
_CONVERTED: Mapping[Any, str] = {
    **getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}),
    "mixtral": "mixtral",
}

# Of these architectures PEFT takes no such target: their kernels read it without calling it.
KERNELS = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
READ_BY_KERNELS = ("out_proj", "conv1d")

REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
# Without bearing on the function that the stored tensors give.
NEUTRAL = {
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode"),
    *("task_type", "fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config"),
    *("layers_to_transform", "layers_pattern", "runtime_config"),
}
# Those that leave the base weights as they were.
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class LoraOptions:
    """Types of the options of `TAKEN`, as PEFT writes them."""

    peft_type: str
    r: int
    lora_alpha: float
    target_modules: str | Sequence[str] | None
    exclude_modules: str | Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None
    lora_dropout: float | None = None
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    use_rslora: bool | None = None


TAKEN = {field.name for field in fields(LoraOptions)}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as PEFT saved it, checked against a network.

    Attributes
    ----------
    config
        The configuration in our terms; targets and heads by their full names.
    specs
        The adapted layers in the network's order.
    matrices
        Layer -> (A (r, in), B (out, r)), float32, unscaled.
    heads
        Name of a module of ``modules_to_save`` -> its state dict.
    """

    config: AdapterConfig
    specs: list[LayerSpec]
    matrices: dict[str, tuple[Tensor, Tensor]]
    heads: dict[str, dict[str, Tensor]]


# Writing ----------------------------------------------------------------------------------------


def write_adapter(
    path: Path,
    specs: Mapping[str, LayerSpec],
    matrices: Mapping[str, tuple[Tensor, Tensor]],
    heads: Mapping[str, nn.Module],
    base: nn.Module,
) -> None:
    """Write an adapter that ``peft.PeftModel.from_pretrained(base, path)`` loads.

    PEFT scales by ``lora_alpha / r`` with the rank of the matrices, so that ``lora_alpha`` is
    ``spec.scaling`` times that rank; layers that differ from the most common pair get entries of
    ``rank_pattern`` and ``alpha_pattern``. Servers that read neither (vLLM, LoRAX) scale all layers
    alike: for them there is `as_uniform`.

    The folder has the older adapter whole, none (it has no configuration), or the new one whole.

    Parameters
    ----------
    path
        The folder: new, empty, or with an adapter that is replaced.
    specs
        The adapted layers; ``scaling`` is used, ``rank`` is not.
    matrices
        Layer -> (A (r, in), B (out, r)), unscaled; r may differ from ``spec.rank``.
    heads
        Modules that take the place of the network's own, by their name in it.
    base
        The network, with or without our wrappers.

    Raises
    ------
    ConfigError
        When the folder holds something else, a layer stands under several names of which PEFT
        knows one, PEFT refuses a layer or finds others beside it, or its rules cannot tell the
        heads from other modules of the network.
    """
    _check_folder(path)
    _check_names(specs, base)
    ranks = {name: matrices[name][0].shape[0] for name in specs}
    scalings = {name: spec.scaling for name, spec in specs.items()}
    config = as_json(_describe(ranks, scalings, list(heads), base)).encode()
    tensors: dict[str, Tensor] = {}
    for name in specs:
        A, B = matrices[name]
        tensors |= {f"{name}.lora_A.weight": A.float(), f"{name}.lora_B.weight": B.float()}
    for name, head in heads.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in head.state_dict().items()}
    content = save({f"{PREFIX}{key}": _own(t) for key, t in tensors.items()}, {"format": "pt"})
    path.mkdir(parents=True, exist_ok=True)
    with replacing(path / WEIGHTS_FILE) as scratch:
        scratch.write_bytes(content)
        (path / CONFIG_FILE).unlink(missing_ok=True)  # no adapter, rather than a mixture of two
    write_whole(path / CONFIG_FILE, config)


def as_uniform(
    specs: Mapping[str, LayerSpec], matrices: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, LayerSpec], dict[str, tuple[Tensor, Tensor]]]:
    """The same updates in matrices of one rank, the largest, and with the scaling 1: A gets rows
    and B columns of zeros, and s is in B."""
    rank = max(A.shape[0] for A, _ in matrices.values())
    padded = {}
    for name, (A, B) in matrices.items():
        missing = rank - A.shape[0]
        padded[name] = (pad(A, (0, 0, 0, missing)), pad(specs[name].scaling * B, (0, missing)))
    return {name: replace(spec, scaling=1.0) for name, spec in specs.items()}, padded


def _check_names(specs: Iterable[str], base: nn.Module) -> None:
    """PEFT lists a module once, under the first of its names."""
    first: dict[nn.Module, str] = {}
    for name, module in walk(base):
        known = first.setdefault(unwrapped(module), name)
        if name in specs and known != name:
            raise ConfigError(
                f"{known!r} and {name!r} are one layer, which PEFT knows under the first of its "
                f"names alone; fit with exclude_modules=[{name!r}], or use merge()"
            )


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy: the format takes no views, and no tensors that share memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _check_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ConfigError(f"an adapter is a folder, and {path} is a file; choose another path")
    if not path.is_dir() or (path / CONFIG_FILE).is_file():
        return
    names = sorted(item.name for item in path.iterdir())
    others = [n for n in names if not n.startswith(".") and n != WEIGHTS_FILE]
    if others:
        raise ConfigError(
            f"{path} is not empty and holds no adapter, but {_listing(others)}; choose a folder "
            "of the adapter's own"
        )


def _describe(
    ranks: Mapping[str, int], scalings: Mapping[str, float], heads: list[str], base: nn.Module
) -> dict[str, Any]:
    """The content of ``adapter_config.json``."""
    modules = {name: module for name, module in walk(base) if name}
    _check_heads(heads, list(ranks), list(modules))
    alphas = {name: _alpha(scalings[name], rank) for name, rank in ranks.items()}
    r, lora_alpha = mode((ranks[name], alphas[name]) for name in ranks)
    task, kind = _task(base, heads, list(modules)), type(base)
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    names: list[str] | str = list(ranks)
    if any(_selects(names, other, Patterns()) for other in modules.keys() - ranks.keys()):
        names = "|".join(re.escape(name) for name in names)  # PEFT matches it in full
    parameters = _beside_experts(names, list(ranks), base)
    if parameters:
        names = [name for name in names if name not in parameters]
    _check_kernels(list(ranks), base)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": mapping if task is None else None,
        "base_model_name_or_path": getattr(base, "name_or_path", None) or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": all(isinstance(unwrapped(modules[name]), Conv1D) for name in ranks),
        "target_modules": names,
        "target_parameters": [f"{name}.{WEIGHT}" for name in parameters] or None,
        "rank_pattern": {_exactly(n, parameters): v for n, v in ranks.items() if v != r},
        "alpha_pattern": {_exactly(n, parameters): v for n, v in alphas.items() if v != lora_alpha},
        "modules_to_save": heads or None,
    }


def _beside_experts(names: list[str] | str, layers: list[str], base: nn.Module) -> list[str]:
    """The layers that PEFT would take for the fused experts beside them, as it knows those by the
    ends of such names, too; it takes their weights by ``target_parameters``."""
    fused = FUSED_TARGETS.get(_CONVERTED.get(model_type(base)), ())
    if fused and isinstance(names, str):  # PEFT makes of it the ends of the names that it matches
        raise ConfigError(
            f"PEFT knows the layers of a {type(base).__name__} by the ends of their names alone, "
            f"and would adapt more than {_listing(layers)}; export the merged network "
            "(posterior.merge()), or fit layers whose names end alike together"
        )
    return [name for name in layers if name.rpartition(".")[2] in fused]


def _check_kernels(layers: list[str], base: nn.Module) -> None:
    taken = [name for name in layers if name.rpartition(".")[2] in READ_BY_KERNELS]
    if taken and model_type(base) in KERNELS:
        raise ConfigError(
            f"PEFT refuses {_listing(taken)} of a {type(base).__name__}, whose kernels read such "
            "weights without calling the layer; export the merged network (posterior.merge()), or "
            "fit without them in target_modules"
        )


def _alpha(scaling: float, rank: int) -> float:
    """The number that, divided by the rank, is the scaling; a whole one where there is one."""
    alpha = scaling * rank
    return round(alpha) if round(alpha) / rank == scaling else alpha


def _exactly(name: str, parameters: Collection[str]) -> str:
    """The key of a pattern that matches this layer and no other, or its weight."""
    return f"^{re.escape(name)}" + (rf"(\.{WEIGHT})?" if name in parameters else "")


def _task(base: nn.Module, heads: Sequence[str], modules: Iterable[str]) -> str | None:
    """PEFT's task type, where it has one whose wrapper changes nothing for this network."""
    kind = type(base).__name__
    if kind.endswith("ForSequenceClassification"):
        needed = {name for name in modules if name.endswith(CLASSIFIER_HEADS)}
        return "SEQ_CLS" if needed <= set(heads) else None
    return "CAUSAL_LM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else None


def _check_heads(heads: Sequence[str], layers: Iterable[str], modules: Iterable[str]) -> None:
    taken = [n for n in modules if n not in heads and _is_saved(heads, n)]
    taken += [n for n in layers if _is_within(heads, n, Patterns())]
    if taken:
        raise ConfigError(
            f"PEFT cannot tell the task heads {_listing(heads)} from {_listing(taken)}: it knows "
            "modules_to_save by the end of their names; export the merged network instead "
            "(posterior.merge()), or give the head a name of its own"
        )


# PEFT's rules -----------------------------------------------------------------------------------


def _selects(wanted: str | Iterable[str], name: str, patterns: Patterns) -> bool:
    """``target_modules``, ``exclude_modules``: a regular expression, or a list of suffixes."""
    if isinstance(wanted, str):
        return patterns.match(wanted, name)
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in wanted)


def _is_saved(wanted: Iterable[str], name: str) -> bool:
    """Which modules ``modules_to_save`` takes: here a suffix need not follow a dot."""
    return any(name.endswith(suffix) for suffix in wanted)


def _is_within(wanted: Iterable[str], name: str, patterns: Patterns) -> bool:
    """Which layers get no adapter, because ``modules_to_save`` names them or what they are in."""
    ends = [i for i, character in enumerate(name) if character == "."]
    return any(patterns.match(part, name, _starts(name), [*ends, len(name)]) for part in wanted)


def _value_of(name: str, values: Mapping[str, N], default: N, patterns: Patterns) -> N:
    """``rank_pattern``, ``alpha_pattern``: the first key that matches the end of the name."""
    starts = _starts(name)
    found = (value for key, value in values.items() if patterns.match(key, name, starts))
    return next(found, default)


def _starts(name: str) -> list[int]:
    """Where a part of a dotted name may begin."""
    return [0, *(i + 1 for i, character in enumerate(name) if character == ".")]


# Reading ----------------------------------------------------------------------------------------


def read_adapter(path: str | Path, network: nn.Module) -> Adapter:
    """Read a LoRA adapter that PEFT (or `write_adapter`) saved for ``network``.

    Plain LoRA and rsLoRA, with rank and alpha patterns and ``modules_to_save``. Which layers are
    adapted, and with what rank, is what the tensors say; configuration and network have to agree.

    Raises
    ------
    ConfigError
        For what is no plain LoRA of linear layers, and for a network that PEFT has wrapped.
    CheckpointError
        When the folder is no adapter or is damaged, or the adapter is one of another network.
    """
    refuse_foreign(network)
    folder = Path(path)
    try:
        options = _read_options(folder)
        file = _weights(folder)
        _checked(options, _named(file, file.declared), network)  # of shapes alone, before any value
        return _checked(options, _named(file, file.read()), network)
    except (RecursionError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, PyroLoraError):
            raise
        raise CheckpointError(
            f"{folder} was edited or is incomplete ({type(error).__name__}: {error}); restore it "
            "from a copy"
        ) from error


def _read_options(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} is no PEFT adapter: it has no {CONFIG_FILE}; pass the folder that "
            "peft_model.save_pretrained(...) wrote, or into which "
            "huggingface_hub.snapshot_download(...) put it"
        )
    options = read_json(file)
    missing = [key for key in REQUIRED if not isinstance(options, dict) or key not in options]
    if missing:
        raise CheckpointError(
            f"{file} has no {missing[0]!r}: it describes no LoRA adapter, or was edited; restore "
            "it from a copy"
        )
    _check_options(options)
    try:
        check_options(LoraOptions, {n: v for n, v in options.items() if n in TAKEN})
    except ConfigError as error:
        raise CheckpointError(
            f"{file} has a value that no adapter can have: {error}; restore it from a copy"
        ) from error
    return options


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse what makes the function another than W x + s B A x. An option that is not known here
    is refused unless it is off."""
    if options["peft_type"] != "LORA":
        raise ConfigError(
            f"the adapter has peft_type={shown(options['peft_type'])}; pyrolora takes 'LORA' alone"
        )
    start = options.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise ConfigError(
            f"the adapter has init_lora_weights={shown(start)}, which changed the base weights: it "
            "fits no other; save it as a plain LoRA with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    own = set() if _of_layers(options.get("target_parameters")) else {"target_parameters"}
    for name, value in options.items():
        if name not in (TAKEN | NEUTRAL) - own and value and value != "none":
            raise ConfigError(
                f"the adapter has {short(name)}={shown(value)}, and pyrolora takes plain LoRA "
                "alone; merge it into its base with PEFT's merge_and_unload() and adapt the "
                "result, or train it again without this option"
            )


def _of_layers(parameters: Any) -> bool:
    """Whether ``target_parameters`` names weights of layers alone, no fused experts."""
    return parameters is None or (
        isinstance(parameters, list)
        and all(isinstance(own, str) and own.endswith(f".{WEIGHT}") for own in parameters)
    )


def _weights(folder: Path) -> TensorFile:
    file = folder / WEIGHTS_FILE
    if not file.exists() and (folder / PICKLE_FILE).exists():
        raise CheckpointError(
            f"{folder} has {PICKLE_FILE}, a pickle, which may run code when it is read; convert "
            "it where you trust it: PeftModel.from_pretrained(model, folder).save_pretrained("
            f"new_folder, safe_serialization=True) writes {WEIGHTS_FILE}"
        )
    return tensor_file(file)


def _named(file: TensorFile, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names within the network."""
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            raise CheckpointError(
                f"{file.path} has the tensor {shown(name)}, and PEFT's begin with {PREFIX!r}; load "
                "it with the program that wrote it and save it with PEFT"
            )
        if ".lora_" in name and not tensor.is_floating_point():
            raise CheckpointError(
                f"{file.path} has the tensor {shown(name)} of {tensor.dtype}, and factors are real "
                "numbers; restore it from a copy"
            )
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _checked(
    options: Mapping[str, Any], tensors: Mapping[str, Tensor], network: nn.Module
) -> Adapter:
    """The adapter, with every tensor in its place."""
    patterns = Patterns()
    saved = options.get("modules_to_save") or []
    factors, rest = _split(tensors)
    heads = {
        name: _take_head(name, unwrapped(module), rest)
        for name, module in walk(network)
        if name and _is_saved(saved, name) and any(True for _ in module.parameters())
    }
    layers = _layers(factors, heads, network)
    _refuse_rest(rest, saved, network, patterns)
    _check_selection(options, list(layers), network, patterns)
    config = _config(options, list(layers), list(heads))
    specs = [_spec(n, layer, factors[n], config, patterns) for n, layer in layers.items()]
    matrices = {s.name: (factors[s.name]["A"].float(), factors[s.name]["B"].float()) for s in specs}
    return Adapter(config, specs, matrices, heads)


def _split(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Layer -> its factors by their letter; and the tensors that are no factors."""
    factors: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key)
        if match is not None:
            factors.setdefault(match[1], {})[match[2]] = tensor
        elif ".lora_" in key:
            raise ConfigError(
                f"the file has the tensor {key!r}, of a variant of LoRA or of an adapted "
                "embedding; pyrolora takes the lora_A and lora_B of linear layers"
            )
        else:
            rest[key] = tensor
    return factors, rest


def _take_head(name: str, module: nn.Module, rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a module of ``modules_to_save``, taken out of ``rest``."""
    if any(isinstance(part, nn.Embedding) for part in module.modules()):
        raise ConfigError(
            f"the adapter has modules_to_save={name!r}, which holds embeddings, and pyrolora "
            "adapts linear layers and owns task heads; train the adapter without it"
        )
    state = {}
    for key, own in module.state_dict().items():
        tensor = rest.pop(f"{name}.{key}", None)
        if tensor is None:
            raise CheckpointError(
                f"modules_to_save has {name!r}, and the file has no tensor {name}.{key!s}; it is "
                "incomplete, or the adapter of another network"
            )
        _check_shape(f"{name}.{key}", tensor, own.shape)
        if tensor.is_floating_point() is not own.is_floating_point():
            raise CheckpointError(f"the tensor {name}.{key} holds {tensor.dtype}, not {own.dtype}")
        state[key] = tensor
    return state


def _refuse_rest(
    rest: Iterable[str], saved: Iterable[str], network: nn.Module, patterns: Patterns
) -> None:
    for key in rest:
        if _is_within(saved, key, patterns):
            raise CheckpointError(
                f"the file has the tensor {key!r} of modules_to_save, and this "
                f"{type(network).__name__} has no such module; pass the network that the adapter "
                "was trained on"
            )
        raise ConfigError(
            f"the file has the tensor {key!r}, which belongs to no adapted layer and to none of "
            "modules_to_save; if these are embeddings that the training left as they were, save "
            "the adapter with save_pretrained(..., save_embedding_layers=False)"
        )


def _layers(
    factors: Mapping[str, Mapping[str, Tensor]], heads: Iterable[str], network: nn.Module
) -> dict[str, nn.Module]:
    """The adapted layers in the network's order."""
    modules, linear = dict(walk(network)), linear_layers(network)
    for name in factors:
        if name not in modules:
            raise CheckpointError(
                f"the adapter has the layer {name!r}, which this {type(network).__name__} has "
                "not; pass the network that it was trained on"
            )
        if name not in linear:
            kind = type(unwrapped(modules[name])).__name__
            raise ConfigError(
                f"the adapter has the layer {name!r}, a {kind}; pyrolora adapts nn.Linear and "
                "transformers' Conv1D"
            )
        for head in heads:
            if name == head or name.startswith(f"{head}."):
                raise ConfigError(
                    f"the adapter has modules_to_save={head!r}, and {name!r} in it is an adapted "
                    "layer; a module is one or the other: train the adapter without one of them"
                )
    if not factors:
        raise CheckpointError("the file has no lora_A and lora_B: it holds no LoRA adapter")
    return {name: layer for name, layer in linear.items() if name in factors}


def _check_selection(
    options: Mapping[str, Any], layers: list[str], network: nn.Module, patterns: Patterns
) -> None:
    """Compare the layers in the file with those that the configuration selects, where it says."""
    wanted, excluded = options["target_modules"], options.get("exclude_modules") or []
    if wanted in (None, "all-linear") or options.get("layers_to_transform") is not None:
        return
    saved, parameters = options.get("modules_to_save") or [], options.get("target_parameters") or []
    first_names = {id(unwrapped(m)): name for name, m in reversed(linear_layers(network).items())}
    selected = {
        name
        for name in first_names.values()
        if _selects(wanted, name, patterns)
        and not _selects(excluded, name, patterns)
        and not _is_within(saved, name, patterns)
    }
    selected |= {n for n in first_names.values() if _selects(parameters, f"{n}.{WEIGHT}", patterns)}
    missing, surplus = sorted(selected - set(layers)), sorted(set(layers) - selected)
    if missing:
        raise CheckpointError(
            f"target_modules selects {_listing(missing)} in this {type(network).__name__}, for "
            "which the file has no tensors; it is incomplete, or the adapter of another network"
        )
    if surplus:
        raise CheckpointError(
            f"the file has tensors for {_listing(surplus)}, which target_modules does not select; "
            f"restore {CONFIG_FILE} and {WEIGHTS_FILE} from one copy"
        )


def _config(options: Mapping[str, Any], layers: list[str], heads: list[str]) -> AdapterConfig:
    gaussian = options.get("init_lora_weights") == "gaussian"
    try:
        return AdapterConfig(
            r=options["r"],
            lora_alpha=options["lora_alpha"],
            target_modules=layers,
            lora_dropout=options.get("lora_dropout") or 0.0,
            modules_to_save=heads,
            init_lora_weights="gaussian" if gaussian else "kaiming",
            rank_pattern=options.get("rank_pattern") or {},
            alpha_pattern=options.get("alpha_pattern") or {},
            use_rslora=bool(options.get("use_rslora")),
        )
    except (ConfigError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{CONFIG_FILE} has a value that no adapter can have: {error}; restore it from a copy"
        ) from error


def _spec(
    name: str,
    layer: nn.Module,
    factors: Mapping[str, Tensor],
    config: AdapterConfig,
    patterns: Patterns,
) -> LayerSpec:
    for factor in "AB":
        if factor not in factors:
            raise CheckpointError(
                f"the file has no tensor {name}.lora_{factor}.weight; it is incomplete: restore "
                "it from a copy"
            )
    rank = _value_of(name, config.rank_pattern, config.r, patterns)
    alpha = _value_of(name, config.alpha_pattern, config.lora_alpha, patterns)
    in_features, out_features = features(layer)
    _check_shape(f"{name}.lora_A.weight", factors["A"], (rank, in_features))
    _check_shape(f"{name}.lora_B.weight", factors["B"], (out_features, rank))
    scaling = alpha / (rank**0.5 if config.use_rslora else rank)
    return LayerSpec(name, in_features, out_features, rank, scaling)


def _check_shape(name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise CheckpointError(
            f"the tensor {name!r} has shape {tuple(tensor.shape)}, and by the configuration and "
            f"this network it is {tuple(expected)}; pass the network that the adapter was "
            "trained on"
        )


def _listing(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more

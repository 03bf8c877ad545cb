"""The base network of a saved posterior: its description, by which it is recognised."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrolora.errors import CheckpointError
from pyrolora.progress import progress
from pyrolora.storage.configuration import differences, kept, quantisation
from pyrolora.storage.digest import FLOATS, digests, layer_of, matches, quantised_layers
from pyrolora.storage.schema import check_plain
from pyrolora.storage.tensors import tensors

ENTRIES = {"class": str, "name_or_path": str, "dtype": str, "config": dict, "weights": dict}
QUANTISATION = "quantization_config"  # of a quantised network alone
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
WEIGHT = {"shape": list, "dtype": str, "bits": dict}
DIGEST = re.compile("[0-9a-f]{16}")
LARGEST = 2**63
DTYPES = {**FLOATS, "float64": torch.float64, "": "auto"}
DEEPEST = 11
LONGEST = 10_000


def describe_base(
    network: nn.Module, heads: Iterable[str], *, weights: bool = True
) -> dict[str, Any]:
    """Describe a network so that it is recognised.

    The description has its class, where it came from, its configuration, digests of its tensors
    outside of the task heads, and how transformers quantised it, if it did. A copy whose tensors
    are these, or these rounded to another precision (or of which these are the rounding), is the
    same network; any other is not. Changes of code,
    such as a ``forward`` that was replaced, cannot be seen; a plain ``nn.Module``, which has no
    configuration, is known by its class's name and its tensors alone. The digests take one pass
    over the weights, three where they are in float32.

    Parameters
    ----------
    heads
        The modules that the posterior owns.
    weights
        False where the posterior owns them all.
    """
    known = network if isinstance(network, PreTrainedModel) else None
    how = quantisation(known.config) if known else {}
    return {
        "class": type(network).__name__,
        "name_or_path": known.config._name_or_path if known else "",
        "dtype": str(known.dtype).removeprefix("torch.") if known else "",
        "config": kept(known.config) if known else {},
        "weights": digests(network, heads) if weights else {},
        **({QUANTISATION: how} if how else {}),
    }


def check_description(base: object) -> None:
    """Raise `CheckpointError` unless every entry of a description has its type and is bounded."""
    if not isinstance(base, dict) or set(base) - {QUANTISATION} != set(ENTRIES):
        raise CheckpointError(
            f"the description of the network must have {sorted(ENTRIES)}, got "
            f"{sorted(map(str, base))[:9] if isinstance(base, dict) else base!r:.80}"
        )
    for name, kind in ENTRIES.items():
        _is_a(f"base.{name}", base[name], kind)
    _is_a(f"base.{QUANTISATION}", base.get(QUANTISATION, {}), dict)
    check_plain(f"base.{QUANTISATION}", base.get(QUANTISATION, {}), deepest=DEEPEST)
    if not base["class"].isidentifier() or base["dtype"] not in DTYPES:
        raise CheckpointError(
            f"base.class and base.dtype are no class and dtype: {base['class']!r:.80}, "
            f"{base['dtype']!r:.80}"
        )
    check_plain("base.config", base["config"], deepest=DEEPEST, longest=LONGEST)
    for name, entry in base["weights"].items():
        _is_a(f"base.weights.{name:.80}", entry, dict)
        for key, kind in WEIGHT.items():
            _is_a(f"base.weights.{name:.80}.{key}", entry.get(key), kind)
        sizes, bits = entry["shape"], entry["bits"]
        if (
            set(entry) != set(WEIGHT)
            or not all(type(size) is int and 0 <= size < LARGEST for size in sizes)
            or entry["dtype"] not in bits
            or not all(
                isinstance(value, str) and DIGEST.fullmatch(value) for value in bits.values()
            )
        ):
            raise CheckpointError(f"base.weights has no shape and digests of {name!r:.80}")


def check_base(network: nn.Module, heads: Iterable[str], description: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless ``network`` is the one that was described.

    Its tensors are, bit for bit, those that were saved, in the same or another precision
    (`digest.matches`), and its configuration differs in nothing that changes the function
    (`configuration.differences`). Where one of the two is quantised, or both are in other ways,
    the tensors that neither has quantised are compared, with a `UserWarning`: the numbers of the
    others differ by their rounding, and predictions with them.
    """
    origin = description["name_or_path"] or "built in memory"
    kind = type(network).__name__
    remedy = (
        f"the posterior was fitted on a {description['class']} ({origin}): load that model. If it "
        "was changed in memory before the fit (merged, trained, resized), save it with "
        "save_pretrained(folder) and pass the folder or the network as model="
    )
    if description["weights"]:
        _check_weights(network, heads, description["weights"], remedy)
    if kind != description["class"]:
        raise CheckpointError(f"this network is a {kind}; {remedy}")
    if not isinstance(network, PreTrainedModel):
        return
    for name, saved, here in differences(network.config, description["config"]):
        if name.rpartition(".")[2] in TOKENS and not _reads_tokens(network):
            continue
        raise CheckpointError(
            f"the configuration of this {kind} has {name}={here!r:.200}, and the posterior was "
            f"fitted with {saved!r:.200}, which makes another function; load it with that value, "
            f"or set it in network.config before it is built"
        )


def _reads_tokens(network: PreTrainedModel) -> bool:
    """Return whether the network's function depends on its tokens for padding and the end.

    Classifiers and encoder-decoders take a place in the text from them, and some networks count
    positions from the padding on. Other networks use them in generation alone.
    """
    positions = (
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
    )
    return (
        bool(getattr(network.config, "is_encoder_decoder", False))
        or network.get_output_embeddings() is None
        or any(module.padding_idx is not None for module in positions)
    )


def _check_weights(
    network: nn.Module, heads: Iterable[str], saved: Mapping[str, Any], remedy: str
) -> None:
    kind = type(network).__name__
    present: dict[str, dict[str, Any]] = {}
    problems: dict[str, str] = {}
    read = progress(tensors(network, heads), title="recognising the network")
    for name, tensor in read:  # one by one: offloaded ones are fetched
        present[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
        }
        if name in saved:
            problem = _difference(name, tensor, saved[name])
            problems |= {name: problem} if problem else {}
    if quantised_layers(saved) != quantised_layers(present):
        _check_the_rest(kind, saved, present, problems, remedy)
        return
    missing, foreign = sorted(set(saved) - set(present)), sorted(set(present) - set(saved))
    if missing or foreign:
        raise CheckpointError(
            f"this {kind} has other weights: missing {missing[:2]}, unexpected {foreign[:2]}; "
            f"{remedy}"
        )
    if problems:
        raise CheckpointError(f"{next(iter(problems.values()))}; {remedy}")


def _check_the_rest(
    kind: str,
    saved: Mapping[str, Any],
    present: Mapping[str, Any],
    problems: Mapping[str, str],
    remedy: str,
) -> None:
    """Compare what neither of two networks has quantised, and warn of the rest."""
    here, there = quantised_layers(present), quantised_layers(saved)
    layers = {*here, *there}
    of_this, of_saved = (", ".join(sorted({*how.values()})) or "none" for how in (here, there))
    apart = (
        f"the quantised layers of this {kind} ({of_this}) are not those of the network that the "
        f"posterior was fitted on ({of_saved})"
    )
    names = {name for name in (*saved, *present) if layer_of(name) not in layers}
    wrong = [problems[name] for name in sorted(names) if name in problems]
    strange = sorted(name for name in names if name not in saved or name not in present)
    if wrong or strange or not names:
        reason = wrong[0] if wrong else f"no other weight is the same: {strange[:2]}"
        raise CheckpointError(f"{apart}, and {reason}; {remedy}")
    warnings.warn(
        f"{apart}: {len(layers)} layers have other numbers, by their rounding, and so have "
        f"predictions; the {len(names)} other weights are the same",
        UserWarning,
        stacklevel=6,
    )


def _difference(name: str, tensor: Tensor, saved: Mapping[str, Any]) -> str | None:
    if saved["shape"] != list(tensor.shape):
        return f"the weight {name!r} has shape {list(tensor.shape)}, not {saved['shape']}"
    if not matches(tensor, saved):
        return f"the weight {name!r} is not the one that was adapted"
    return None


def _is_a(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind) or (isinstance(value, str) and len(value) > LONGEST):
        raise CheckpointError(f"{name} must be a {kind.__name__}, got {value!r:.80}")

"""PEFT's rules for architectures, and for names in its files, as PEFT 0.21 has them.

Those for names alone stand in `pyrolora.adapters.names`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import conversion_mapping

from pyrolora.adapters.modules import model_type
from pyrolora.peft.patterns import Patterns
from pyrolora.tasks.unsupported import classes_of

WEIGHT = "weight"
"""The end of an entry of ``target_parameters`` that names the weight of a layer."""

CLASSIFIER_HEADS = ("classifier", "score")
"""Heads that PEFT saves of a sequence classifier, whether its configuration names them or not."""

FUSED_TARGETS: Mapping[str | None, Sequence[str]] = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
"""Kind of model -> the targets that PEFT takes for fused experts.

transformers maps its types of models to these kinds
(``peft/utils/transformers_weight_conversion.py``).
"""
_CONVERTED: Mapping[Any, str] = {
    **getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}),
    "mixtral": "mixtral",
}


def fused_targets(base: nn.Module) -> Sequence[str]:
    """Return the ends of names that PEFT takes for fused experts in this architecture."""
    return FUSED_TARGETS.get(_CONVERTED.get(model_type(base)), ())


def task_type(base: nn.Module, heads: Sequence[str], modules: Iterable[str]) -> str | None:
    """Return PEFT's task type, where it has one whose wrapper changes nothing for this network."""
    name = type(base).__name__
    if name.endswith("ForSequenceClassification"):
        needed = {name for name in modules if name.endswith(CLASSIFIER_HEADS)}
        return "SEQ_CLS" if needed <= set(heads) else None
    writes_apart = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    if writes_apart and name in classes_of("SEQ_TO_SEQ_CAUSAL_LM"):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def is_within_saved(wanted: Iterable[str], name: str, patterns: Patterns) -> bool:
    """Return whether ``modules_to_save`` names a layer, or a module that it is in.

    Such a layer gets no adapter.
    """
    return any(patterns.part(entry, name) for entry in wanted)


def exact_key(name: str, parameters: Collection[str]) -> str:
    """Return the key of a pattern that matches this layer and no other.

    A layer among ``parameters`` is matched by the name of its weight, too.
    """
    return f"^{re.escape(name)}" + (rf"(\.{WEIGHT})?" if name in parameters else "")

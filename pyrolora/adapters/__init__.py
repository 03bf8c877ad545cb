"""Adapter layers inside a network, and the bank of their stacked factors."""

from pyrolora.adapters.adapted_linear import is_quantised
from pyrolora.adapters.allocation import moved, pruned
from pyrolora.adapters.bank import AdapterBank, Block, FlatFactors, Layout
from pyrolora.adapters.initializers import Start, frozen_weight, start_of
from pyrolora.adapters.inject import Attachment, attach, plain_copy, unwrap
from pyrolora.adapters.layer import AdapterLayer, Binding, Factors, HeadSlot, bind, current_binding
from pyrolora.adapters.lora_config import as_adapter_config
from pyrolora.adapters.targets import AUTO_TARGETS, LayerSpec, plain_parameters
from pyrolora.adapters.whole import check_eager, check_in_memory

__all__ = [
    "AUTO_TARGETS",
    "AdapterBank",
    "AdapterLayer",
    "Attachment",
    "Binding",
    "Block",
    "Factors",
    "FlatFactors",
    "HeadSlot",
    "LayerSpec",
    "Layout",
    "Start",
    "as_adapter_config",
    "attach",
    "bind",
    "check_eager",
    "check_in_memory",
    "current_binding",
    "frozen_weight",
    "is_quantised",
    "moved",
    "plain_copy",
    "plain_parameters",
    "pruned",
    "start_of",
    "unwrap",
]

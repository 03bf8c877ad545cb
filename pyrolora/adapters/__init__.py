"""Adapter layers inside a network, and the bank of their stacked factors."""

from pyrolora.adapters.allocation import moved, pruned
from pyrolora.adapters.bank import AdapterBank
from pyrolora.adapters.binding import (
    Binding,
    Factors,
    SharedPassError,
    bind,
    current_binding,
    with_noise_measured,
)
from pyrolora.adapters.compiled import (
    after_calls,
    bare,
    compiled_calls,
    compiled_in_place,
    eagerly,
    is_compiled,
)
from pyrolora.adapters.config import AdapterConfig, RankAllocation
from pyrolora.adapters.factors import AnyFactors, FlatFactors, LaterFactors
from pyrolora.adapters.initializers import Start, frozen_weight, start_of
from pyrolora.adapters.inject import Attachment, attach, explained_kernels, plain_copy, unwrap
from pyrolora.adapters.kernels import layers_called
from pyrolora.adapters.kinds import features, is_dense, is_quantised, is_quantised_layer
from pyrolora.adapters.layer import AdapterLayer, HeadSlot
from pyrolora.adapters.layout import Block, Layout
from pyrolora.adapters.left_out import refuse_foreign
from pyrolora.adapters.lora_config import as_adapter_config
from pyrolora.adapters.mixing import Portion, mixed_binding
from pyrolora.adapters.modules import linear_layers, plain_parameters, walk
from pyrolora.adapters.sharing import Sharing, kind_of, shares, sharing_of
from pyrolora.adapters.targets import LayerSpec, check_uncalled
from pyrolora.adapters.whole import check_in_memory
from pyrolora.adapters.wrapper import Wrapper, unwrapped

__all__ = [
    "AdapterBank",
    "AdapterConfig",
    "AdapterLayer",
    "AnyFactors",
    "Attachment",
    "Binding",
    "Block",
    "Factors",
    "FlatFactors",
    "HeadSlot",
    "LaterFactors",
    "LayerSpec",
    "Layout",
    "Portion",
    "RankAllocation",
    "SharedPassError",
    "Sharing",
    "Start",
    "Wrapper",
    "after_calls",
    "as_adapter_config",
    "attach",
    "bare",
    "bind",
    "check_in_memory",
    "check_uncalled",
    "compiled_calls",
    "compiled_in_place",
    "current_binding",
    "eagerly",
    "explained_kernels",
    "features",
    "frozen_weight",
    "is_compiled",
    "is_dense",
    "is_quantised",
    "is_quantised_layer",
    "kind_of",
    "layers_called",
    "linear_layers",
    "mixed_binding",
    "moved",
    "plain_copy",
    "plain_parameters",
    "pruned",
    "refuse_foreign",
    "shares",
    "sharing_of",
    "start_of",
    "unwrap",
    "unwrapped",
    "walk",
    "with_noise_measured",
]

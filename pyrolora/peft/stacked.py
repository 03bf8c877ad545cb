"""Adapters of stacks of matrices, such as fused experts, in PEFT's format.

PEFT's ``ParamWrapper`` keeps the E adapters of a parameter as one: A is (E r, in), an expert's rows
one after the other; B is (out, r E), the experts' columns in turn. The wrappers of several
parameters of one module are nested, the last parameter's outermost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pyrolora.adapters.modules import walk
from pyrolora.adapters.parameters import Stack
from pyrolora.adapters.wrapper import unwrapped

Pair = tuple[Tensor, Tensor]


def joined(stack: Stack, matrices: Mapping[str, Pair]) -> Pair:
    """Return PEFT's A (E r, in) and B (out, r E) of name -> (A (r, in), B (out, r)).

    Experts of smaller rank get rows and columns of zeros.
    """
    pairs = [matrices[name] for name in stack.names]
    rank = max(len(A) for A, _ in pairs)
    A = torch.cat([pad(A, (0, 0, 0, rank - len(A))) for A, _ in pairs])
    B = torch.stack([pad(B, (0, rank - B.shape[1])) for _, B in pairs], -1)
    return A, B.flatten(1)


def split(stack: Stack, A: Tensor, B: Tensor) -> dict[str, Pair]:
    """Return name -> (A (r, in), B (out, r)) of PEFT's A (E r, in) and B (out, r E)."""
    experts = len(stack.names)
    rows, columns = A.chunk(experts), B.unflatten(1, (-1, experts)).unbind(-1)
    return dict(zip(stack.names, zip(rows, columns, strict=True), strict=True))


def keys(stacks: Sequence[Stack], network: nn.Module) -> dict[str, str]:
    """Return the name of a parameter -> the name of its module in PEFT's file."""
    modules = dict(walk(network))
    names = {}
    for place in dict.fromkeys(stack.module for stack in stacks):
        order = [name for name, _ in unwrapped(modules[place]).named_parameters(recurse=False)]
        own = [stack for stack in stacks if stack.module == place]
        own.sort(key=lambda stack: order.index(stack.parameter), reverse=True)
        for depth, stack in enumerate(own):
            names[stack.name] = place + ".base_layer" * depth
    return names

"""Wrappers of adapted layers and of task heads: they own no factors, and use what is bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyrolora.adapters.binding import Binding, SharedPassError, binding_for_forward
from pyrolora.adapters.wrapper import Wrapper


class AdapterLayer(Wrapper):
    """A linear layer that computes ``W x + b``, plus ``s B A x`` while factors are bound to it."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())  # by name it is ``input`` in torch, ``x`` in ``Conv1D``
        binding = binding_for_forward()
        factors = None if binding is None else binding.factors.get(self)
        if binding is None or factors is None:
            out: Tensor = self.base_layer(x)
            return out
        binding.used.add(self)
        if x.shape[:-1].numel() % binding.rows:
            raise SharedPassError(
                f"a layer saw {x.shape[:-1].numel()} rows in a pass that {binding.rows} rows, of "
                "several draws, share; let each draw have a pass of its own"
            )
        return factors.apply(self.base_layer, x, self.training)


class HeadSlot(Wrapper):
    """A task head that gives way to the copies that are bound to it, if any are.

    Of K copies each serves one of K blocks of rows. Outputs of different widths, which are those of
    posteriors with other classes, are filled up with zeros.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        binding = binding_for_forward()
        heads = None if binding is None else binding.heads.get(self)
        if binding is None or heads is None:
            return self.base_layer(*args, **kwargs)
        dtype = next(heads[0].parameters()).dtype  # float32, whatever the network computes in
        args = tuple(_cast(arg, dtype) for arg in args)
        if len(heads) == 1:
            return heads[0](*args, **kwargs)
        args_of_blocks = [_blocks(arg, heads, binding, binding.rows) for arg in args]
        kwargs_of_blocks = [dict.fromkeys(kwargs) for _ in heads]
        for name, arg in kwargs.items():
            blocks = _blocks(arg, heads, binding, 1)
            for named, block in zip(kwargs_of_blocks, blocks, strict=True):
                named[name] = block
        outputs = [
            head(*block, **named)
            for head, named, *block in zip(heads, kwargs_of_blocks, *args_of_blocks, strict=True)
        ]
        if not all(isinstance(output, Tensor) for output in outputs):
            raise SharedPassError(f"a head gave a {type(outputs[0]).__name__}, which is no tensor")
        return torch.cat(_widened(outputs))


def _blocks(arg: Any, heads: Sequence[Any], binding: Binding, rows: int) -> Sequence[Any]:
    """Split ``arg``, which has a multiple of ``rows`` rows, into the block of each head."""
    if not isinstance(arg, Tensor) or not arg.dim():
        return [arg] * len(heads)
    examples = len(heads) if binding.blocks is None else sum(binding.blocks)
    if len(arg) % examples or len(arg) % rows:
        raise SharedPassError(f"a head saw {len(arg)} rows, which {len(heads)} draws cannot share")
    if binding.blocks is None:
        return arg.chunk(len(heads))
    each = len(arg) // examples
    return arg.split([each * size for size in binding.blocks])


def _widened(outputs: list[Tensor]) -> list[Tensor]:
    widest = max(output.shape[-1] for output in outputs)
    return [
        output if output.shape[-1] == widest else pad(output, (0, widest - output.shape[-1]))
        for output in outputs
    ]


def _cast(arg: Any, dtype: torch.dtype) -> Any:
    return arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg

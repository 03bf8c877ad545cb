"""Wrappers of adapted layers and of task heads: they own no factors, and use what is bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyrolora.adapters.binding import SharedPassError, binding_for_forward
from pyrolora.adapters.compiled import uncompiled
from pyrolora.adapters.wrapper import Wrapper


class AdapterLayer(Wrapper):
    """A linear layer that computes ``W x + b``, plus ``s B A x`` while factors are bound to it.

    Compiled code cannot read the binding of a thread: it reads the attribute ``shown``, and sets
    ``called`` in place of `Binding.used`.
    """

    called = False

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())  # by name it is ``input`` in torch, ``x`` in ``Conv1D``
        if torch.compiler.is_compiling():
            shown = self.shown
            if shown is None:
                return self._apart(x)
            factors = shown.bound or shown.several
            rows = len(shown.rows)
            if factors is not None:
                self.called = True
        else:
            binding = binding_for_forward()
            factors = None if binding is None else binding.factors.get(self)
            rows = 1 if binding is None else binding.rows
            if binding is not None and factors is not None:
                binding.used.add(self)
        if factors is None:
            out: Tensor = self.base_layer(x)
            return out
        if x.shape[:-1].numel() % rows:
            raise SharedPassError(
                f"a layer saw {x.shape[:-1].numel()} rows in a pass that {rows} rows, of "
                "several draws, share; let each draw have a pass of its own"
            )
        adapted: Tensor = factors.apply(self.base_layer, x, self.training)
        return adapted

    _apart = uncompiled(forward)


class HeadSlot(Wrapper):
    """A task head that gives way to the copies that are bound to it, if any are.

    Of K copies each serves one of K blocks of rows. Outputs of different widths, which are those of
    posteriors with other classes, are filled up with zeros.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        blocks: Sequence[int] | None = None
        if torch.compiler.is_compiling():
            shown = self.shown
            if shown is None:
                return self._apart(*args, **kwargs)
            heads, blocks = shown.bound or (None, None)
            rows = len(shown.rows)
        else:
            binding = binding_for_forward()
            heads = None if binding is None else binding.heads.get(self)
            blocks = None if binding is None else binding.blocks
            rows = 1 if binding is None else binding.rows
        if heads is None:
            return self.base_layer(*args, **kwargs)
        dtype = next(heads[0].parameters()).dtype  # float32, whatever the network computes in
        args = tuple(_cast(arg, dtype) for arg in args)
        if len(heads) == 1:
            return heads[0](*args, **kwargs)
        args_of_blocks = [_blocks(arg, heads, blocks, rows) for arg in args]
        kwargs_of_blocks = [dict.fromkeys(kwargs) for _ in heads]
        for name, arg in kwargs.items():
            parts = _blocks(arg, heads, blocks, 1)
            for named, block in zip(kwargs_of_blocks, parts, strict=True):
                named[name] = block
        outputs = [
            head(*block, **named)
            for head, named, *block in zip(heads, kwargs_of_blocks, *args_of_blocks, strict=True)
        ]
        if not all(isinstance(output, Tensor) for output in outputs):
            raise SharedPassError(f"a head gave a {type(outputs[0]).__name__}, which is no tensor")
        return torch.cat(_widened(outputs))

    _apart = uncompiled(forward)


def _blocks(
    arg: Any, heads: Sequence[Any], blocks: Sequence[int] | None, rows: int
) -> Sequence[Any]:
    """Split ``arg``, which has a multiple of ``rows`` rows, into the block of each head."""
    if not isinstance(arg, Tensor) or not arg.dim():
        return [arg] * len(heads)
    examples = len(heads) if blocks is None else sum(blocks)
    if len(arg) % examples or len(arg) % rows:
        raise SharedPassError(f"a head saw {len(arg)} rows, which {len(heads)} draws cannot share")
    if blocks is None:
        return arg.chunk(len(heads))
    each = len(arg) // examples
    return arg.split([each * size for size in blocks])


def _widened(outputs: list[Tensor]) -> list[Tensor]:
    widest = max(output.shape[-1] for output in outputs)
    return [
        output if output.shape[-1] == widest else pad(output, (0, widest - output.shape[-1]))
        for output in outputs
    ]


def _cast(arg: Any, dtype: torch.dtype) -> Any:
    return arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg

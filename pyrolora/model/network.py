"""A network with adapters, run under factors: alone, or several draws in one pass."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import modeling_utils

from pyrolora.adapters import (
    Attachment,
    Binding,
    FlatFactors,
    SharedPassError,
    Sharing,
    bind,
    compiled_calls,
    eagerly,
    is_compiled,
    is_quantised,
    is_quantised_layer,
    kind_of,
    layers_called,
    shares,
    sharing_of,
    with_noise_measured,
)
from pyrolora.columns import INPUTS, PLACES, Batch
from pyrolora.data.media.pieces import for_network
from pyrolora.errors import BindingError, listed
from pyrolora.guides import Program
from pyrolora.model.heads import HeadCopies
from pyrolora.model.modes import evaluating, running_statistics
from pyrolora.processes import is_sharded, take_part
from pyrolora.seeding import DRAWING
from pyrolora.tasks import Task

NOT_CALLED = (
    "the network does not call the adapted layer(s) {}: its code reads their weights directly, or "
    "does not use them for such inputs; leave them out with exclude_modules"
)

EACH = "slice_logits_to_keep"
"""The function of transformers that has places for each row."""


class AdaptedNetwork(nn.Module):
    """A network, the program that makes factors for it, and the task that reads its output.

    A plain module around the network: were the network a ``PyroModule``, every access to a frozen
    tensor would become a parameter statement.

    Parameters
    ----------
    base
        The network, with the layers of ``attachment`` wrapped.
    attachment
        The wrappers that receive the factors.
    program
        The latent part, with the bank.
    task
        The distribution of the targets.

    Attributes
    ----------
    heads
        The posterior's copies of the task heads.
    trained_statistics
        The normalisations whose running statistics training changes.
    """

    def __init__(
        self, base: nn.Module, attachment: Attachment, program: Program, task: Task
    ) -> None:
        super().__init__()
        self.base = base
        self.program = program
        self.task = task
        self.attachment = attachment
        heads = {name: wrapper.base_layer for name, wrapper in attachment.heads.items()}
        self.heads = HeadCopies(heads, program.members)
        of_base, of_heads = running_statistics(base), running_statistics(self.heads)
        self._quantised = [m for m in base.modules() if is_quantised_layer(m)]
        self._frozen_statistics = of_base if program.bank.specs else []
        self.trained_statistics = of_heads if program.bank.specs else [*of_base, *of_heads]
        encoders = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
        self._has_fastpath = any(isinstance(m, encoders) for m in base.modules())
        taken = inspect.signature(base.forward).parameters
        self._cacheless = "use_cache" in taken
        # Other code may take a number of tokens alone under that name.
        self._keeps_logits = PLACES in taken and base.forward.__module__.startswith("transformers.")

    def train(self, mode: bool = True) -> AdaptedNetwork:
        """Like `nn.Module.train`, except that an adapted network's running statistics stay frozen.

        They belong to its weights. Quantised layers stay in training mode, which chooses their
        kernels: in evaluation mode some repack their weights for good, for a product that has no
        gradient.
        """
        super().train(mode)
        for module in self._frozen_statistics:
            module.eval()
        for module in self._quantised:
            module.train()
        return self

    def under(self, task: Task) -> Self:
        """Return this model with another task, and everything else shared."""
        other = copy.copy(self)
        other._modules = {**self._modules, "task": task}
        return other

    @property
    def sharded(self) -> bool:
        """Whether each process has a part of the network's weights, as under FSDP2."""
        return is_sharded(self.base)

    # Draws ---------------------------------------------------------------------------------------

    @property
    def linearises(self) -> bool:
        """Whether draws predict by the network linearised at the mean adapter."""
        return self.program.supports.linearised and self.task.linearisable

    def network(self, batch: Batch, factors: FlatFactors) -> Tensor:
        """Return the network's output under ``factors``, as the task reads it.

        It is (b, ...), or (S, b, ...) for S draws, which share a pass where they can (`together`).
        """
        draws = factors.draws
        if draws is None:
            return self.run(batch, self.binding(factors))
        if draws > 1 and self.together(batch):
            repeated = {
                name: t.repeat(draws, *[1] * (t.dim() - 1)) if isinstance(t, Tensor) else t
                for name, t in batch.items()
            }
            output = self._in_one_pass(repeated, factors)
            if output is not None:
                return output.unflatten(0, (draws, -1))
        if draws == 1:  # a stack would be a copy, of logits over a vocabulary
            return self.run(batch, self.binding(factors[0])).unsqueeze(0)
        return torch.stack([self.run(batch, self.binding(factors[s])) for s in range(draws)])

    def shared_out(self, batch: Batch, factors: FlatFactors) -> Tensor:
        """Like `network`, but S draws have one of S equal blocks of the batch each: (b, ...)."""
        draws = factors.draws
        assert draws is not None
        if draws > 1 and self.together(batch):
            output = self._in_one_pass(batch, factors)
            if output is not None:
                return output
        size = batch_size(batch) // draws
        blocks = [{n: t[s * size : (s + 1) * size] for n, t in batch.items()} for s in range(draws)]
        outputs = [self.run(block, self.binding(factors[s])) for s, block in enumerate(blocks)]
        return torch.cat(outputs)

    def together(self, batch: Batch, *, several_heads: bool = False) -> bool:
        """Return whether several draws can share a pass on data such as ``batch``.

        With ``several_heads`` their rows may have heads of their own, as draws of an ensemble do.

        Every adapted layer then sees rows that fall into equal blocks, draw after draw. So it is
        where examples are outermost in each layer's input. A network that turns its tensors round,
        projects a table that has no examples, or sends some rows to some layers computes another
        function for such draws, and gets one draw per pass. The first batch of each kind shows
        which it is (`adapters.shares`): the forward passes of 12 examples for a network and its
        adapted layers, whatever follows. Layers that were not called then, and numbers of rows
        that do not fit, end the sharing later on.
        """
        several_heads |= self.program.several_heads
        if not self.attachment.layers and not several_heads:
            return True
        known, kind = self._sharing(several_heads), kind_of(self.task.inputs(batch, self.base))
        if known.possible and kind not in known.checked:
            plain = self.binding(self.program.mean())
            with evaluating(self):
                known.possible, called = shares(self.run, batch, plain, several_heads)
            known.checked.add(kind)
            known.seen |= self._names(called)
        return known.possible

    def fits(self, binding: Binding, *, several_heads: bool = False) -> bool:
        """Return whether a shared pass called only layers that were seen to allow sharing.

        If not, it was the last shared pass.
        """
        known = self._sharing(several_heads)
        known.possible &= self._names(binding.used) <= known.seen
        return known.possible

    def keep_apart(self, *, several_heads: bool = False) -> None:
        """Let each draw have a pass of its own from now on."""
        self._sharing(several_heads).possible = False

    def _in_one_pass(self, batch: Batch, factors: FlatFactors) -> Tensor | None:
        """Return the output of draws that share a pass; None where they turn out not to."""
        binding = self.binding(factors, batch_size(batch))
        try:
            output = self.run(batch, binding)
        except SharedPassError:
            self.keep_apart()
            return None
        return output if self.fits(binding) else None

    def _sharing(self, several_heads: bool) -> Sharing:
        heads = self.attachment.heads if several_heads or self.program.several_heads else ()
        return sharing_of(self.base, self.attachment.layers, heads)

    def _names(self, layers: Set[Any]) -> set[str]:
        return {name for name, layer in self.attachment.layers.items() if layer in layers}

    # One pass ------------------------------------------------------------------------------------

    def run(self, batch: Batch, binding: Binding) -> Tensor:
        """Return the network's output on ``batch`` with ``binding``, as the task reads it."""
        with self.bound(binding):
            raw = self._raw(batch)
        if len(binding.used) < len(binding.factors) and not self._may_leave_out():
            self._warn_of_uncalled(binding)
        return self._read(raw, batch)

    def named_heads(self, factors: FlatFactors | None = None) -> dict[str, list[nn.Module]]:
        """Return the posterior's task heads by their name in the network (`HeadCopies.named`)."""
        return self.heads.named(factors)

    def binding(self, factors: FlatFactors, rows: int = 1) -> Binding:
        """Return the binding of ``factors`` and of this posterior's heads.

        ``rows`` are those of a pass that several draws share.
        """
        if self.sharded and not take_part():
            raise BindingError(
                "each process has a part of this network's weights (FSDP2), so that every process "
                "has to take part in each pass; open 'with pyrolora.all_processes():' in all of "
                "them, or save the posterior and load it with the whole network"
            )
        if not self.attachment.attached:
            raise BindingError(
                "this posterior was detached from its network and cannot run it any more; "
                "load it again with pyrolora.load(path, model)"
            )
        layers, slots = self.attachment.layers, self.attachment.heads
        device = device_of(self)
        dtype = next((layer.weight for layer in layers.values()), factors.A).dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        elif is_quantised(dtype):
            dtype = factors.A.dtype
        with torch.autocast(device.type, enabled=False):
            per_layer = self.program.bank.layer_factors(factors, dtype)
        return Binding(
            with_noise_measured({layers[name]: value for name, value in per_layer.items()}),
            {slots[name]: heads for name, heads in self.named_heads(factors).items()},
            rows=rows,
            eager=factors.head is not None,  # code would be compiled anew for each drawn head
        )

    @contextmanager
    def bound(self, binding: Binding) -> Iterator[None]:
        """Bind for the block, in which the network runs.

        Its code calls its layers (torch's fast path for ``nn.TransformerEncoder`` would read their
        weights), and has torch's default dtype as the caller set it.
        """
        calls = layers_called() if self._has_fastpath else nullcontext()
        compiled = is_compiled(self.base)
        binding = replace(binding, compiled=compiled)
        with bind(binding), calls, DRAWING.callers_dtype():
            if not compiled:
                yield
                return
            with eagerly(self.base) if binding.eager else compiled_calls(self.base):
                yield

    def uncalled(self, batches: Iterable[Batch]) -> list[str]:
        """Return the adapted layers that the network calls for none of the batches.

        It runs in evaluation mode, and reads no more batches than are needed.
        """
        left = set(self.attachment.layers)
        with evaluating(self), torch.no_grad():
            for batch in batches:
                binding = replace(self.binding(self.program.mean()), eager=True)
                with self.bound(binding):
                    self._raw(batch)
                left -= self._names(binding.used)
                if not left:
                    break
        return [name for name in self.attachment.layers if name in left]

    def _may_leave_out(self) -> bool:
        """Return whether uncalled layers are fine: training may skip layers (layerdrop)."""
        return self.base.training or self.attachment.checked

    def _raw(self, batch: Batch) -> Any:
        """Return what the network returns on a batch, with few logits where few are read."""
        inputs = for_network(self.task.inputs(batch, self.base))
        if set(inputs) == {INPUTS}:
            return self.base(inputs[INPUTS])
        places = self.task.places(batch)
        if places is not None and self._keeps(places):
            inputs[PLACES] = places
        if self._cacheless:
            return self.base(**inputs, use_cache=False)
        return self.base(**inputs)

    def _read(self, raw: Any, batch: Batch) -> Tensor:
        """Return the tensor that the law reads, from what the network returns on a batch."""
        output, places = self.task.output(raw), self.task.places(batch)
        if places is not None and output.dim() == 3 and not self._keeps(places):
            output = output.take_along_dim(places.expand(len(output), -1)[..., None], 1)
        return self.task.scores(output, batch)

    def _keeps(self, places: Tensor) -> bool:
        """Return whether the network gives the logits at these places alone, if it is asked to.

        Places that differ from row to row are known to newer versions of transformers.
        """
        return self._keeps_logits and (places.dim() == 1 or hasattr(modeling_utils, EACH))

    def _warn_of_uncalled(self, binding: Binding) -> None:
        """Warn, once, of layers that the network does not call: their adapters do nothing."""
        self.attachment.checked = True
        names = self._names(binding.factors.keys() - binding.used)
        if len(names) == len(binding.factors):
            raise BindingError(NOT_CALLED.format(listed(sorted(names))))
        warnings.warn(
            f"{NOT_CALLED.format(listed(sorted(names)))}: these adapters do nothing here",
            UserWarning,
            stacklevel=2,
        )


def batch_size(batch: Batch) -> int:
    """Return the number of examples in a batch."""
    return len(next(iter(batch.values())))


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's parameters."""
    return next(module.parameters()).device

"""Gradients of the network's outputs in the adapter factors, example by example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyrolora.columns import LABELS, Batch
from pyrolora.guides import Latent
from pyrolora.inference.recording import readable, recorded
from pyrolora.model import JointModel, evaluating
from pyrolora.tasks import Task

Batches = Callable[[], Iterable[Batch]]
"""Returns all training examples once, on the model's device, in the same order at every call."""

SLAB_BYTES = 2**30
"""Largest part of the Jacobian that `slabs` holds; there is one more tensor of that size."""
ROUNDING = 1e-6
"""Relative size below which float32 cannot tell eigenvalues of a Hessian from zero."""


@dataclass(frozen=True)
class Part:
    """A batch, its outputs at the means, and the directions in which the task's law varies.

    The columns that the task reads; the outputs f (b, o), flat, and their shape; and the
    directions Q (b, o, k), orthonormal.
    """

    batch: Batch
    output: Tensor
    shape: torch.Size
    basis: Tensor

    def at(self, moved: Tensor) -> Tensor:
        """Return the outputs f + Q g for g (b, k)."""
        return (self.output + (self.basis @ moved[..., None])[..., 0]).reshape(self.shape)


def examples(joint: JointModel, batches: Batches) -> list[Part]:
    """Return the training examples at the means, with k directions each.

    k is the number of directions of the example with most: C − 1 for the softmax of C classes.

    The directions are those of the Hessian at outputs of zero: where a network is certain of an
    example, the Hessian at its outputs is nearly zero in all directions.
    """
    parts, most = [], 1
    with evaluating(joint), torch.no_grad(), torch.autocast(_device(joint), enabled=False):
        for batch in _read(joint, batches):
            output = joint.run(batch, joint.binding(joint.program.bank.means()))
            values, basis = torch.linalg.eigh(hessian(joint.task, torch.zeros_like(output), batch))
            counted = (values > ROUNDING * values[:, -1:]).sum(-1)
            most = max(most, int(counted.max()))
            kept = {n: batch[n] for n in (LABELS, *joint.task.extras) if n in batch}
            flat = output.reshape(len(output), -1).double()
            parts.append(Part(kept, flat, output.shape, basis.flip(-1)))
    return [replace(part, basis=_cut(part.basis, most)) for part in parts]


def hessian(task: Task, output: Tensor, batch: Batch) -> Tensor:
    """Return the Hessian of −log p(y_i | f) in an example's o outputs, (b, o, o), in double."""
    vectors = torch.stack(list(task.curvature(output, batch)), 1)
    vectors = vectors.reshape(*vectors.shape[:2], -1).double()
    return vectors.mT @ vectors


def slabs(
    joint: JointModel, batches: Batches, parts: Sequence[Part], latent: Latent
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield columns of the Jacobian of <q, f(x_i; θ)> in the latent factors at the means.

    q are the directions of example i. A slab is the entries of ``bank.layout(latent)`` that it has,
    (p,), and the Jacobian, (n k, p).

    A slab has as many layers as fit into `SLAB_BYTES`, and at least one. It costs a forward pass
    over the examples, and k backward passes down to the lowest of its layers.
    """
    rows = sum(part.basis.shape[0] * part.basis.shape[2] for part in parts)
    for names in _slab_names(joint, rows, latent):
        columns = _columns(joint, names, latent)
        of_batches = []
        with evaluating(joint), torch.enable_grad(), torch.autocast(_device(joint), enabled=False):
            for batch, part in zip(_read(joint, batches), parts, strict=True):
                of_batches.append(_rows(joint, batch, part, names, latent))
        yield columns, torch.cat(of_batches)


def _rows(
    joint: JointModel, batch: Batch, part: Part, names: Sequence[str], latent: Latent
) -> Tensor:
    """Return the Jacobian of one batch in the latent factors of some layers, (b k, p)."""
    bank = joint.program.bank
    means = bank.means()
    means = replace(means, A=means.A.detach(), B=means.B.detach().requires_grad_())
    output, layers = recorded(joint, batch, means)
    matrices = {f: bank.layouts[f].matrices(bank.kept(f, getattr(means, f).detach())) for f in "AB"}
    updates = [update for name in names for update in layers[name].updates]
    size, rows = len(output), []
    for q in part.basis.to(output.dtype).unbind(-1):
        gradients = iter(
            torch.autograd.grad(
                output,
                updates,
                grad_outputs=q.reshape(output.shape),
                retain_graph=True,
                materialize_grads=True,
            )
        )
        uses = {name: [(x, next(gradients)) for x in layers[name].inputs] for name in names}
        blocks = [
            _of_block(uses[name], matrices, name, f, size) * bank.specs[name].scaling
            for f in latent
            for name in names
        ]
        rows.append(torch.cat([block.flatten(1) for block in blocks], 1))
    return torch.stack(rows, 1).flatten(0, 1)


def _of_block(
    uses: Sequence[tuple[Tensor, Tensor]],
    matrices: Mapping[str, Mapping[str, Tensor]],
    name: str,
    factor: str,
    size: int,
) -> Tensor:
    """Return the gradients of a block, (b, r, columns): Σ Bᵀ g xᵀ for A, and Σ A x gᵀ for Bᵀ.

    The sums are over all positions and uses.
    """
    shape = matrices[factor][name].shape
    other = matrices["AB".replace(factor, "")][name]
    total = other.new_zeros(size, *shape)  # zeros stay where a layer is not called
    for x, g in uses:
        x, g = (t.reshape(size, -1, t.shape[-1]).to(other.dtype) for t in (x, g))
        left, right = (g, x) if factor == "A" else (x, g)
        total += torch.einsum("btr,btc->brc", left @ other.mT, right)
    return total


def _slab_names(joint: JointModel, rows: int, latent: Latent) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, spec in joint.program.bank.specs.items():
        sides = {"A": spec.in_features, "B": spec.out_features}
        size = 4 * rows * spec.rank * sum(sides[factor] for factor in latent)
        if names and held + size > SLAB_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _columns(joint: JointModel, names: Sequence[str], latent: Latent) -> Tensor:
    """Return the entries of ``bank.layout(latent)`` of these layers, in the order of `_rows`."""
    start, places = 0, {}
    for block in joint.program.bank.layout(latent).blocks:
        size = block.rank * block.columns
        places[block.factor, block.layer] = torch.arange(start, start + size)
        start += size
    entries = torch.cat([places[factor, name] for factor in latent for name in names])
    return entries.to(joint.program.bank.get_parameter("A_loc").device)


def _cut(basis: Tensor, most: int) -> Tensor:
    """Return the first ``most`` directions, padded with zeros."""
    missing = max(0, most - basis.shape[-1])
    return nn.functional.pad(basis[..., :most], (0, missing))


def _read(joint: JointModel, batches: Batches) -> Iterator[Batch]:
    return (part for whole in batches() for part in readable(joint, whole))


def _device(joint: JointModel) -> str:
    return str(joint.program.bank.get_parameter("A_loc").device.type)

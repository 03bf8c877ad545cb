"""KFAC: the curvature of the log-likelihood in the adapter factors, block by block."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.adapters import LayerSpec
from pyrolora.columns import Batch
from pyrolora.errors import DataError
from pyrolora.inference.recording import (
    Recording,
    counted,
    masks,
    read,
    readable,
    recorded,
    sizes_of,
)
from pyrolora.model import JointModel, evaluating


class Eigen(NamedTuple):
    """Eigenvectors and eigenvalues of a `Kronecker` block.

    rows = U diag(ρ) Uᵀ and columns = V diag(κ) Vᵀ, with ``values`` (r, c) = ρ κᵀ >= 0.
    """

    U: Tensor
    V: Tensor
    values: Tensor


@dataclass(frozen=True)
class Kronecker:
    """The curvature of one block X (r, c) of the bank, d vec(X)ᵀ (rows ⊗ columns) d vec(X).

    vec goes row by row; ``rows`` is (r, r), ``columns`` (c, c).
    """

    rows: Tensor
    columns: Tensor

    def eigen(self, kept: int | None = None) -> Eigen:
        """Return the eigenvectors of both factors and the eigenvalues of their product.

        Eigenvalues that rounding puts below zero are zero. With ``kept`` < c they are the largest
        of ``columns``, by a randomised range finder (Halko, Martinsson, Tropp 2011).
        """
        rho, U = torch.linalg.eigh(self.rows)
        if kept is None or kept >= len(self.columns):
            kappa, V = torch.linalg.eigh(self.columns)
        else:
            size = min(kept + OVERSAMPLED, len(self.columns))
            V, kappa, _ = torch.svd_lowrank(self.columns, q=size, niter=4)
            V, kappa = V[:, :kept], kappa[:kept]
        return Eigen(U, V, torch.outer(rho.clamp(min=0), kappa.clamp(min=0)))


OVERSAMPLED = 16
"""Directions that the range finder has beside those that are kept."""


def portions(specs: Iterable[LayerSpec]) -> Iterator[list[str]]:
    """Yield layers whose sums for `kfac` take at most `defaults.CURVATURE_BYTES`; at least one."""
    portion: list[str] = []
    size = 0
    for spec in specs:
        bytes_of_layer = 4 * (spec.in_features**2 + spec.out_features**2)
        if portion and size + bytes_of_layer > defaults.CURVATURE_BYTES:
            yield portion
            portion, size = [], 0
        portion.append(spec.name)
        size += bytes_of_layer
    yield portion


@torch.no_grad()
def kfac(
    joint: JointModel, batches: Iterable[Batch], names: Collection[str] | None = None
) -> dict[str, Kronecker]:
    """Return the generalised Gauss-Newton matrix of −log p(y | A, B) at the means, by block.

    KFAC-expand: for a weight that maps a_t to its output at position t of an example,

        Σ_examples Σ_t,t' Jᵀ H J  ≈  (1/m Σ_t a_t a_tᵀ) ⊗ (Σ_v Σ_t g_vt g_vtᵀ)

    with m the number of positions over all examples, H = Σ_v v vᵀ the Hessian of −log p in the
    network's output f (``task.curvature``), and g_vt the gradient of <v, f> in the weight's
    output. It is exact for one example without positions, and for a Gaussian law of a linear
    function. A layer that is called several times counts as one with that many more positions.
    Positions where ``attention_mask`` is 0, and choices that an example does not have, do not
    count; nor do positions that nothing reads (`recording.read`), where every g_vt is 0 and the
    left side has none: of a causal classifier, which reads its last token, the last block is exact
    for one example.

    A and B of a layer share its two large matrices. With X the mean of x xᵀ over the layer's
    inputs, and G the sum of g gᵀ over gradients in what B gives, s included,

        A:   rows = Bᵀ G B,   columns = X          Bᵀ:   rows = A X Aᵀ,   columns = G

    The network runs in evaluation mode and in its own dtype; the sums are in the bank's.

    A network whose layers do not see examples first (`JointModel.together`) is run example by
    example.

    Cost: per batch a forward pass and one backward pass per v; per layer and position in²
    multiplications, and out² for every v. Memory: 4 in² + 4 out² bytes per layer, whatever the
    number of examples: for BERT-base 113 MB with query and value adapted
    (48 matrices of 768²), 1.2 GB with all linear layers. Of large networks take some layers at a
    time (`portions`). `Kronecker.eigen` takes a block's matrix once more.

    Parameters
    ----------
    joint
        The model; its heads and its task are constants here.
    batches
        All n training examples once, on the model's device.
    names
        The layers; None: all.

    Returns
    -------
    dict
        Block name (``<layer>.A``, ``<layer>.B``, in the bank's orientation, Bᵀ) -> `Kronecker`.

    Raises
    ------
    DataError
        When there is no batch, or none with a position that counts.

    References
    ----------
    R. Eschenhagen et al. (2023), "Kronecker-Factored Approximate Curvature for Modern Neural
    Network Architectures".
    """
    bank = joint.program.bank
    means = bank.means()
    means = replace(means, A=means.A.detach(), B=means.B.detach().requires_grad_())
    dtype, device = means.A.dtype, means.A.device
    sums = {
        name: _Sums(
            torch.zeros(spec.in_features, spec.in_features, dtype=dtype, device=device),
            torch.zeros(spec.out_features, spec.out_features, dtype=dtype, device=device),
        )
        for name, spec in bank.specs.items()
        if names is None or name in names
    }
    with evaluating(joint), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for batch in (part for whole in batches for part in readable(joint, whole)):
            output, layers = recorded(joint, batch, means, sums)
            _accumulate(joint, batch, output, layers, sums)
    empty = [name for name, layer in sums.items() if layer.counted == 0]
    if empty:
        raise DataError(
            f"no position of any batch counts for layer {empty[0]!r}: there is no batch, or the "
            "attention_mask is 0 everywhere; pass the training examples"
        )
    curvature = {}
    factors = {f: bank.layouts[f].matrices(bank.kept(f, getattr(means, f).detach())) for f in "AB"}
    for name in sums:
        spec = bank.specs[name]
        A, B, s = factors["A"][name], factors["B"][name].mT, spec.scaling
        X = sums[name].inputs.div_(max(sums[name].positions, 1))
        G = sums[name].gradients.mul_(s**2)
        curvature[f"{name}.A"] = Kronecker(B.T @ G @ B, X)
        curvature[f"{name}.B"] = Kronecker(A @ X @ A.T, G)
    return curvature


@dataclass
class _Sums:
    """Sums Σ x xᵀ (in, in) and Σ g gᵀ (out, out), and numbers of positions.

    Those in the first sum are `read`. Others may count, and are not read.
    """

    inputs: Tensor
    gradients: Tensor
    positions: int = 0
    counted: int = 0


def _accumulate(
    joint: JointModel,
    batch: Batch,
    output: Tensor,
    layers: dict[str, Recording],
    sums: dict[str, _Sums],
) -> None:
    counting = masks(joint, batch)
    uses = [(sums[name], x) for name, layer in layers.items() for x in layer.inputs]
    updates = [update for layer in layers.values() for update in layer.updates]
    sizes = [x.new_zeros(x.shape[:-1]) for _, x in uses]
    for v in joint.task.curvature(output.detach(), batch):
        gradients = torch.autograd.grad(
            output, updates, grad_outputs=v, retain_graph=True, materialize_grads=True
        )
        for (layer_sums, _), gradient, size in zip(uses, gradients, sizes, strict=True):
            rows = counted(gradient, counting).to(layer_sums.gradients.dtype)
            layer_sums.gradients.addmm_(rows.T, rows)
            torch.maximum(size, sizes_of(gradient), out=size)
    examples = len(next(iter(batch.values())))
    for (layer_sums, x), size in zip(uses, sizes, strict=True):
        reached = read(size, examples).unsqueeze(-1)
        rows, places = counted(x, counting), counted(reached, counting).squeeze(-1)
        layer_sums.counted += len(rows)
        rows = rows[places].to(layer_sums.inputs.dtype)
        layer_sums.inputs.addmm_(rows.T, rows)
        layer_sums.positions += len(rows)

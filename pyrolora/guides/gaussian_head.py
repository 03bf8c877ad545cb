"""A Gaussian law of the task head's last layer, beside the program of the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyrolora import defaults
from pyrolora.adapters import FlatFactors
from pyrolora.distributions import BlockGroup, KroneckerNormal, orthonormal
from pyrolora.guides.plates import flat, tempered
from pyrolora.guides.program import Program, Quantities, Sites
from pyrolora.guides.wrapping import WrappingProgram
from pyrolora.parameters import ParamModule

HEAD = "head"
"""The site of the last layer's entries."""


class HeadLaw(ParamModule):
    """The law of W (C, F), the weight of a layer with its bias as the last column.

        prior  W ~ N(0, I / λ)        guide  W ~ N(W̄, (H / β + λ I)⁻¹)

    in the eigenbasis of H: that of the whole matrix, or of its two Kronecker factors where W has
    more entries than `defaults.HEAD_ENTRIES`.

    Buffers: W̄, ``loc``, row by row; λ, ``precision``; the eigenvectors ``rows`` (1, r, r) and
    ``columns`` (1, c, c), with r = 1 and c = C F for the whole matrix, else r = C and c = F; and
    ``values`` (1, r, c), the eigenvalues of H / β, zero until `set`.

    Parameters
    ----------
    loc
        W̄, (C, F).
    """

    loc: Tensor
    precision: Tensor
    rows: Tensor
    columns: Tensor
    values: Tensor

    def __init__(self, loc: Tensor) -> None:
        super().__init__()
        whole = loc.numel() <= defaults.HEAD_ENTRIES
        r, c = (1, loc.numel()) if whole else loc.shape
        self.register_buffer("loc", loc.detach().flatten().clone())
        self.register_buffer("precision", torch.ones(()))
        self.register_buffer("rows", torch.eye(r).unsqueeze(0))
        self.register_buffer("columns", torch.eye(c).unsqueeze(0))
        self.register_buffer("values", torch.zeros(1, r, c))
        self.confine("precision", constraints.positive)
        self.confine("rows", orthonormal)
        self.confine("columns", orthonormal)
        self.confine("values", constraints.nonnegative)

    @property
    def whole(self) -> bool:
        """Whether H is the whole matrix, not a Kronecker product."""
        return self.rows.shape[-1] == 1

    def prior(self) -> dist.TorchDistribution:
        """Return the law in the model."""
        zero = torch.zeros_like(self.loc)
        return dist.Normal(zero, self.precision.rsqrt()).to_event(1)

    def law(self) -> dist.TorchDistribution:
        """Return the law in the guide."""
        scale = (self.values + self.precision).rsqrt().flatten()
        groups = [BlockGroup(1, *self.values.shape[-2:])]
        return KroneckerNormal(self.loc, scale, [self.rows], [self.columns], groups)

    @torch.no_grad()
    def set(self, loc: Tensor, eigen: Sequence[Tensor], precision: float) -> None:
        """Set W̄, the eigenvectors of both factors of H and the eigenvalues of H / β, and λ."""
        self.loc.copy_(loc.flatten())
        for name, tensor in zip(("rows", "columns", "values"), eigen, strict=True):
            self.get_buffer(name)[0] = tensor
        self.precision.fill_(precision)


class GaussianHead(WrappingProgram):
    """A program with the sites of the inner one and ``head``, all entries of W, row by row.

    The mean has the trained head. The tensors of the law are those of `law`; the inner program
    keeps its own under its own names.
    """

    def __init__(self, inner: Program, law: HeadLaw) -> None:
        super().__init__(inner)
        self.options: Any = inner.options
        self.law = law

    @property
    def several_heads(self) -> bool:
        return True

    def model(self, kl_weight: float = 1.0) -> FlatFactors:
        factors = self.inner.model(kl_weight)
        with tempered(kl_weight):
            return replace(factors, head=flat(pyro.sample(HEAD, self.law.prior())))

    def guide(self, kl_weight: float = 1.0) -> None:
        self.inner.guide(kl_weight)
        with tempered(kl_weight):
            pyro.sample(HEAD, self.law.law())

    def factors(self, sites: Sites) -> FlatFactors:
        return replace(self.inner.factors(_others(sites)), head=flat(sites[HEAD]))

    def quantities(self, sites: Sites) -> Quantities:
        """Return those of the inner program and ‖W‖, (S,)."""
        norm = torch.linalg.vector_norm(sites[HEAD], dim=-1)
        return {**self.inner.quantities(_others(sites)), "head_norm": (norm, ())}


def _others(sites: Sites) -> dict[str, Tensor]:
    return {name: value for name, value in sites.items() if name != HEAD}

"""The program of MonteCLoRA: its sites, its laws, and the closed forms of its scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyrolora.adapters import AdapterBank, FlatFactors
from pyrolora.distributions import ColumnNormal, StandardColumns, WishartCholesky
from pyrolora.distributions.column_normal import split_blocks, whiten
from pyrolora.distributions.wishart_cholesky import lower_factor
from pyrolora.guides.centred import CentredProgram
from pyrolora.guides.engines import Curvature
from pyrolora.guides.mixture import DRAWS, SymmetricMixture, optimal_scales, symmetric_mixture
from pyrolora.guides.plates import flat, tempered
from pyrolora.guides.program import Quantities, Sites

if TYPE_CHECKING:
    from pyrolora.guides.montec import MonteCLoRA


class MonteCLoRAProgram(CentredProgram):
    """The model/guide pair of MonteCLoRA over L blocks.

    A block is a layer, or, for ``latent="AB"``, a factor of a layer. The sites are
    ``mixture_weights`` (L, N), ``covariance_tril`` (L, r, r), ``noise`` (all entries, flat); and
    the factor ``cooperation``, if it is used.
    """

    _eye: Tensor
    _rows: Tensor
    _scale: Tensor
    _concentration: Tensor
    _epsilon: Tensor

    site_supports = {  # noqa: RUF012 - a constant of the class
        "mixture_weights": constraints.unit_interval,
        "covariance_tril": lower_factor,
    }

    options: MonteCLoRA

    def __init__(self, bank: AdapterBank, options: MonteCLoRA) -> None:
        super().__init__(bank, options)
        self.layout = bank.layout(options.latent)
        blocks, r = len(self.layout), self.layout.rank
        self._full = all(block.rank == r for block in self.layout.blocks)
        self.df = float(options.df_per_rank * r)
        # The start is off the symmetric point, where all components have the same gradient.
        jitter = 0.5 + torch.rand(blocks, options.num_components)
        self.declare("concentration", options.concentration * jitter, constraints.positive)
        if options.covariance == "diagonal":
            diagonal = torch.full((blocks, r), options.init_covariance**0.5)
            self.declare("scale_diag", diagonal, constraints.positive)
        else:
            full = options.init_covariance**0.5 * torch.eye(r)
            self.declare("scale_tril", full.expand(blocks, r, r), lower_factor)
        if options.learn_sample_scale:
            self.declare("sample_scale", self._sample_scales(), constraints.positive)
        self.hold_scales()
        # Constants are buffers, so that they move between devices with the program.
        constants = {
            "eye": torch.eye(r).expand(blocks, r, r),
            "rows": self.layout.rank_mask(),
            "scale": torch.full((blocks, r), self.df**-0.5),
            "epsilon": self._sample_scales(),
            "concentration": torch.full((blocks, options.num_components), options.concentration),
        }
        for name, value in constants.items():
            self.register_buffer(f"_{name}", value, persistent=False)

    def model(self, kl_weight: float = 1.0) -> FlatFactors:
        options, means = self.options, self.bank.means()
        with tempered(kl_weight):
            with pyro.plate("blocks", len(self.layout), dim=-1):
                weights = pyro.sample("mixture_weights", self._weights_prior())
                tril = pyro.sample("covariance_tril", self._covariance_prior())
                if options.cooperation and self.previous is None:
                    pyro.factor("cooperation", -options.cooperation * weights.square().sum(-1))
            gain, tril = self._gain(weights), self._cut(tril)
            loc = self._prior_loc(gain, tril, means)
            noise = pyro.sample("noise", self._noise_prior(tril, loc))
        return self._factors(gain, tril, noise, means)

    def guide(self, kl_weight: float = 1.0) -> None:
        with tempered(kl_weight):
            with pyro.plate("blocks", len(self.layout), dim=-1):
                pyro.sample("mixture_weights", dist.Dirichlet(self.param("concentration")))
                tril = self._cut(pyro.sample("covariance_tril", self._covariance()))
            pyro.sample("noise", self._noise(tril))

    def factors(self, sites: Sites) -> FlatFactors:
        gain = self._gain(sites["mixture_weights"])
        tril = self._cut(sites["covariance_tril"])
        return self._factors(gain, tril, sites["noise"], self.bank.means())

    def _factors(
        self, gain: Tensor, tril: Tensor, noise: Tensor, means: FlatFactors
    ) -> FlatFactors:
        """Return the factors whose noise is ε₀ ‖π‖ z, or ε₀ ‖π‖ L z."""
        if self.options.component_prior == "hierarchical":
            delta = self.layout.transform(gain[..., None] * tril, flat(noise))
        else:
            delta = self.layout.scale_rows(gain, flat(noise))
        return self.bank.shifted(self.options.latent, delta, means)

    def variances(self) -> FlatFactors:
        """Return the variance of every entry: ε² E‖π‖² V_kk in row k, in its units."""
        law, options = dist.Dirichlet(self.param("concentration")), self.options
        if options.sparse:  # E (max π)² has no closed form
            squares = self._spread(law.sample((DRAWS,))).square().mean(0)
        else:
            squares = (law.variance + law.mean.square()).sum(-1)
        full = options.covariance == "full"
        tril = self.param("scale_tril") if full else self.param("scale_diag").diag_embed()
        V = self._cut(tril).square().sum(-1)
        rows = (self._scale_of_noise().square() * squares)[:, None] * V
        sizes = self.sizes()
        rows = rows if sizes is None else rows * sizes.square()
        return self.bank.alone(options.latent, self.layout.spread_rows(rows))

    def quantities(self, sites: Sites) -> Quantities:
        """Return the mixture weights; Σ and its eigenvalues; and the signal-to-noise of each rank.

        The last is |m_k| / sd(a_k), with |m_k| the root mean square of the means, less a start that
        is taken off again, and sd = ε ‖π‖ √Σ_kk.
        """
        tril = self._cut(sites["covariance_tril"])
        covariance = tril @ tril.mT
        scale = self._spread(sites["mixture_weights"]) * self._scale_of_noise()
        noise = scale.unsqueeze(-1) * covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        sizes = self.sizes()
        noise = noise if sizes is None else noise * sizes
        return {
            "mixture_weights": (sites["mixture_weights"], ("block", "component")),
            "covariance": (covariance, ("block", "rank", "rank_")),
            "covariance_eigenvalues": (torch.linalg.eigvalsh(covariance), ("block", "rank")),
            "signal_to_noise": (self._signal() / noise, ("block", "rank")),
        }

    def block_names(self) -> list[str]:
        return [block.name for block in self.layout.blocks]

    def rank_entries(self, rows: Tensor) -> dict[str, Tensor]:
        entries = self.bank.by_block(self.options.latent, rows)
        if self.options.covariance == "diagonal":
            return {"scale_diag": entries}
        row, column = torch.tril_indices(
            self.layout.rank, self.layout.rank, -1, device=entries.device
        )
        return {"scale_tril": torch.cat([entries, entries[:, row] | entries[:, column]], -1)}

    def _prior_loc(self, gain: Tensor, tril: Tensor, means: FlatFactors) -> Tensor | None:
        """Return the mean of z in the model, whose noise is seen from M.

        It is z at a_j = 0, at the start of a_j, or at the mean of the earlier posterior.
        """
        factor = self.options.latent
        centre = self.centre(factor)
        if self.previous is not None:
            centre = self.bank.latent_part(factor, self.previous.bank.means())
        elif self.options.prior_mean == "learned":
            return None
        latent = self.bank.latent_part(factor, means)
        if centre is not None:
            latent = latent - centre
        if self.options.component_prior == "hierarchical":
            law = -gain[..., None] * tril
            loc = whiten(law, latent.expand(*gain.shape[:-2], -1), self.layout.groups)
        else:
            loc = self.layout.scale_rows(-1 / gain, latent)
        return loc.unsqueeze(-2) if loc.dim() > 1 else loc  # inside a plate of draws

    def _weights_prior(self) -> dist.TorchDistribution:
        if self.previous is None:
            return dist.Dirichlet(self._concentration)
        return dist.Dirichlet(self.previous.param("concentration"))

    def _covariance_prior(self) -> WishartCholesky:
        if self.previous is None:
            return WishartCholesky(self.df, scale_diag=self._column_scale())
        law: WishartCholesky = self.previous._covariance()
        return law

    def _noise_prior(self, tril: Tensor, loc: Tensor | None) -> ColumnNormal:
        if self.previous is None:
            return StandardColumns(self._scale, self.layout.groups, loc)
        law: ColumnNormal = self.previous._noise(tril, loc)
        return law

    def _noise(self, tril: Tensor, loc: Tensor | None = None) -> ColumnNormal:
        """Return the guide's law of z given the factor of Σ, around ``loc`` or zero."""
        groups = self.layout.groups
        if self.options.component_prior == "isotropic":
            return ColumnNormal(self._widened(tril), groups, loc)
        if self.options.learn_sample_scale:
            return ColumnNormal(self._widened(self._eye), groups, loc)
        return StandardColumns(self._scale, groups, loc)

    def _gain(self, weights: Tensor) -> Tensor:
        """Return ε₀ ‖π‖ of every row, in its units, (..., L, r)."""
        gain, sizes = (self._epsilon * self._spread(weights))[..., None], self.sizes()
        return gain.expand(*gain.shape[:-1], self.layout.rank) if sizes is None else gain * sizes

    def _scale_of_noise(self) -> Tensor:
        """Return the guide's ε, learned or stated, (L,)."""
        return self.param("sample_scale") if self.options.learn_sample_scale else self._epsilon

    def _spread(self, weights: Tensor) -> Tensor:
        """Return ‖π‖ (or max π): the standard deviation of the mixture at Σ = I, (..., L)."""
        return weights.amax(-1) if self.options.sparse else weights.norm(dim=-1)

    def _covariance(self) -> WishartCholesky:
        """Return the guide's law of the factor of Σ.

        V is I where a block of lower rank has no row, and where a rank is idle.
        """
        rows, scale = self._in_use(), self._column_scale()
        full = self._full and self.bank.active is None
        if self.options.covariance == "diagonal":
            diagonal = self.param("scale_diag")
            diagonal = diagonal if full else torch.where(rows, diagonal, 1.0)
            return WishartCholesky(self.df, scale_diag=diagonal * scale)
        tril = self.param("scale_tril")
        if not full:
            tril = torch.where(rows.unsqueeze(-1) & rows.unsqueeze(-2), tril, self._eye)
        return WishartCholesky(self.df, tril * scale.unsqueeze(-2))

    def _column_scale(self) -> Tensor:
        """Return the factors of V's columns for which E[Σ] = V, (L, r).

        They are 1/√ν; where ranks are idle, row k of the standard Bartlett factor, without the c
        idle ranks before it, has the mean square ν − c.
        """
        rows = self.bank.rows(self.options.latent)
        if rows is None:
            return self._scale
        return (self.df - (~rows).cumsum(-1) * rows).rsqrt()

    def _in_use(self) -> Tensor:
        """Return which rows of each block exist and are not idle, (L, r) booleans."""
        rows = self.bank.rows(self.options.latent)
        return self._rows if rows is None else rows

    def _cut(self, tril: Tensor) -> Tensor:
        """Return the factor of Σ, (..., L, r, r), with the identity in place of idle ranks.

        The noise of idle ranks then has its prior, and no part in that of the others.
        """
        rows = self.bank.rows(self.options.latent)
        if rows is None:
            return tril
        return torch.where(rows.unsqueeze(-1) & rows.unsqueeze(-2), tril, self._eye)

    def _widened(self, law: Tensor) -> Tensor:
        """Return the factor of z's covariance, (..., L, r, r), times ε / ε₀ where ε is learned."""
        if self.options.learn_sample_scale:
            ratio = self.param("sample_scale") / self._epsilon
            law = law * torch.where(self._in_use(), ratio[:, None], 1.0).unsqueeze(-1)
        return law.unsqueeze(-4) if law.dim() > 3 else law  # in a plate there is one law per draw

    def _sample_scales(self) -> Tensor:
        """Return ε₀ of every block, (L,)."""
        scale = torch.full((len(self.layout),), self.options.sample_scale)
        if self.options.unit == "fan_in":
            scale = scale * self.layout.fan_in().rsqrt()
        return scale

    @torch.no_grad()
    def settle(self, curvature: Curvature, beta: float) -> None:
        H, squared_scale, sizes = curvature.ranks, self._epsilon.square(), self.sizes()
        if sizes is not None:
            H = sizes[:, :, None] * H * sizes[:, None, :]
        if self.options.covariance == "diagonal":
            H = torch.diag_embed(H.diagonal(dim1=-2, dim2=-1))
        V, concentration = optimal_scales(
            H,
            self._mixture,
            start=self.param("concentration").mean(-1),
            squared_scale=squared_scale,
            distance=0.5 * self._squared_distance() / squared_scale,
            kappa=self._kappa(),
            beta=beta,
            cooperation=self.options.cooperation,
        )
        self.assign("concentration", concentration[:, None].expand_as(self._concentration))
        if self.options.covariance == "diagonal":
            self.assign("scale_diag", V.diagonal(dim1=-2, dim2=-1).sqrt())
        else:
            self.assign("scale_tril", torch.linalg.cholesky(V))

    @property
    def _mixture(self) -> SymmetricMixture:
        options = self.options
        return symmetric_mixture(options.num_components, options.concentration, options.sparse)

    def _kappa(self) -> Tensor:
        """Return the weight of ½ (tr V − log|V|) in the KL, (L,): ν, and 1 per column of z."""
        kappa = self._epsilon.new_full((len(self.layout),), self.df)
        if self.options.component_prior == "isotropic":
            columns = [float(block.columns) for block in self.layout.blocks]
            kappa = kappa + kappa.new_tensor(columns)
        return kappa

    def _squared_distance(self) -> Tensor:
        """Return ‖M − M₀‖² of every block, (L,); zero where M₀ is M."""
        means = self.bank.latent_part(self.options.latent, self.bank.means())
        if self.options.prior_mean == "learned":
            return torch.zeros_like(self._epsilon)
        centre = self.centre(self.options.latent)
        parts = split_blocks(means if centre is None else means - centre, self.layout.groups)
        return torch.cat([part.square().sum((-2, -1)) for part in parts])

    def _signal(self) -> Tensor:
        """Return the root mean square of each row of what was learnt, (L, r); 0 if not in use."""
        learnt = self.learnt(self.options.latent).detach()
        return torch.where(self._in_use(), self.layout.row_sizes(learnt), 0.0)

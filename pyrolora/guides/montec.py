"""MonteCLoRA: Dirichlet mixture weights, Wishart covariance, Gaussian low-rank factors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyrolora import defaults
from pyrolora.adapters import AdapterBank, FlatFactors
from pyrolora.checks import positive, true_or_false, whole_number
from pyrolora.distributions import ColumnNormal, StandardColumns, WishartCholesky
from pyrolora.distributions.column_normal import split_blocks, whiten
from pyrolora.distributions.wishart_cholesky import lower_factor
from pyrolora.errors import ConfigError
from pyrolora.guides.engines import Curvature, Fit
from pyrolora.guides.mixture import SymmetricMixture
from pyrolora.guides.options import LATENTS, PRIOR_MEANS, Variational, check_units, require
from pyrolora.guides.plates import flat, tempered
from pyrolora.guides.program import Program, Quantities, Sites

SETTLING = 5
"""How often V and α are found in turn."""
COMPONENT_PRIORS = ("isotropic", "hierarchical")
COVARIANCES = ("diagonal", "full")


@dataclass(frozen=True, kw_only=True)
class MonteCLoRA(Variational):
    r"""The posterior of MonteCLoRA over the adapter factors.

    For every adapted layer, with columns a_j of A (r-vectors), mean columns m_j and scale ε:

        π ~ Dirichlet(α₀ 1_N)                 mixture weights
        Σ = L Lᵀ ~ Wishart(ν, I / ν)          covariance, E[Σ] = I
        δ_jk | Σ ~ N(0, Σ), k = 1..N          components
        a_j = m_j + ε Σ_k π_k δ_jk            adapter, E[a_j] = m_j

    and in the guide π ~ Dirichlet(α), Σ ~ Wishart(ν, V / ν), with α and V learned. Given π and Σ
    the mixture of a column is one Gaussian, N(0, ‖π‖₂² Σ), and that is what is drawn. The site
    ``noise``, z, has prior N(0, I) in both forms of the component prior:

    - ``"hierarchical"``, the model above, non-centred: a_j = m_j + ε₀ ‖π‖ L z_j with
      z_j ~ N(0, (ε/ε₀)² I) in the guide. The KL of z is zero when ε is fixed.
    - ``"isotropic"``, the paper's objective: the model has δ_jk ~ N(0, I) and keeps Σ under its
      Wishart prior, connected to nothing; a_j = m_j + ε₀ ‖π‖ z_j with z_j ~ N(0, (ε/ε₀)² Σ) in the
      guide. The KL of z is KL(N(0, (ε/ε₀)² Σ) ‖ N(0, I)), once a column.

    The means M, B and the task head are parameters that model and guide share. With
    ``prior_mean="zero"`` the model's M is zero instead, a_j = ε₀ Σ_k π_k δ_jk, the guide's as
    above: the KL of z then prices the means, too, by ½ ‖S⁻¹ m_j‖² a column, with S = ε₀ ‖π‖ I, or
    ε₀ ‖π‖ L in the hierarchical form. With ``"start"`` it is where A starts, a⁰, in place of zero,
    a_j = a⁰_j + ε₀ Σ_k π_k δ_jk, and m_j − a⁰_j, what is learnt, has the price. (Where the adapters
    have a start A₀, B₀ that is taken off again, zero is there, too.)

    Given the generalised Gauss-Newton matrix of −log p(y|A), in which H = Σ_j H_jj, (r, r), is
    what the columns of a layer have in common, the optimum of V is a closed form, and that of
    ‖π‖ a search in one number a layer, over symmetric α:

        V = [ I + ε₀² E‖π‖² H / (β κ) ]⁻¹,    κ = c + ν (isotropic),  κ = ν (hierarchical)

    for c columns: the wider the fewer data, V = I without data. With ``covariance="diagonal"`` it
    is that of the diagonal of H.

    Where ranks move between layers, Σ and its V are cut to a layer's active ranks. Their Σ has the
    mean above and is no Wishart, once ranks are idle between them.

    After an earlier posterior (``fit(..., prior=)``) the model is that one's guide: its Dirichlet,
    its Wishart, and its noise around its M, which no longer moves. Given Σ the law of z differs
    from the guide's in its mean, and in ε where that is learned, whatever the component prior.

    Parameters
    ----------
    num_components
        N.
    sample_scale
        ε₀, the scale of the noise in the model; in the ``units``.
    units
        ``"row"``: ε₀ is a multiple of d_k, the root mean square of row k of M, so that
        a_j = m_j + ε D Σ_k π_k δ_jk with D = diag(d): the noise is relative to what is learnt, and
        no other size of A and B with the same B A escapes it. For ``latent="A"`` and the learned
        prior mean; after an earlier posterior D is that one's. ``"fan_in"``: ε₀ is a multiple of
        1/√in for A and of 1/√r for B, so that the noise of A x, or of B A x, is the same at every
        width and rank. ``"one"``: it is as it is (paper).
    learn_sample_scale
        Learn the guide's ε, one a layer, from ε₀ on; its price is the KL of z.
    component_prior
        ``"isotropic"`` or ``"hierarchical"``.
    covariance
        V ``"diagonal"`` (the paper's) or ``"full"``.
    prior_mean
        ``"learned"`` (the paper's: the prior is centred where the guide is, M costs nothing),
        ``"start"`` (it is centred where A starts; where the adapter is given, around that), or
        ``"zero"``.
    df_per_rank
        ν / r >= 1, with r the highest rank that a layer has or, where ranks move, can have. For the
        hierarchical form around zero ν > r + 1: below, E[Σ⁻¹] and with it the KL is infinite.
    concentration
        α₀.
    init_covariance
        The start of V as a multiple of I: a small one lets the network learn before the noise.
        Of ``scale_updates="gradient"``; by curvature it is where the first estimate is made.
    cooperation
        λ_c >= 0: adds −λ_c ‖π‖² per layer to the log joint density.
    latent
        The factor that carries the noise: ``"A"`` (paper), ``"B"`` (columns of Bᵀ), or ``"AB"``.
    sparse
        Use the largest mixture weight only: max π in place of ‖π‖.

    References
    ----------
    V. Seth, A. Sengupta et al. (2025), "Robust and Efficient Fine-tuning of LLMs with Bayesian
    Reparameterization of Low-Rank Adaptation", TMLR, arXiv 2411.04358.
    """

    name = "montec"
    guide_only = (
        *Variational.guide_only,
        "learn_sample_scale",
        "covariance",
        "init_covariance",
    )

    num_components: int = defaults.NUM_COMPONENTS
    sample_scale: float = defaults.SAMPLE_SCALE
    units: str = "one"
    learn_sample_scale: bool = False
    component_prior: str = "isotropic"
    covariance: str = "diagonal"
    prior_mean: str = defaults.PRIOR_MEAN
    df_per_rank: float = defaults.DF_PER_RANK
    concentration: float = defaults.CONCENTRATION
    init_covariance: float = defaults.INIT_COVARIANCE
    cooperation: float = 0.0
    latent: str = "A"
    sparse: bool = False
    kl_weight: float = defaults.KL_WEIGHT

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("num_components", self.num_components, at_least=1)
        for name in ("sample_scale", "df_per_rank", "concentration", "init_covariance"):
            positive(name, getattr(self, name))
        positive("cooperation", self.cooperation, or_zero=True)
        require(self.df_per_rank >= 1, "df_per_rank", ">= 1", self.df_per_rank)
        for name in ("learn_sample_scale", "sparse"):
            true_or_false(name, getattr(self, name))
        for name, choices in (
            ("component_prior", COMPONENT_PRIORS),
            ("covariance", COVARIANCES),
            ("prior_mean", PRIOR_MEANS),
            ("latent", LATENTS),
        ):
            value = getattr(self, name)
            require(value in choices, name, f"one of {choices}", value)
        check_units(self.units, self.latent, self.prior_mean)

    @property
    def has_closed_scales(self) -> bool:  # type: ignore[override]
        """Not with a learned ε, nor where the KL of the means has V⁻¹ in it."""
        inverse = self.component_prior == "hierarchical" and self.prior_mean != "learned"
        return not (self.learn_sample_scale or inverse)

    @classmethod
    def paper(cls, **changes: Any) -> MonteCLoRA:
        """The paper's setting: isotropic, diagonal, ν = r, N = 4, ε = 5e-3, and 1e-5 times the KL
        against the mean loss; other options can be given as in the class."""
        options: dict[str, Any] = {
            "component_prior": "isotropic",
            "covariance": "diagonal",
            "prior_mean": "learned",
            "init_covariance": 1.0,
            "df_per_rank": 1,
            "num_components": 4,
            "sample_scale": 5e-3,
            "units": "one",
            "scale_updates": "gradient",
            "kl_weight": 1e-5,
            "kl_weight_against": "mean",
        }
        return cls(**{**options, **changes})

    def takes_prior(self) -> bool:
        return True

    def build(self, bank: AdapterBank) -> MonteCLoRAProgram:
        return MonteCLoRAProgram(bank, self)

    def infer(self, fit: Fit) -> None:
        inverse = self.prior_mean != "learned" and self.component_prior == "hierarchical"
        where = f"with prior_mean={self.prior_mean!r} and component_prior='hierarchical'"
        previous = fit.program.previous is not None
        if previous:
            inverse, where = True, "after an earlier posterior"
        rank, df = fit.program.layout.rank, fit.program.df
        if inverse and df <= rank + 1:
            raise ConfigError(
                f"{where} the KL is finite for df_per_rank > {1 + 1 / rank:g} at rank {rank}, got "
                f"{self.df_per_rank!r}" + ("; fit that one anew with more" if previous else "")
            )
        super().infer(fit)


class MonteCLoRAProgram(Program):
    """Sites, for L blocks (layers, or layers and factors for ``latent="AB"``):

    ``mixture_weights`` (L, N), ``covariance_tril`` (L, r, r), ``noise`` (all entries, flat); and
    the factor ``cooperation``, if it is used.
    """

    _eye: Tensor
    _rows: Tensor
    _df: Tensor
    _scale: Tensor
    _concentration: Tensor
    _epsilon: Tensor

    supports = {  # noqa: RUF012 - a constant of the class
        "mixture_weights": constraints.unit_interval,
        "covariance_tril": lower_factor,
    }

    options: MonteCLoRA

    def __init__(self, bank: AdapterBank, options: MonteCLoRA) -> None:
        super().__init__(bank, options)
        self.layout = bank.layout(options.latent)
        blocks, r = len(self.layout), self.layout.rank
        self.df = float(options.df_per_rank * r)
        self.keep_start(options.latent, options.prior_mean)
        # A start off the symmetric point, where the gradients of all components are equal.
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
        # Constants of the program: made once, and moved with it.
        constants = {
            "eye": torch.eye(r).expand(blocks, r, r),
            "rows": self.layout.rank_mask(),
            "df": torch.tensor(self.df),
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
        """The factors whose noise is ε₀ ‖π‖ z, or ε₀ ‖π‖ L z."""
        if self.options.component_prior == "hierarchical":
            delta = self.layout.transform(gain[..., None] * tril, flat(noise))
        else:
            delta = self.layout.scale_rows(gain, flat(noise))
        return self.bank.shifted(self.options.latent, delta, means)

    def quantities(self, sites: Sites) -> Quantities:
        """Mixture weights; Σ and its eigenvalues; and the signal-to-noise of each rank, |m_k| over
        sd(a_k), with |m_k| the root mean square of the means and sd = ε ‖π‖ √Σ_kk."""
        tril = self._cut(sites["covariance_tril"])
        covariance = tril @ tril.mT
        scale = self._spread(sites["mixture_weights"])
        learned = self.options.learn_sample_scale
        scale = scale * (self.param("sample_scale") if learned else self._epsilon)
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

    def of_ranks(self, rows: Tensor) -> dict[str, Tensor]:
        own = self.bank.by_block(self.options.latent, rows)
        if self.options.covariance == "diagonal":
            return {"scale_diag": own}
        row, column = torch.tril_indices(self.layout.rank, self.layout.rank, -1, device=own.device)
        return {"scale_tril": torch.cat([own, own[:, row] | own[:, column]], -1)}

    def _prior_loc(self, gain: Tensor, tril: Tensor, means: FlatFactors) -> Tensor | None:
        """The mean of z in the model, where the noise is seen from M: at a_j = 0, at the start of
        a_j, or at the mean of the earlier posterior."""
        own = self.options.latent
        centre = self.centre(own)
        if self.previous is not None:
            centre = self.bank.latent_part(own, self.previous.bank.means())
        elif self.options.prior_mean == "learned":
            return None
        latent = self.bank.latent_part(own, means)
        if centre is not None:
            latent = latent - centre
        if self.options.component_prior == "hierarchical":
            law = -gain[..., None] * tril
            loc = whiten(law, latent.expand(*gain.shape[:-2], -1), self.layout.groups)
        else:
            loc = self.layout.scale_rows(-1 / gain, latent)
        return loc.unsqueeze(-2) if loc.dim() > 1 else loc  # a plate of draws

    def _weights_prior(self) -> dist.TorchDistribution:
        if self.previous is None:
            return dist.Dirichlet(self._concentration)
        return dist.Dirichlet(self.previous.param("concentration"))

    def _covariance_prior(self) -> WishartCholesky:
        if self.previous is None:
            return WishartCholesky(self._df, scale_diag=self._column_scale())
        law: WishartCholesky = self.previous._covariance()
        return law

    def _noise_prior(self, tril: Tensor, loc: Tensor | None) -> ColumnNormal:
        if self.previous is None:
            return StandardColumns(self._scale, self.layout.groups, loc)
        law: ColumnNormal = self.previous._noise(tril, loc)
        return law

    def _noise(self, tril: Tensor, loc: Tensor | None = None) -> ColumnNormal:
        """The guide's law of z given the factor of Σ; around ``loc``, if there is one."""
        groups = self.layout.groups
        if self.options.component_prior == "isotropic":
            return ColumnNormal(self._widened(tril), groups, loc)
        if self.options.learn_sample_scale:
            return ColumnNormal(self._widened(self._eye), groups, loc)
        return StandardColumns(self._scale, groups, loc)

    def _gain(self, weights: Tensor) -> Tensor:
        """ε₀ ‖π‖ of every row, times its size in those units, (..., L, r)."""
        gain, sizes = (self._epsilon * self._spread(weights))[..., None], self.sizes()
        return gain.expand(*gain.shape[:-1], self.layout.rank) if sizes is None else gain * sizes

    def _spread(self, weights: Tensor) -> Tensor:
        """‖π‖ (or max π): the standard deviation of the mixture at Σ = I, (..., L)."""
        return weights.amax(-1) if self.options.sparse else weights.norm(dim=-1)

    def _covariance(self) -> WishartCholesky:
        """The guide's law of the factor of Σ; V is I where a block of lower rank has no row, and
        where a rank is idle."""
        rows, scale = self._in_use(), self._column_scale()
        if self.options.covariance == "diagonal":
            diagonal = torch.where(rows, self.param("scale_diag"), 1.0)
            return WishartCholesky(self._df, scale_diag=diagonal * scale)
        both = rows.unsqueeze(-1) & rows.unsqueeze(-2)
        tril = torch.where(both, self.param("scale_tril"), self._eye)
        return WishartCholesky(self._df, tril * scale.unsqueeze(-2))

    def _column_scale(self) -> Tensor:
        """(L, r): what the columns of V's factor are multiplied by for E[Σ] = V. 1/√ν; and where
        ranks are idle, row k of the standard Bartlett factor, cut to the c idle ranks before it
        less, has the mean square ν − c."""
        rows = self.bank.rows(self.options.latent)
        if rows is None:
            return self._scale
        return (self.df - (~rows).cumsum(-1) * rows).rsqrt()

    def _in_use(self) -> Tensor:
        """(L, r) booleans: the rows that each block has, less those of idle ranks."""
        rows = self.bank.rows(self.options.latent)
        return self._rows if rows is None else rows

    def _cut(self, tril: Tensor) -> Tensor:
        """The factor of Σ, (..., L, r, r), with the identity's rows and columns for idle ranks:
        their noise then has its prior, and no part in that of the others."""
        rows = self.bank.rows(self.options.latent)
        if rows is None:
            return tril
        return torch.where(rows.unsqueeze(-1) & rows.unsqueeze(-2), tril, self._eye)

    def _widened(self, law: Tensor) -> Tensor:
        """The factor of z's covariance, (..., L, r, r), times ε / ε₀ where ε is learned."""
        if self.options.learn_sample_scale:
            ratio = self.param("sample_scale") / self._epsilon
            law = law * torch.where(self._in_use(), ratio[:, None], 1.0).unsqueeze(-1)
        return law.unsqueeze(-4) if law.dim() > 3 else law  # in a plate: one law a draw

    def _sample_scales(self) -> Tensor:
        """(L,): ε₀ of every block."""
        scale = torch.full((len(self.layout),), self.options.sample_scale)
        if self.options.units == "fan_in":
            scale = scale * self.layout.fan_in().rsqrt()
        return scale

    @torch.no_grad()
    def settle(self, curvature: Curvature, beta: float) -> None:
        """V and α at the optimum of the objective, one given the other."""
        H, squared_scale, sizes = curvature.ranks, self._epsilon.square(), self.sizes()
        if sizes is not None:
            H = sizes[:, :, None] * H * sizes[:, None, :]
        if self.options.covariance == "diagonal":
            H = torch.diag_embed(H.diagonal(dim1=-2, dim2=-1))
        distance = 0.5 * self._squared_distance() / squared_scale
        order, price = self.param("concentration").mean(-1), beta * self._kappa()
        for _ in range(SETTLING):
            noise = squared_scale * self._mixture.squared(order) / price
            V = torch.linalg.inv(self._eye + noise[:, None, None] * H)
            loss = 0.5 * squared_scale * (V * H).sum((-2, -1)) / beta
            order = self._mixture.best(loss + self.options.cooperation, distance)
        self.assign("concentration", order[:, None].expand_as(self._concentration))
        if self.options.covariance == "diagonal":
            self.assign("scale_diag", V.diagonal(dim1=-2, dim2=-1).sqrt())
        else:
            self.assign("scale_tril", torch.linalg.cholesky(V))

    @cached_property
    def _mixture(self) -> SymmetricMixture:
        options = self.options
        return SymmetricMixture(options.num_components, options.concentration, options.sparse)

    def _kappa(self) -> Tensor:
        """(L,): what ½ (tr V − log|V|) counts for in the KL: ν for Σ, and once a column for z."""
        kappa = self._epsilon.new_full((len(self.layout),), self.df)
        if self.options.component_prior == "isotropic":
            columns = [float(block.columns) for block in self.layout.blocks]
            kappa = kappa + kappa.new_tensor(columns)
        return kappa

    def _squared_distance(self) -> Tensor:
        """(L,): ‖M − M₀‖² of every block, where the prior has a mean of its own."""
        means = self.bank.latent_part(self.options.latent, self.bank.means())
        if self.options.prior_mean == "learned":
            return torch.zeros_like(self._epsilon)
        centre = self.centre(self.options.latent)
        parts = split_blocks(means if centre is None else means - centre, self.layout.groups)
        return torch.cat([part.square().sum((-2, -1)) for part in parts])

    def _signal(self) -> Tensor:
        """(L, r): the root mean square of each row of the means; 0 for rows that do not exist, or
        are idle."""
        means = self.bank.latent_part(self.options.latent, self.bank.means()).detach()
        return torch.where(self._in_use(), self.layout.row_sizes(means), 0.0)

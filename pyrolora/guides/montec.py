"""MonteCLoRA: Dirichlet mixture weights, Wishart covariance, Gaussian low-rank factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pyrolora import defaults
from pyrolora.adapters import AdapterBank
from pyrolora.checks import positive, true_or_false, whole_number
from pyrolora.errors import ConfigError
from pyrolora.guides.engines import Fit
from pyrolora.guides.montec_program import MonteCLoRAProgram
from pyrolora.guides.options import Latent, PriorMean, Units, Variational, require, unit_of
from pyrolora.guides.supports import Supports

ComponentPrior = Literal["isotropic", "hierarchical"]
Covariance = Literal["diagonal", "full"]


@dataclass(frozen=True, kw_only=True)
class MonteCLoRA(Variational):
    r"""The posterior of MonteCLoRA over the adapter factors.

    For every adapted layer, with columns a_j of A (r-vectors), mean columns m_j and scale ε:

        π ~ Dirichlet(α₀ 1_N)                 mixture weights
        Σ = L Lᵀ ~ Wishart(ν, I / ν)          covariance, E[Σ] = I
        δ_jk | Σ ~ N(0, Σ), k = 1..N          components
        a_j = m_j + ε Σ_k π_k δ_jk            adapter, E[a_j] = m_j

    and in the guide π ~ Dirichlet(α), Σ ~ Wishart(ν, V / ν), with α and V learned. Given π and Σ
    the mixture of a column is one Gaussian, N(0, ‖π‖₂² Σ), which is drawn. The site
    ``noise``, z, has prior N(0, I) in both forms of the component prior:

    - ``"hierarchical"``, the model above, non-centred: a_j = m_j + ε₀ ‖π‖ L z_j with
      z_j ~ N(0, (ε/ε₀)² I) in the guide. The KL of z is zero when ε is fixed.
    - ``"isotropic"``, the paper's objective: the model has δ_jk ~ N(0, I) and keeps Σ under its
      Wishart prior, connected to nothing; a_j = m_j + ε₀ ‖π‖ z_j with z_j ~ N(0, (ε/ε₀)² Σ) in the
      guide. The KL of z is KL(N(0, (ε/ε₀)² Σ) ‖ N(0, I)), once per column.

    The means M, B and the task head are parameters that model and guide share. With
    ``prior_mean="zero"`` the model's M is zero instead, a_j = ε₀ Σ_k π_k δ_jk, the guide's as
    above: the KL of z then prices the means, too, by ½ ‖S⁻¹ m_j‖² per column, with S = ε₀ ‖π‖ I, or
    ε₀ ‖π‖ L in the hierarchical form. With ``"start"`` the start of A, a⁰, takes the place of
    zero, a_j = a⁰_j + ε₀ Σ_k π_k δ_jk, and the price is that of m_j − a⁰_j, which is learnt. (Where
    the adapters have a start A₀, B₀ that is subtracted again, zero stands for that start, too.)

    Given the generalised Gauss-Newton matrix of −log p(y|A), whose blocks of the columns of a layer
    sum to H = Σ_j H_jj, (r, r), the optimum of V is a closed form, and that of ‖π‖ a search in one
    number per layer, over symmetric α:

        V = [ I + ε₀² E‖π‖² H / (β κ) ]⁻¹,    κ = c + ν (isotropic),  κ = ν (hierarchical)

    for c columns: fewer data give a wider V, and no data V = I. With ``covariance="diagonal"`` it
    is the optimum for the diagonal of H.

    Where ranks move between layers, Σ and V are cut to a layer's active ranks. The Σ of these has
    the mean above, and is no Wishart once idle ranks lie between them.

    After an earlier posterior (``fit(..., prior=)``) the model is the guide of that posterior: its
    Dirichlet, its Wishart, and its noise around its M, which no longer moves. Given Σ the law of z
    then differs from the guide's in its mean, and in ε where that is learned.

    By default a tenth of the training examples is held back, if that is ten or more, but at most
    250: these choose one number c, by which ε is multiplied in all layers, and a temperature. The
    options from ``kl_weight`` to ``hold_back`` are those of `Variational`, which has this rule.

    Parameters
    ----------
    num_components
        N.
    sample_scale
        ε₀, the scale of the noise in the model; in the ``units``.
    units
        ``"row"``: ε₀ is a multiple of d_k, the root mean square of row k of M, so that
        a_j = m_j + ε D Σ_k π_k δ_jk with D = diag(d): the noise is relative to what is learnt, and
        no other size of A and B with the same B A escapes it. (Where the adapters have a start that
        is taken off again, d is that of M less the start.) For the learned prior mean; after an
        earlier posterior D is that one's. ``"fan_in"``: ε₀ is a multiple of 1/√in for A and of 1/√r
        for B, so that the noise of A x, or of B A x, is the same at every width and rank.
        ``"one"``: it is absolute (paper). None: ``"row"`` with the learned prior mean, else
        ``"fan_in"``.
    learn_sample_scale
        Learn the guide's ε, one per layer, from ε₀ on; its price is the KL of z.
    component_prior
        ``"isotropic"`` or ``"hierarchical"``.
    covariance
        V ``"diagonal"`` (the paper's) or ``"full"``.
    prior_mean
        ``"learned"`` (the paper's: the prior is centred where the guide is, M costs nothing),
        ``"start"`` (it is centred where A starts, or on the adapter of a post-hoc fit), or
        ``"zero"``.
    df_per_rank
        ν / r >= 1, with r the highest rank that a layer has or, where ranks move, can have. For the
        hierarchical form around zero or the start, and after an earlier posterior, ν > r + 1:
        below, E[Σ⁻¹] and with it the KL is infinite.
    concentration
        α₀.
    init_covariance
        Start of V as a multiple of I: trained scales take many steps from a small one; by
        curvature it is where the first estimate is made.
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

    num_components: int = defaults.NUM_COMPONENTS
    sample_scale: float = defaults.SAMPLE_SCALE
    units: Units | None = None
    learn_sample_scale: bool = False
    component_prior: ComponentPrior = "isotropic"
    covariance: Covariance = "diagonal"
    prior_mean: PriorMean = defaults.PRIOR_MEAN
    df_per_rank: float = defaults.DF_PER_RANK
    concentration: float = defaults.CONCENTRATION
    init_covariance: float = defaults.INIT_COVARIANCE
    cooperation: float = 0.0
    latent: Latent = "A"
    sparse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("num_components", self.num_components, at_least=1)
        for name in ("sample_scale", "df_per_rank", "concentration", "init_covariance"):
            positive(name, getattr(self, name))
        positive("cooperation", self.cooperation, or_zero=True)
        require(self.df_per_rank >= 1, "df_per_rank", ">= 1", self.df_per_rank)
        for name in ("learn_sample_scale", "sparse"):
            true_or_false(name, getattr(self, name))
        unit_of(self.units, self.prior_mean)

    @property
    def unit(self) -> Units:
        return unit_of(self.units, self.prior_mean)

    @property
    def closed_scales(self) -> bool:
        # Neither a learned ε has a closed optimum, nor V where the KL of the means has V⁻¹ in it.
        inverse = self.component_prior == "hierarchical" and self.prior_mean != "learned"
        return not (self.learn_sample_scale or inverse)

    @property
    def supports(self) -> Supports:
        return Supports(
            rank_allocation=True,
            prior=True,
            post_hoc=self.post_hoc_scales,
            closed_scales=self.closed_scales,
            independent_layers=True,
            distinct_prior=True,
            gaussian_head=True,
        )

    @classmethod
    def paper(cls, **changes: Any) -> MonteCLoRA:
        """Return the setting of the paper, with ``changes`` to it.

        Isotropic, diagonal, ν = r, N = 4, ε = 5e-3, and 1e-5 times the KL against the mean loss.
        """
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

"""NUTS: Markov chains on another guide's model, the gold standard for small adapters."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor
from torch.distributions import constraints

from pyrolora import defaults
from pyrolora.adapters import AdapterBank, FlatFactors, LayerSpec
from pyrolora.adapters.config import AdapterConfig
from pyrolora.checks import share, whole_number
from pyrolora.errors import ConfigError
from pyrolora.guides.engines import Fit
from pyrolora.guides.map import MAP
from pyrolora.guides.meanfield import MeanField
from pyrolora.guides.options import Guide, Variational, check_inner_head
from pyrolora.guides.program import Program, picked
from pyrolora.guides.supports import Supports
from pyrolora.guides.wrapping import WrappingProgram, innermost

HIGH_R_HAT = 1.05
"""Above it chains do not agree."""


def _inner() -> MeanField:
    return MeanField(prior_scale=0.2, prior_mean="zero", units="one")


@dataclass(frozen=True, kw_only=True)
class NUTS(Guide):
    """Pyro's No-U-Turn sampler on the model of another guide, given M, B and the task head.

    The parameters that model and guide share come from a MAP fit, or from the posterior that is
    passed to ``fit``. Given these, the latent variables θ of ``inner`` are sampled from

        p(θ | y) ∝ p(θ) p(y | θ)^{1/β},   β the ``kl_weight`` of ``inner``,

    over all training examples at once, without dropout: exact up to Monte Carlo error, and
    affordable for small adapters and data only. Chains run one after the other, each from a draw
    of the prior.

    The history gets the highest split R-hat and the lowest effective sample size over layers of
    ‖s B A‖, which no rotation of the ranks changes, and the number of divergences.

    Parameters
    ----------
    inner
        The guide whose model is sampled, one whose prior has a width: `MeanField`, `LowRank`,
        `MonteCLoRA`, or `MAP` with a ``prior_scale``. By default `MeanField` with the prior
        N(0, 0.2²), in absolute units. Options of its guide alone and of its training, such as
        ``init_scale``, make no difference. Of noise that is relative to the rows the width c is
        that of the posterior that is passed to ``fit``, so that the prior is the one of that fit
        (but of one after an earlier posterior it is that of the options, and a warning says so);
        else, and with ``hold_back=0``, it is 1. NUTS holds no examples back to choose it by: a
        ``hold_back`` above 0 is refused.
    chains, num_samples, warmup_steps
        Number of chains, and per chain the steps that are kept and those for adaptation.
    target_accept_prob, max_tree_depth
        As in ``pyro.infer.NUTS``.

    References
    ----------
    M. D. Hoffman and A. Gelman (2014), "The No-U-Turn Sampler", JMLR 15.
    """

    name = "nuts"

    inner: Guide = dataclasses.field(default_factory=_inner)
    chains: int = defaults.CHAINS
    num_samples: int = defaults.NUTS_DRAWS
    warmup_steps: int = defaults.NUTS_WARMUP
    target_accept_prob: float = 0.8
    max_tree_depth: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("chains", "warmup_steps", "max_tree_depth"):
            whole_number(name, getattr(self, name), at_least=1)
        whole_number("num_samples", self.num_samples, at_least=4)  # R-hat halves each chain
        share("target_accept_prob", self.target_accept_prob, "(0, 1)")
        inner = self.inner
        if not isinstance(inner, Variational) or getattr(inner, "prior_scale", 0) is None:
            raise ConfigError(
                "inner must be a guide whose model has a prior with width: MeanField(...), "
                f"MonteCLoRA(...) or MAP(prior_scale=...), got {inner!r}"
            )
        if isinstance(inner, MAP) and inner.latent != "AB":
            raise ConfigError(
                f"in the model of MAP(latent={inner.latent!r}) the other factor is a point mass, "
                f"where NUTS cannot move; MeanField(latent={inner.latent!r}) has it as a constant"
            )
        check_inner_head(inner, "a guide that is not sampled, whose head can be Gaussian")
        if inner.hold_back:
            raise ConfigError(
                f"hold_back={inner.hold_back!r} of the inner {inner.name!r} chooses the width of "
                "the noise in training, and NUTS trains no noise; leave it out, and the width is "
                "that of the posterior that is passed to fit, or choose hold_back=0 for the width 1"
            )

    @property
    def supports(self) -> Supports:
        return Supports(
            rank_allocation=True,
            post_hoc="computed",
            stored_draws=True,
            independent_layers=self.inner.supports.independent_layers,
            distinct_prior=True,
            all_examples=True,
        )

    def build(self, bank: AdapterBank) -> NUTSProgram:
        return NUTSProgram(bank, self)

    def shapes(
        self, specs: Sequence[LayerSpec], config: AdapterConfig
    ) -> dict[str, tuple[int, ...]]:
        # The shapes of the sites follow from a draw, which needs a real program of the inner guide.
        few = dataclasses.replace(self, chains=1, num_samples=4)
        program = few.build(AdapterBank(specs, config))
        shapes = {name: tuple(t.shape) for name, t in program.state_dict().items()}
        size = self.chains * self.num_samples
        return shapes | {n: (size, *shapes[n][1:]) for n in ("diverging", *program.sites)}

    def infer(self, fit: Fit) -> None:
        fit.joint.adopt(fit.point(MAP()))
        fit.joint.freeze()
        beta = self.inner.beta(fit.joint.num_examples)
        draws, diverging = fit.mcmc(
            beta,
            chains=self.chains,
            num_samples=self.num_samples,
            warmup_steps=self.warmup_steps,
            target_accept_prob=self.target_accept_prob,
            max_tree_depth=self.max_tree_depth,
        )
        fit.program.store(draws, diverging)
        fit.log(**fit.program.diagnostics(), divergences=int(diverging.sum()), kl_weight=beta)


class NUTSProgram(WrappingProgram):
    """A program with the sites of the inner one; the draws are buffers, chain after chain.

    They are empty until `store`, which stands for zeros: the training needs none.
    """

    options: NUTS
    diverging: Tensor

    def __init__(self, bank: AdapterBank, options: NUTS) -> None:
        super().__init__(options.inner.build(bank))
        self.options = options
        with poutine.block(), torch.no_grad():
            sites = self.inner.draw(1)
        self.sites = list(sites)
        size = options.chains * options.num_samples
        self.register_buffer("diverging", torch.zeros(size))
        self.confine("diverging", constraints.boolean)
        for name, value in sites.items():
            self.register_buffer(name, torch.zeros(0, *value.shape[1:]))
            self.confine(name, self.inner.site_supports.get(name, constraints.real))

    @torch.no_grad()
    def reserve(self) -> None:
        super().reserve()
        for name in self.sites:
            value = self.get_buffer(name)
            setattr(self, name, value.new_zeros(self.stored(), *value.shape[1:]))

    @property
    def chains(self) -> int:  # type: ignore[override]
        return self.options.chains

    def guide(self, kl_weight: float = 1.0) -> None:
        """Sample one of the draws, whose number is the auxiliary site ``draw``."""
        self.sample_stored()

    @torch.no_grad()
    def adopt(self, other: Program) -> None:
        """Take the means of ``other``, and the width of its noise where the inner one has one."""
        super().adopt(other)
        width, chosen = (getattr(innermost(p), "width", None) for p in (self, other))
        if width is not None and chosen is not None:
            width.copy_(chosen)

    def mean(self) -> FlatFactors:
        """Return the mean of the update over draws: of the one factor that varies, or pooled."""
        first = self.factors(self.pick(torch.zeros(1, dtype=torch.long)))
        if not len(self.get_buffer(self.sites[0])):
            return first[0]
        if first.A.dim() > 1 and first.B.dim() > 1:
            drawn = self.factors(self.pick(torch.arange(self.stored())))
            return dataclasses.replace(drawn, pooled=True)
        parts = [
            tuple(t.mean(0) * (len(t) / self.stored()) if t.dim() > 1 else t for t in (d.A, d.B))
            for d in self._pieces()
        ]
        A, B = (
            sum((part[i] for part in parts[1:]), parts[0][i]) if drawn.dim() > 1 else drawn
            for i, drawn in enumerate((first.A, first.B))
        )
        return FlatFactors(A, B)

    def variances(self) -> None:
        """Return None: the inner guide has those of the prior."""

    def scale_parameters(self) -> list[str]:
        return []

    def stored(self) -> int:
        return self.options.chains * self.options.num_samples

    def pick(self, index: Tensor) -> dict[str, Tensor]:
        return {name: picked(self.get_buffer(name), index) for name in self.sites}

    def statistics(self, index: Tensor) -> dict[str, Tensor]:
        return {"diverging": self.diverging[index.to(self.diverging.device)].bool()}

    @torch.no_grad()
    def store(self, draws: dict[str, Tensor], diverging: Tensor) -> None:
        """Keep the draws, site -> (chains, num_samples, ...), and which steps diverged."""
        self.diverging.copy_(diverging.flatten())
        for name in self.sites:
            setattr(self, name, draws[name].flatten(0, 1).to(self.get_buffer(name)))

    def _pieces(self) -> Iterator[FlatFactors]:
        """Yield the factors of all draws, some at a time."""
        for index in torch.arange(self.stored()).split(self.bank.draws_at_once):
            yield self.factors(self.pick(index))

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Return R-hat and the effective sample size of ‖s B A‖, for the worst layer."""
        norms = torch.cat([self.bank.update_norms(drawn) for drawn in self._pieces()])
        chains = norms.unflatten(0, (self.chains, -1))
        numbers: dict[str, Any] = {
            "r_hat": split_gelman_rubin(chains, 0, 1).max().item(),
            "effective_sample_size": effective_sample_size(chains, 0, 1).min().item(),
        }
        if not numbers["r_hat"] < HIGH_R_HAT:
            warnings.warn(
                f"the chains of NUTS do not agree: R-hat of the adapter norms is "
                f"{numbers['r_hat']:.2f}, above {HIGH_R_HAT}; take more warmup_steps and "
                "num_samples, or a smaller adapter",
                RuntimeWarning,
                stacklevel=2,
            )
        return numbers

"""What every guide is: options, how they are inferred, and the program that they build over a bank.

The parts of a guide's file, in this order: the options (a frozen dataclass that states the
mathematics), ``build``, ``infer`` where it is not SVI, and the program with ``__init__`` (its
parameters), ``model``, ``guide``, ``factors`` and ``quantities``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pyrolora import defaults
from pyrolora.adapters import AdapterBank, FlatFactors, LayerSpec
from pyrolora.adapters.config import AdapterConfig
from pyrolora.checks import positive, share, whole_number
from pyrolora.errors import ConfigError
from pyrolora.parameters import ParamModule
from pyrolora.seeding import DRAWING

LATENTS = ("A", "B", "AB")
AGAINST = ("sum", "mean")
SCALE_UPDATES = ("curvature", "gradient")
PRIOR_MEANS = ("learned", "start", "zero")
UNITS = ("row", "fan_in", "one")

Sites = Mapping[str, Tensor]
"""Site name -> value, or -> draws with one leading dimension."""

Quantities = Mapping[str, tuple[Tensor, tuple[str, ...]]]
"""Name -> (S, ...) and the names of the dimensions after the first."""


@dataclass(frozen=True)
class Curvature:
    """The generalised Gauss-Newton matrix of −log p(y | A, B), over all n training examples: its
    diagonal, and what of it a block's ranks share. In a block X (r, c) with Jacobians G of shape
    (r, c), one for each example and output, ``entries`` is Σ G² and ``ranks`` is Σ G Gᵀ.

    Attributes
    ----------
    entries
        (total,), as ``bank.layout(latent)`` lies.
    ranks
        (L, r, r); zero where a block has fewer ranks.
    """

    entries: Tensor
    ranks: Tensor


class Law(Protocol):
    """What `Guide.check` reads of a likelihood."""

    name: ClassVar[str]
    linearisable: ClassVar[bool]


class Fit(Protocol):
    """What `Guide.infer` works with: the joint model, its data, and engines that guides share."""

    @property
    def joint(self) -> Any:
        """The joint model that is inferred."""

    @property
    def program(self) -> Any:
        """The guide's own program in it."""

    def svi(self, *, final: bool = True) -> None:
        """Train the pair of `joint`; with ``final`` what it leaves is the result."""

    def point(self, guide: Guide, number: int | None = None) -> Any:
        """A joint model of its own with ``guide``, a point mass, trained from its own start (of
        that number, with its own seed, where there are several); with frozen means as they are."""

    @property
    def can_validate(self) -> bool:
        """Whether there is evaluation data."""

    def held_out_nll(self) -> float:
        """The negative log-likelihood of the evaluation data under `joint`."""

    def loss(self, factors: FlatFactors, *, held_out: bool = False) -> float:
        """−log p of an observation, in nats, of the training (or evaluation) data: a mean over them
        and over the draws of ``factors``."""

    def kfac(self) -> Mapping[str, Any]:
        """The Kronecker factors of the curvature at the means of `joint`, by block."""

    def check_dual(self) -> None:
        """Raise `DataError` for more examples than `dual` takes."""

    def dual(self, centre: Tensor, latent: str, draws: int) -> Any:
        """The posterior of all latent factors in the linearised model at the means of `joint`, with
        ``centre`` for the prior's mean: ``best_precision()``, ``deviations(λ)`` (draws, P)."""

    def best_precision(self, eigenvalues: list[Tensor], means: list[Tensor]) -> float:
        """The prior's precision of the highest marginal likelihood."""

    def mcmc(self, beta: float, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Site -> (chains, draws, ...) of NUTS on `joint`, and (chains, draws) booleans: which
        steps diverged."""

    def log(self, **numbers: float) -> None:
        """Add an entry to the history."""


@dataclass(frozen=True, kw_only=True)
class Guide(ABC):
    """Options of a method."""

    name: ClassVar[str]
    adapts: ClassVar[bool] = True
    """Whether the network gets adapters; without, its own weights are trained."""

    @abstractmethod
    def build(self, bank: AdapterBank) -> Program:
        """The model/guide pair over the factors of ``bank``."""

    def shapes(
        self, specs: Sequence[LayerSpec], config: AdapterConfig
    ) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every stored tensor of the program that `build` makes of these layers,
        without making one."""
        with torch.device("meta"):
            state = self.build(AdapterBank(specs, config)).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    def infer(self, fit: Fit) -> None:
        """Infer the posterior of ``fit.joint``; by stochastic variational inference."""
        fit.svi()

    def beta(self, num_examples: int, progress: float = 1.0) -> float:
        """The weight of the KL at ``progress`` (0..1) through the training steps."""
        return 1.0

    def scale_rate(self, learning_rate: float, steps: int, num_examples: int) -> float:
        """The learning rate of scales, of the posterior and of the noise of a regression, in a fit
        of so many steps with that of the means."""
        highest = defaults.SCALE_LEARNING_RATE
        if self.beta(num_examples) < 1:
            highest *= min(1.0, defaults.SCALE_STEPS / steps) ** 0.5
        return min(highest, defaults.SCALE_RATE * learning_rate)

    @property
    def settles(self) -> bool:
        """Whether the scales of the posterior are put where the curvature of the loss has their
        optimum (`Program.settle`), rather than trained."""
        return False

    def rate_held_from(self) -> float:
        """The share of the training steps after which the learning rate stays what it is."""
        return 1.0

    def post_hoc(self) -> str | None:
        """How it infers a posterior whose means are given: ``"trained"`` (SVI of the scales),
        ``"computed"`` (without SVI), or None: it cannot."""
        return "trained"

    def takes_prior(self) -> bool:
        """Whether the guide of an earlier fit may be its prior."""
        return False

    def check(self, task: Law) -> None:  # noqa: B027 - most have nothing to refuse
        """Raise `ConfigError` for a likelihood that this method cannot serve."""


@dataclass(frozen=True, kw_only=True)
class Variational(Guide):
    """Options of a method that minimises −log-likelihood + β · KL.

    Parameters
    ----------
    kl_weight, kl_weight_against
        β. 1 is the ELBO; below 1 the posterior is colder. Against ``"sum"`` β is ``kl_weight``;
        against ``"mean"``, the mean of the log-likelihood over the n training examples,
        β = n · ``kl_weight``.
    kl_warmup
        Share of the training steps over which the weight rises linearly from 0 to β.
    draws_per_batch
        G: the examples of a training batch fall into G equal groups, each with a draw of its own
        (the largest divisor of the batch size up to G). The same expected gradient; of its
        variance the part that all examples share falls as 1/G. 1 is one draw a batch.
    scale_updates
        How the scales of the posterior find the optimum of the objective. ``"curvature"``: they are
        put there, before steps 0, 1, 2, 4, ... and at the end, given the generalised Gauss-Newton
        matrix H of −log p(y|θ), expected under the posterior as it is: for θ_i ~ N(m_i, σ_i²) and
        the prior N(m_i0, σ₀²) that is σ_i² = β / (H_ii + β / σ₀²). Nothing of it depends on a
        learning rate, or on the number of steps. ``"gradient"``: they are trained as the means are.
    scale_learning_rate
        Learning rate of the scales of the posterior, where they are trained, and of the noise of a
        regression; the means take the fit's ``learning_rate``. None: ten times that, so that noise
        does not grow before the means have learnt, but no more than 1e-2, or, where β < 1, than
        1e-2 √(256 / T) in a fit of T > 256 steps: the noise of a cold posterior outgrows what is
        learnt. At β = 1 the optimum is what is asked for, and near it the better the sooner.
    """

    guide_only: ClassVar[tuple[str, ...]] = (
        "kl_warmup",
        "draws_per_batch",
        "scale_learning_rate",
        "scale_updates",
    )
    """Options that do not change the model."""

    kl_weight: float = 1.0
    kl_weight_against: str = "sum"
    kl_warmup: float = 0.0
    draws_per_batch: int = 1
    scale_learning_rate: float | None = None
    scale_updates: str = "gradient"

    has_closed_scales: ClassVar[bool] = False
    """Whether a program of this guide can `Program.settle`."""

    def __post_init__(self) -> None:
        positive("kl_weight", self.kl_weight)
        against = self.kl_weight_against
        require(against in AGAINST, "kl_weight_against", f"one of {AGAINST}", against)
        share("kl_warmup", self.kl_warmup, "[0, 1]")
        whole_number("draws_per_batch", self.draws_per_batch, at_least=1)
        if self.scale_learning_rate is not None:
            positive("scale_learning_rate", self.scale_learning_rate)
        updates = self.scale_updates
        require(updates in SCALE_UPDATES, "scale_updates", f"one of {SCALE_UPDATES}", updates)
        if self.scale_updates == "curvature" and not self.has_closed_scales:
            raise ConfigError(
                f"the scales of {self.name!r} with these options have no closed optimum; leave "
                "scale_updates out, or choose scale_updates='gradient'"
            )

    @property
    def settles(self) -> bool:
        return self.scale_updates == "curvature"

    def post_hoc(self) -> str | None:
        return "computed" if self.settles else "trained"

    def infer(self, fit: Fit) -> None:
        if self.settles and fit.program.previous is not None:
            raise ConfigError(
                "scale_updates='curvature' has no closed optimum after an earlier posterior; "
                "choose scale_updates='gradient' for the fit with prior="
            )
        super().infer(fit)

    def scale_rate(self, learning_rate: float, steps: int, num_examples: int) -> float:
        return self.scale_learning_rate or super().scale_rate(learning_rate, steps, num_examples)

    def beta(self, num_examples: int, progress: float = 1.0) -> float:
        factor = num_examples if self.kl_weight_against == "mean" else 1
        rise = min(1.0, progress / self.kl_warmup) if self.kl_warmup else 1.0
        return self.kl_weight * factor * rise


def check_units(units: str, latent: str, prior_mean: str) -> None:
    """Raise `ConfigError` for units that there are not, or not for these factors."""
    require(units in UNITS, "units", f"one of {UNITS}", units)
    if units == "row" and (latent != "A" or prior_mean != "learned"):
        raise ConfigError(
            "units='row' takes the size of a row of A from its mean, which therefore has no price: "
            f"it goes with latent='A' and prior_mean='learned', got latent={latent!r} and "
            f"prior_mean={prior_mean!r}; choose units='fan_in' for those"
        )


def require(condition: bool, name: str, expected: str, received: object) -> None:
    """Raise `ConfigError` for an option outside its range."""
    if not condition:
        raise ConfigError(f"{name} must be {expected}, got {received!r}")


class Program(ParamModule, ABC):
    """The latent part of a Pyro model/guide pair: the sites of the adapters and their parameters.

    ``model`` and ``guide`` run once a call of the joint model, before the network, whatever the
    number of layers. Inside an outer plate at dimension -2 they give draws: all values get one
    leading dimension S, and so do the factors.

    Parameters
    ----------
    bank
        The adapter means, shared by model and guide.
    options
        The guide's.

    Attributes
    ----------
    progress
        0..1: how far the training is; 1 outside of it.
    draws_per_batch
        Into how many groups with a draw of their own a training batch falls, at most.
    members
        How many copies of the task heads draws choose from.
    chains
        Of how many chains the stored draws are.
    linearised
        Whether predictions are linear in the draws, around the mean adapter.
    layers_independent
        Whether the guide's draws of one layer say nothing of another.
    has_prior
        Whether the model's law of the latent sites is another than the guide's.
    previous
        The program of an earlier posterior, whose guide is the prior here; None: the options' own.
    """

    supports: ClassVar[Mapping[str, constraints.Constraint]] = {}
    """Site -> what its values can be, where that is not every number."""

    options: Any
    previous: Any
    prior_loc: Tensor | None
    row_sizes: Tensor | None
    progress: float = 1.0
    draws_per_batch: int = 1
    members: int = 1
    chains: int = 1
    linearised: bool = False
    layers_independent: bool = True
    has_prior: bool = True

    def __init__(self, bank: AdapterBank, options: Guide) -> None:
        super().__init__()
        self.bank = bank
        self.options = options
        self.register_module("previous", None)
        self.register_buffer("prior_loc", None)
        self.register_buffer("row_sizes", None)
        if isinstance(options, Variational):
            self.draws_per_batch = options.draws_per_batch

    def keep_start(self, latent: str, prior_mean: str) -> None:
        """Keep the means of the latent factors as they are for those of the prior; where the bank
        has an origin, that is the one."""
        kept = prior_mean == "start" and self.bank.origin is None
        A, B = (self.bank.get_parameter(f"{factor}_loc").detach() for factor in "AB")
        means = FlatFactors(A, B)
        value = self.bank.latent_part(latent, means).clone() if kept else None
        self.register_buffer("prior_loc", value)

    def sizes(self) -> Tensor | None:
        """(L, r): the root mean square of each row of the latent means, where scales are multiples
        of it; after an earlier posterior that of its means."""
        if getattr(self.options, "units", None) != "row":
            return None
        if self.row_sizes is not None:
            return self.row_sizes
        means = self.bank.latent_part(self.options.latent, self.bank.means())
        return self.bank.layout(self.options.latent).row_sizes(means)

    def centre(self, site: str) -> Tensor | None:
        """The prior's mean of the factors of a site, flat; None: zero."""
        if self.bank.origin is not None:
            return self.bank.latent_part(site, self.bank.origin)
        if self.prior_loc is None or site == self.options.latent:
            return self.prior_loc
        first = self.bank.layouts["A"].total
        return self.prior_loc[:first] if site == "A" else self.prior_loc[first:]

    @torch.no_grad()
    def recentre(self) -> None:
        """Have the prior, where it is around the start, around the means as they are: given ones
        came."""
        if self.prior_loc is not None:
            means = self.bank.latent_part(self.options.latent, self.bank.means())
            self.prior_loc.copy_(means.detach())

    @abstractmethod
    def model(self, kl_weight: float = 1.0) -> FlatFactors:
        """Sample the prior and return the factors."""

    @abstractmethod
    def guide(self, kl_weight: float = 1.0) -> None:
        """Sample the variational posterior: the same sites in the same order."""

    @abstractmethod
    def factors(self, sites: Sites) -> FlatFactors:
        """The factors that the values of the sites determine."""

    @abstractmethod
    def quantities(self, sites: Sites) -> Quantities:
        """Low-dimensional functions of draws that are worth looking at."""

    def mean(self) -> FlatFactors:
        """The mean adapter."""
        return self.bank.means()

    def block_names(self) -> list[str]:
        """Labels of the dimension ``block`` in `quantities`, if it is used."""
        return []

    def scale_parameters(self) -> list[str]:
        """Names of the parameters that are scales of the posterior, not means."""
        return [name for name, _ in self.named_parameters(recurse=False)]

    @property
    def settles(self) -> bool:
        """Whether `settle` finds the scales; an earlier posterior has no such options."""
        return self.previous is None and self.options.settles

    def hold_scales(self) -> None:
        """Make constants of the scales that `settle` finds: the optimiser leaves them alone."""
        if self.settles:
            for name in self.scale_parameters():
                self.get_parameter(name).requires_grad_(False)

    def settle(self, curvature: Curvature, beta: float) -> None:
        """Put the scales of the guide where the objective has its optimum, given the means."""
        raise NotImplementedError(f"{type(self).__name__} has no closed optimum")

    def groups(self, batch_size: int) -> int:
        """Into how many equal groups, each with a draw of its own, a training batch falls."""
        most = min(self.draws_per_batch, batch_size) if self.training else 1
        return next(count for count in range(most, 0, -1) if batch_size % count == 0)

    def side_by_side(self) -> int:
        """How many members are trained on the same batch."""
        return 1

    def of_ranks(self, rows: Tensor) -> dict[str, Tensor]:
        """Own parameter -> booleans that broadcast to it: its entries that belong to the ranks of
        ``rows``, (L, r_max)."""
        return {}

    @torch.no_grad()
    def renew(self, rows: Tensor) -> dict[str, Tensor]:
        """Have what belongs to the ranks of ``rows``, (L, r_max), as it is at a start: others came
        in their place.

        Returns
        -------
        dict
            Own parameter -> booleans of its shape: the entries that are new.
        """
        fresh, found = self.options.build(self.bank), {}
        for name, entries in self.of_ranks(rows.to(self.bank.mask().device)).items():
            parameter, start = self.get_parameter(name), fresh.get_parameter(name)
            found[name] = entries.expand_as(parameter)
            parameter.copy_(torch.where(entries, start.to(parameter), parameter))
        if self.prior_loc is not None:
            latent = self.options.latent
            means = self.bank.latent_part(latent, self.bank.means())
            new = self.bank.spread(latent, rows.to(means.device))
            self.prior_loc.copy_(torch.where(new, means, self.prior_loc))
        return found

    @torch.no_grad()
    def succeed(self, previous: Any) -> None:
        """Take the guide of ``previous``, a program of the same kind, for the prior, and start from
        it: what it had as its means and scales. What has no prior, a factor that is not latent,
        becomes a constant."""
        for name, parameter in previous.named_parameters(recurse=False):
            self.get_parameter(name).copy_(parameter)
        for factor in "AB":
            latent = factor in self.options.latent
            self.bank.get_parameter(f"{factor}_loc").requires_grad_(latent)
        for name in self.scale_parameters():
            self.get_parameter(name).requires_grad_(True)
        self.previous = copy.deepcopy(previous).requires_grad_(False)
        self.previous.previous = None
        sizes = previous.sizes()
        for program in (self, self.previous):  # whose own means may have moved from there
            program.register_buffer("row_sizes", None if sizes is None else sizes.detach().clone())

    def await_prior(self, options: Guide) -> None:
        """`succeed` a program of these options whose tensors are yet to be loaded."""
        bank = AdapterBank(list(self.bank.specs.values()), self.bank.config)
        self.succeed(options.build(bank))

    def after_step(self, step: int, steps: int) -> None:
        """Called after each of the ``steps`` steps of the optimiser, counted from 1."""

    def usual_draws(self, otherwise: int = defaults.NUM_SAMPLES) -> int:
        """How many draws are taken unless it is told: of an ensemble, every member once."""
        return self.members if self.members > 1 else otherwise

    def stored(self) -> int | None:
        """How many draws there are, where they are a list; None where they are drawn anew."""
        return None

    def pick(self, index: Tensor) -> dict[str, Tensor]:
        """Site -> the stored draws of these numbers; of programs whose draws are `stored`."""
        raise NotImplementedError(f"{type(self).__name__} draws anew")

    def sample_stored(self, guide: str) -> None:
        """Sample one of the stored draws, whose number is the auxiliary site ``draw``; ``guide`` is
        whose program this is."""
        stored = self.stored()
        assert stored is not None
        device = self.bank.get_parameter("A_loc").device
        law = dist.Categorical(torch.ones(stored, device=device))
        number = pyro.sample("draw", law, infer={"is_auxiliary": True})
        if number.dim():
            raise ConfigError(
                f"the stored draws of {guide!r} come one at a time, not in a plate; use "
                "posterior.sample(n), or Predictive(..., parallel=False)"
            )
        for name, value in self.pick(number).items():
            pyro.sample(name, dist.Delta(value, event_dim=value.dim()))

    def statistics(self, index: Tensor) -> dict[str, Tensor]:
        """What the sampler says of the stored draws of these numbers, by ArviZ's names."""
        return {}

    def draw(self, num_samples: int) -> dict[str, Tensor]:
        """Site -> (num_samples, *event): independent draws from the guide, or stored ones, evenly
        spaced; each several times, one after the other, where there are fewer."""
        return next(self.draws(num_samples, num_samples))

    @torch.no_grad()
    def draws(self, num_samples: int, at_once: int) -> Iterator[dict[str, Tensor]]:
        """`draw` in pieces of at most ``at_once`` draws."""
        stored = self.stored()
        if stored is not None:
            yield from map(self.pick, spread(stored, num_samples).split(at_once))
            return
        for start in range(0, num_samples, at_once):
            yield self._sampled(min(at_once, num_samples - start))

    def _sampled(self, num_samples: int) -> dict[str, Tensor]:
        with (
            DRAWING,  # first: a plate is on the stack from its making on
            poutine.block(),
            poutine.trace() as trace,
            pyro.plate("draws", num_samples, dim=-2),
        ):
            self.guide()
        return {
            name: _without_plate(site["value"], site["fn"].event_dim, len(site["cond_indep_stack"]))
            for name, site in trace.trace.nodes.items()
            if site["type"] == "sample" and not site_is_subsample(site)
        }


class WrappingProgram(Program):
    """A program around another one, whose bank and whose parameters it has."""

    def __init__(self, inner: Program) -> None:
        ParamModule.__init__(self)
        self.inner = inner
        self.members = inner.members
        self.chains = inner.chains
        self.linearised = inner.linearised
        self.layers_independent = inner.layers_independent
        self.has_prior = inner.has_prior

    @property
    def bank(self) -> AdapterBank:  # type: ignore[override]
        return self.inner.bank

    def quantities(self, sites: Sites) -> Quantities:
        return self.inner.quantities(sites)

    def mean(self) -> FlatFactors:
        return self.inner.mean()

    def block_names(self) -> list[str]:
        return self.inner.block_names()

    def scale_parameters(self) -> list[str]:
        return [f"inner.{name}" for name in self.inner.scale_parameters()]

    def param(self, name: str) -> Tensor:
        return self.inner.param(name.removeprefix("inner."))

    @property
    def settles(self) -> bool:
        return self.inner.settles

    def settle(self, curvature: Curvature, beta: float) -> None:
        self.inner.settle(curvature, beta)

    def groups(self, batch_size: int) -> int:
        return self.inner.groups(batch_size)

    def side_by_side(self) -> int:
        return self.inner.side_by_side()

    def renew(self, rows: Tensor) -> dict[str, Tensor]:
        return {f"inner.{name}": entries for name, entries in self.inner.renew(rows).items()}

    @property
    def previous(self) -> Any:
        return self.inner.previous

    def succeed(self, previous: Any) -> None:
        self.inner.succeed(previous.inner)

    def recentre(self) -> None:
        self.inner.recentre()

    def await_prior(self, options: Guide) -> None:
        self.inner.await_prior(options)

    def after_step(self, step: int, steps: int) -> None:
        self.inner.after_step(step, steps)


def spread(stored: int, num_samples: int) -> Tensor:
    """Numbers of stored draws, evenly spaced; each equally often, to one, where there are fewer."""
    return torch.arange(num_samples) * stored // num_samples


def tempered(kl_weight: float) -> AbstractContextManager[object]:
    """Scales the log-density of the latent sites inside by β; in model and guide alike."""
    return poutine.scale(scale=kl_weight)


@contextmanager
def averaged(name: str, count: int) -> Iterator[None]:
    """A plate of ``count`` draws at dimension -2 whose log-densities are averaged, not summed; for
    1 nothing."""
    with ExitStack() as stack:
        if count > 1:
            stack.enter_context(pyro.plate(name, count, dim=-2))
            stack.enter_context(poutine.scale(scale=1 / count))
        yield


def flat(value: Tensor) -> Tensor:
    """The value of a site without the inner plate's dimension: (total,), or (S, total)."""
    return value.squeeze(-2) if value.dim() > 2 else value


def _without_plate(value: Tensor, event_dim: int, plates: int) -> Tensor:
    """Drop the dimension of 1 that a site outside of the inner plate keeps in its place."""
    return value if plates > 1 else value.squeeze(-1 - event_dim)

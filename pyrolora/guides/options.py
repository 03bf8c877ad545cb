"""Options of a guide: the abstract `Guide`, and `Variational` for those that minimise an ELBO."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch

from pyrolora import defaults
from pyrolora.adapters import AdapterBank, LayerSpec
from pyrolora.adapters.config import AdapterConfig
from pyrolora.checks import check_choices, positive, share, whole_number
from pyrolora.errors import ConfigError
from pyrolora.guides.engines import Fit, Law
from pyrolora.guides.supports import PostHoc, Supports

if TYPE_CHECKING:
    from pyrolora.guides.program import Program

Latent = Literal["A", "B", "AB"]
Against = Literal["sum", "mean"]
ScaleUpdates = Literal["curvature", "gradient"]
PriorMean = Literal["learned", "start", "zero"]
Units = Literal["row", "fan_in", "one"]
Head = Literal["point", "gaussian"]


@dataclass(frozen=True, kw_only=True)
class Guide(ABC):
    """Options of a method.

    Options annotated with ``Literal`` are checked against it.

    Parameters
    ----------
    head
        The last linear layer of the task head, W with its bias: ``"point"``, the trained values
        W̄; or ``"gaussian"``, a Laplace approximation around them, made after the training, which
        it leaves as it is:

            prior  W ~ N(0, I / λ)        guide  W ~ N(W̄, (H / β + λ I)⁻¹)

        with H the generalised Gauss-Newton matrix of −log p(y|W) over the training examples, in
        expectation under the draws of the adapters, β the weight of the KL, and λ the one with
        the highest evidence. H is the whole matrix up to `defaults.HEAD_ENTRIES` entries of W, and
        a Kronecker product beyond. A draw is then one of the adapters and one of W.
    """

    name: ClassVar[str]
    adapts: ClassVar[bool] = True
    """Whether the network gets adapters; without, the weights of the network are trained."""

    head: Head = "point"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.head == "gaussian" and not self.supports.gaussian_head:
            raise ConfigError(
                f"guide {self.name!r} with these options keeps the task head a point, got "
                "head='gaussian'; leave it out, or choose a guide whose Supports(...) states "
                "gaussian_head, such as 'map', 'montec' or 'meanfield'"
            )

    @property
    @abstractmethod
    def supports(self) -> Supports:
        """The capabilities of the guide with these options; all others raise `ConfigError`."""

    @abstractmethod
    def build(self, bank: AdapterBank) -> Program:
        """Return the model/guide pair over the factors of ``bank``."""

    def shapes(
        self, specs: Sequence[LayerSpec], config: AdapterConfig
    ) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of every stored tensor of the program that `build` makes.

        No such tensor is allocated.
        """
        with torch.device("meta"):
            program = self.build(AdapterBank(specs, config))
            program.reserve()
            state = program.state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    def infer(self, fit: Fit) -> None:
        """Infer the posterior of ``fit.joint``, by stochastic variational inference."""
        fit.svi()

    def beta(self, num_examples: int, progress: float = 1.0) -> float:
        """Return the weight of the KL at ``progress`` (0..1) through the training steps."""
        return 1.0

    def scale_rate(self, learning_rate: float, steps: int, num_examples: int) -> float:
        """Return the learning rate of the scales in a fit of ``steps`` steps.

        Scales are those of the posterior and of a regression's noise; the means have
        ``learning_rate``.
        """
        highest = defaults.SCALE_LEARNING_RATE
        if self.beta(num_examples) < 1:
            highest *= min(1.0, defaults.SCALE_STEPS / steps) ** 0.5
        return min(highest, defaults.SCALE_RATE * learning_rate)

    @property
    def unit(self) -> str | None:
        """The unit of the scales of noise and prior, one of `Units`; None: there is no choice."""
        return None

    @property
    def settles(self) -> bool:
        """Whether `Program.settle` sets the scales to their optimum, so that none is trained."""
        return False

    @property
    def settles_at_first(self) -> bool:
        """Whether `Program.settle` sets the scales before some steps, which then train them on.

        It does where the inputs of the layers are known.
        """
        return False

    @property
    def reads_inputs(self) -> bool:
        """Whether inference reads the inputs of the adapted layers, as a curvature is made of."""
        return self.settles

    def rate_held_from(self) -> float:
        """Return the share of the training steps after which the learning rate is held."""
        return 1.0

    def without_inputs(self) -> Self:
        """Return the options for adapters whose inputs cannot be recorded."""
        return self

    @property
    def held_back(self) -> float:
        """The share of the training examples that the fit does not learn from, to choose by."""
        return 0.0

    def number_held_back(self, n: int) -> int:
        """Return how many of n training examples the fit does not learn from."""
        return round(self.held_back * n)

    def check(self, task: Law) -> None:  # noqa: B027 - most guides serve every task
        """Raise `ConfigError` for a task that this method cannot serve."""

    def check_given(self) -> None:  # noqa: B027 - `Supports.post_hoc` says it of most guides
        """Raise `ConfigError` for options that ask for training around a given adapter in vain."""


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
        G: the examples of a training batch are split into G equal groups, each with its own draw
        (the largest divisor of the batch size up to G). The gradient has the same expectation; the
        part of its variance that all examples share falls as 1/G. 1 is one draw per batch.
    scale_updates
        How the scales of the posterior reach the optimum of the objective. ``"curvature"``: they
        are set to it, before steps 0, 1, 2, 4, ... and at the end, given the generalised
        Gauss-Newton matrix H of −log p(y|θ), in expectation under the present posterior: for
        θ_i ~ N(m_i, σ_i²) and the prior N(m_i0, σ₀²) the optimum is σ_i² = β / (H_ii + β / σ₀²). It
        depends neither on a learning rate nor on the number of steps. ``"gradient"``: they are
        trained like the means. None: by curvature where the optimum is a closed form and inputs
        are known, else by gradient: for a learned ε, the hierarchical form around another mean than
        the learned one, where embeddings or parameters are adapted (then for all layers), and after
        an earlier posterior. For `LowRank` both: by the curvature's diagonal before steps 0, 1, 2,
        4, ... and after three quarters of the steps, and by gradient from there.
    scale_learning_rate
        Learning rate of the scales of the posterior, where they are trained, and of the noise of a
        regression; the means have the fit's ``learning_rate``. None: ten times that, so that noise
        does not grow before the means have learnt, but at most 1e-2, or, where β < 1, at most
        1e-2 √(256 / T) in a fit of T > 256 steps: the noise of a cold posterior outgrows what is
        learnt. With ``units="row"``, where trained scales begin at the prior's and the data narrow
        them, 0.1 at any β; not for scales that are set by curvature in a first fit, and trained
        only after an earlier posterior, whose widths they begin at.
    hold_back
        Share of the training examples that are held back from the fit, at random, to choose one
        number c, by which the noise of all layers is multiplied, and then a temperature
        (`Posterior.calibrate`). All through the training c moves to where the posterior knows how
        far it overfits (`inference.widths`):

            mean_learnt log E p(y|θ) − mean_held back log E p(y|θ) = mean_learnt Var log p(y|θ) / β,

        as it does on average where the posterior is exact. Evidence tells no scale of the noise
        that predicts well, as a mean that fits well costs it nothing. The prior log c ~ N(0, 1)
        counts beside it: where little has been learnt, or few examples are held back, c is near 1.
        It needs ``units="row"``, and steps of training: around a given adapter,
        ``scale_updates="gradient"`` (`LowRank` trains its scales anyway). After an earlier
        posterior c is that one's, and the temperature alone is chosen. 0: no example is held back,
        and c is 1. None: a tenth, where that is possible and comes to ten examples, but at most
        250, which tell two numbers well enough. `Posterior.held_back` is how many there were, and
        the last entry of the history has c and the temperature.
    """

    kl_weight: float = 1.0
    kl_weight_against: Against = "sum"
    kl_warmup: float = 0.0
    draws_per_batch: int = 1
    scale_learning_rate: float | None = None
    scale_updates: ScaleUpdates | None = None
    hold_back: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hold_back is not None:
            share("hold_back", self.hold_back, "[0, 1)")
        if self.hold_back and self.unit != "row":
            received, remedy = f"got units={self.unit!r}", "units='row', or hold_back=0"
            if self.unit is None:
                received, remedy = f"and {self.name!r} has none", "another guide, or hold_back=0"
            raise ConfigError(
                f"hold_back={self.hold_back!r} is for noise that is relative to what is learnt, "
                f"{received}; choose {remedy} and Posterior.calibrate after the fit"
            )
        positive("kl_weight", self.kl_weight)
        share("kl_warmup", self.kl_warmup, "[0, 1]")
        whole_number("draws_per_batch", self.draws_per_batch, at_least=1)
        if self.scale_learning_rate is not None:
            positive("scale_learning_rate", self.scale_learning_rate)
        if self.settles and not self.supports.closed_scales:
            raise ConfigError(
                f"the scales of {self.name!r} with these options have no closed optimum, got "
                "scale_updates='curvature'; leave it out, or choose scale_updates='gradient'"
            )

    @property
    def closed_scales(self) -> bool:
        """Whether the scales have a closed optimum, given the curvature."""
        return False

    @property
    def settles(self) -> bool:
        if self.scale_updates is None:
            return self.closed_scales
        return self.scale_updates == "curvature"

    def without_inputs(self) -> Self:
        chosen = self.scale_updates is not None or not self.settles
        return self if chosen else replace(self, scale_updates="gradient")

    @property
    def held_back(self) -> float:
        if self.hold_back is None:
            return defaults.HOLD_BACK if self.unit == "row" else 0.0
        return self.hold_back

    def number_held_back(self, n: int) -> int:
        number = super().number_held_back(n)
        return number if self.hold_back is not None else min(number, defaults.HELD_BACK_MOST)

    @property
    def post_hoc_scales(self) -> PostHoc | None:
        """How the scales are inferred around means that stay.

        The width that examples held back choose (``hold_back``) takes steps of training.
        """
        if self.settles:
            return None if self.hold_back else "computed"
        return "trained"

    def check_given(self) -> None:
        if self.hold_back and self.settles:
            raise ConfigError(
                f"hold_back chooses the width of the noise all through the training, and "
                f"{self.name!r} with these options trains nothing when the adapter is given, got "
                f"hold_back={self.hold_back!r}; choose scale_updates='gradient', which trains the "
                "scales, or hold_back=0 and Posterior.calibrate after the fit"
            )

    def infer(self, fit: Fit) -> None:
        if self.scale_updates == "curvature" and fit.program.previous is not None:
            raise ConfigError(
                "scale_updates='curvature' has no closed optimum after an earlier posterior; "
                "choose scale_updates=None or 'gradient' for the fit with prior="
            )
        super().infer(fit)

    def scale_rate(self, learning_rate: float, steps: int, num_examples: int) -> float:
        if self.scale_learning_rate:
            return self.scale_learning_rate
        if self.unit == "row" and not self.settles:
            return defaults.SCALE_LEARNING_RATE_FROM_PRIOR
        return super().scale_rate(learning_rate, steps, num_examples)

    def beta(self, num_examples: int, progress: float = 1.0) -> float:
        factor = num_examples if self.kl_weight_against == "mean" else 1
        rise = min(1.0, progress / self.kl_warmup) if self.kl_warmup else 1.0
        return self.kl_weight * factor * rise


def unit_of(units: Units | None, prior_mean: PriorMean) -> Units:
    """Return the unit of scales; where none is chosen, that of the rows if it goes with the prior.

    Raises
    ------
    ConfigError
        For the unit of the rows where the prior has another mean than the learned one.
    """
    in_rows = prior_mean == "learned"
    if units is None:
        return "row" if in_rows else "fan_in"
    if units == "row" and not in_rows:
        raise ConfigError(
            "units='row' takes the size of a row from its mean, which therefore has no price: it "
            f"goes with prior_mean='learned', got prior_mean={prior_mean!r}; choose "
            "units='fan_in' for that"
        )
    return units


def check_inner_head(inner: Guide, instead: str) -> None:
    """Raise `ConfigError` for a guide inside of another one that asks for a head of its own."""
    if inner.head != "point":
        raise ConfigError(
            f"the task head is that of the whole guide, got head={inner.head!r} for the inner "
            f"{inner.name!r}; leave it out there, and choose {instead}"
        )


def require(condition: bool, name: str, expected: str, received: object) -> None:
    """Raise `ConfigError` for an option outside its range."""
    if not condition:
        raise ConfigError(f"{name} must be {expected}, got {received!r}")

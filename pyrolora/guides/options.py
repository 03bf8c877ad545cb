"""Options of a guide: the abstract `Guide`, and `Variational` for those that minimise an ELBO."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from pyrolora import defaults
from pyrolora.adapters import AdapterBank, LayerSpec
from pyrolora.adapters.config import AdapterConfig
from pyrolora.checks import positive, share, whole_number
from pyrolora.errors import ConfigError
from pyrolora.guides.engines import Fit, Law

if TYPE_CHECKING:
    from pyrolora.guides.program import Program

LATENTS = ("A", "B", "AB")
AGAINST = ("sum", "mean")
SCALE_UPDATES = ("curvature", "gradient")
PRIOR_MEANS = ("learned", "start", "zero")
UNITS = ("row", "fan_in", "one")


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

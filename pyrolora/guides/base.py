"""What every guide is: options, and the program that they build over a bank.

The parts of a guide's file, in this order: the options (a frozen dataclass that states the
mathematics), ``build``, and the program with ``__init__`` (its parameters), ``model``, ``guide``,
``factors`` and ``quantities``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrolora import defaults
from pyrolora.adapters import AdapterBank, FlatFactors
from pyrolora.errors import ConfigError, positive
from pyrolora.parameters import ParamModule

LATENTS = ("A", "B", "AB")
AGAINST = ("sum", "mean")

Sites = Mapping[str, Tensor]
"""Site name -> value, or -> draws with one leading dimension."""

Quantities = Mapping[str, tuple[Tensor, tuple[str, ...]]]
"""Name -> (S, ...) and the names of the dimensions after the first."""


@dataclass(frozen=True, kw_only=True)
class Guide(ABC):
    """Options of a method, and the weight of its KL in the objective.

    Parameters
    ----------
    kl_weight, kl_weight_against
        β in −log-likelihood + β · KL. 1 is the ELBO; below 1 the posterior is colder. Against
        ``"sum"`` β is ``kl_weight``; against ``"mean"``, the mean of the log-likelihood over the n
        training examples, β = n · ``kl_weight``.
    kl_warmup
        Share of the training steps over which the weight rises linearly from 0 to β.
    scale_learning_rate
        Learning rate of the posterior's scales; the means take the fit's ``learning_rate``.
    """

    name: ClassVar[str]

    kl_weight: float = 1.0
    kl_weight_against: str = "sum"
    kl_warmup: float = 0.0
    scale_learning_rate: float = defaults.SCALE_LEARNING_RATE

    def __post_init__(self) -> None:
        positive("kl_weight", self.kl_weight)
        against = self.kl_weight_against
        require(against in AGAINST, "kl_weight_against", f"one of {AGAINST}", against)
        require(0 <= self.kl_warmup <= 1, "kl_warmup", "in [0, 1]", self.kl_warmup)
        positive("scale_learning_rate", self.scale_learning_rate)

    @abstractmethod
    def build(self, bank: AdapterBank) -> Program:
        """The model/guide pair over the factors of ``bank``."""

    def beta(self, num_examples: int, progress: float = 1.0) -> float:
        """β at ``progress`` (0..1) through the training steps."""
        factor = num_examples if self.kl_weight_against == "mean" else 1
        rise = min(1.0, progress / self.kl_warmup) if self.kl_warmup else 1.0
        return self.kl_weight * factor * rise


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
    """

    def __init__(self, bank: AdapterBank) -> None:
        super().__init__()
        self.bank = bank

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

    def block_names(self) -> list[str]:
        """Labels of the dimension ``block`` in `quantities`, if it is used."""
        return []

    def scale_parameters(self) -> list[str]:
        """Names of the parameters that are scales of the posterior, not means."""
        return [name for name, _ in self.named_parameters(recurse=False)]

    @torch.no_grad()
    def draw(self, num_samples: int) -> dict[str, Tensor]:
        """Site -> (num_samples, *event): independent draws from the guide."""
        with poutine.block(), poutine.trace() as trace, pyro.plate("draws", num_samples, dim=-2):
            self.guide()
        return {
            name: _without_plate(site["value"], site["fn"].event_dim, len(site["cond_indep_stack"]))
            for name, site in trace.trace.nodes.items()
            if site["type"] == "sample" and not site_is_subsample(site)
        }


def tempered(kl_weight: float) -> AbstractContextManager[object]:
    """Scales the log-density of the latent sites inside by β; in model and guide alike."""
    return poutine.scale(scale=kl_weight)


def _without_plate(value: Tensor, event_dim: int, plates: int) -> Tensor:
    """Drop the dimension of 1 that a site outside of the inner plate keeps in its place."""
    return value if plates > 1 else value.squeeze(-1 - event_dim)

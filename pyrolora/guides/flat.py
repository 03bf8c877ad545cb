"""Flat-LoRA: the loss in expectation over perturbed weights, around any other guide."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.adapters import AdapterBank, FlatFactors
from pyrolora.checks import positive, true_or_false
from pyrolora.errors import ConfigError
from pyrolora.guides.engines import Fit, Law
from pyrolora.guides.map import MAP
from pyrolora.guides.nuts import NUTS
from pyrolora.guides.options import Guide, Variational, check_inner_head, require
from pyrolora.guides.program import SHARED_LAW, Program, Sites
from pyrolora.guides.supports import Supports
from pyrolora.guides.wrapping import WrappingProgram

SEEDS = 2**24
"""Number of values that a float32 in [0, 1) tells apart."""


@dataclass(frozen=True, kw_only=True)
class Flat(Guide):
    """The objective of another guide, in expectation over noise on the adapted weights.

    For an adapted layer with W' = W + s B A, in training,

        y = (W' + E) x,   E[i, :] ~ N(0, σ_t² ‖W'[i, :]‖² / in · I),
        σ_t = ρ · ½ (1 − cos(π t / T))

    at step t of T (optimiser steps, whatever the accumulation and the number of processes): one
    scale per output neuron, so that E‖E[i, :]‖² = σ_t² ‖W'[i, :]‖². No gradient runs through the
    norms. To second order the objective adds ½ Σ σ² ‖W'[i, :]‖² / in · ∂²loss/∂W[i, j]²: minima
    are flat.

    E is a function of a seed and of the layer, and the seed is the random site: ``seed``, uniform
    in model and guide alike, so that its KL is zero. W itself is never touched, and no tensor of
    its size is kept: the backward pass draws E again. W has to be plain, and of 16 bits or more; on
    a quantised base use the inner guide alone.

    Parameters
    ----------
    inner
        The guide of the factors. Its options say how scales are inferred, and which share of the
        examples is held back.
    rho
        ρ, the final noise relative to the norm of a row.
    at_prediction
        Draw E at prediction, too, with σ_T = ρ; otherwise draws are those of ``inner``.

    References
    ----------
    T. Li et al. (2025), "Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape", ICML,
    arXiv 2409.14396.
    """

    name = "flat"

    inner: Guide = dataclasses.field(default_factory=MAP)
    rho: float = defaults.RHO
    at_prediction: bool = False

    def __post_init__(self) -> None:
        require(
            isinstance(self.inner, Guide)
            and not isinstance(self.inner, Flat | NUTS)
            and self.inner.adapts,
            "inner",
            "another guide that trains adapters, such as pyrolora.guides.MonteCLoRA()",
            self.inner,
        )
        check_inner_head(self.inner, "Flat(inner=..., head='gaussian')")
        super().__post_init__()
        positive("rho", self.rho)
        true_or_false("at_prediction", self.at_prediction)

    @property
    def supports(self) -> Supports:
        inner = self.inner.supports
        return inner if inner.post_hoc == "trained" else replace(inner, post_hoc=None)

    def build(self, bank: AdapterBank) -> FlatProgram:
        program = FlatProgram(self.inner.build(bank), self)
        if self.at_prediction and program.supports.linearised:
            raise ConfigError(
                "a linearised prediction takes no noise on the weights; leave at_prediction out"
            )
        return program

    def infer(self, fit: Fit) -> None:
        self.inner.infer(_FlatFit(fit, self))

    def beta(self, num_examples: int, progress: float = 1.0) -> float:
        return self.inner.beta(num_examples, progress)

    def scale_rate(self, learning_rate: float, steps: int, num_examples: int) -> float:
        return self.inner.scale_rate(learning_rate, steps, num_examples)

    @property
    def unit(self) -> str | None:
        return self.inner.unit

    @property
    def settles(self) -> bool:
        return self.inner.settles

    @property
    def settles_at_first(self) -> bool:
        return self.inner.settles_at_first

    @property
    def reads_inputs(self) -> bool:
        return self.inner.reads_inputs

    def without_inputs(self) -> Flat:
        return replace(self, inner=self.inner.without_inputs())

    @property
    def held_back(self) -> float:
        return self.inner.held_back

    def number_held_back(self, n: int) -> int:
        return self.inner.number_held_back(n)

    def rate_held_from(self) -> float:
        return self.inner.rate_held_from()

    def check(self, task: Law) -> None:
        self.inner.check(task)

    def check_given(self) -> None:
        inner = self.inner
        inner.check_given()
        if isinstance(inner, Variational) and inner.supports.post_hoc == "computed":
            raise ConfigError(
                f"the noise on the weights of '{self.name}+{inner.name}' acts in training, and "
                "nothing is trained when the adapter is given, whose scales are computed; choose "
                f"scale_updates='gradient' for the inner guide, which trains them, or "
                f"{inner.name!r} alone"
            )


class _FlatFit:
    """A fit as the inner guide sees it: the inner program, and point estimates that are flat."""

    def __init__(self, fit: Fit, options: Flat) -> None:
        self._fit, self._options = fit, options
        self.program = fit.program.inner

    def point(self, guide: Guide, number: int | None = None) -> Any:
        return self._fit.point(self._flat(guide), number)

    def points(self, guide: Guide, count: int) -> list[Any]:
        return self._fit.points(self._flat(guide), count)

    def _flat(self, guide: Guide) -> Flat:
        return replace(self._options, inner=guide, at_prediction=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fit, name)


class FlatProgram(WrappingProgram):
    """A program with the sites of the inner one and ``seed``, uniform in (0, 1).

    The first 24 bits of the seed count.

    Like dropout, the noise acts in training mode. In evaluation mode, and in `factors` whatever
    the mode, it acts with ``at_prediction`` alone.
    """

    options: Flat

    def __init__(self, inner: Program, options: Flat) -> None:
        super().__init__(inner)
        self.options = options

    def model(self, kl_weight: float = 1.0) -> FlatFactors:
        factors, seed = self.inner.model(kl_weight), self._seed()
        if self.training:
            return _perturbed(factors, seed, self.noise_scale())
        return self._at_prediction(factors, seed)

    def guide(self, kl_weight: float = 1.0) -> None:
        self.inner.guide(kl_weight)
        self._seed()

    def factors(self, sites: Sites) -> FlatFactors:
        inner = {name: value for name, value in sites.items() if name != "seed"}
        return self._at_prediction(self.inner.factors(inner), sites["seed"])

    def pick(self, index: Tensor) -> dict[str, Tensor]:
        return {**self.inner.pick(index), "seed": torch.rand(len(index))}

    def noise_scale(self) -> float:
        """Return σ_t at the present `progress` of the training."""
        return self.options.rho * 0.5 * (1 - math.cos(math.pi * self.progress))

    def _seed(self) -> Tensor:
        # On the host, which makes generators of it: a seed that is drawn on a device is waited for.
        law = dist.Uniform(torch.zeros(()), 1.0)
        seed: Tensor = pyro.sample("seed", law, infer={SHARED_LAW: True})
        return seed

    def _at_prediction(self, factors: FlatFactors, seed: Tensor) -> FlatFactors:
        if self.options.at_prediction:
            return _perturbed(factors, seed, self.options.rho)
        return factors


def _perturbed(factors: FlatFactors, seed: Tensor, scale: float) -> FlatFactors:
    """Return the factors with noise of that scale; ``seed`` is (), (S,) or (S, 1)."""
    seed = seed.squeeze(-1) if seed.dim() > 1 else seed
    return replace(factors, seeds=(seed * SEEDS).long(), noise_scale=scale)

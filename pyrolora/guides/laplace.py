"""Laplace: a Gaussian around plain LoRA, with the curvature of the loss for its precision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyrolora import defaults
from pyrolora.adapters import AdapterBank
from pyrolora.checks import positive, true_or_false, whole_number
from pyrolora.distributions import KroneckerNormal, TruncatedKroneckerNormal, orthonormal
from pyrolora.errors import ConfigError
from pyrolora.guides.dense import check_width
from pyrolora.guides.engines import Fit, Law
from pyrolora.guides.factor_program import FactorProgram
from pyrolora.guides.full_laplace import REMEDY, FullLaplaceProgram, set_precision
from pyrolora.guides.map import MAP
from pyrolora.guides.options import Guide, Latent
from pyrolora.guides.program import Program
from pyrolora.guides.supports import Supports
from pyrolora.matrices import decomposing

Structure = Literal["kronecker", "full"]
Tuning = Literal["marginal_likelihood", "validation"]
GRID = tuple(10.0**exponent for exponent in range(-2, 6))
"""Precisions λ that validation compares: prior scales from 10 down to 0.003."""


@dataclass(frozen=True, kw_only=True)
class Laplace(Guide):
    """A Gaussian at the MAP estimate θ̄ of the factors, from a second-order expansion.

        prior  θ ~ N(0, I / λ)          guide  θ ~ N(θ̄, (H + λ I)⁻¹)

    with H, a block for each factor of each layer, the generalised Gauss-Newton matrix of
    −log p(y|θ) in Kronecker-factored form (KFAC-expand for sequences; for language models with
    sampled labels). Layers are independent, and A and B of a layer are. Where the adapters have a
    start that is taken off again, the prior is around it.

    With ``curvature="full"`` H is the matrix itself, over all latent factors of all layers, and the
    model is the network linearised around θ̄; its mode θ*, where H is taken, is the guide's mean:

        prior  θ ~ N(θ₀, I / λ)         guide  θ ~ N(θ*, (H + λ I)⁻¹)

    It is computed as a Gaussian process over the training outputs (`pyrolora.inference.dual.Dual`),
    at most 4,096 of them: n (C − 1) for C classes. θ₀ is the network without adapters: B
    around 0, and, since A is no part of it then, A around its learned means where both are latent.

    The evidence is that of the linearised model, too, whose features were learnt from the same
    labels: it mistakes overfitting for a close fit, and favours a prior many times wider than
    what was learnt. Single draws are then confident, and only all ``num_draws`` together show the
    uncertainty far from the training data: with 8 draws predictions are votes.

    Parameters
    ----------
    prior_scale
        λ^(−½), for the MAP fit, too; None: plain LoRA, and λ is tuned afterwards.
    tune
        How λ is chosen without ``prior_scale``: by the negative log-likelihood of the ``eval_data``
        (``"validation"``), or by the ``"marginal_likelihood"`` of the training data under the
        linearised model. None: by validation; by the marginal likelihood where predictions are
        linearised and there is no ``eval_data``. With ``"kronecker"`` the latter takes layers as
        independent, which they are not, and often ends with a posterior that is far too wide.
    linearised
        Predict with f(x; θ̄) + J(x) (θ − θ̄), the model whose posterior this is, in place of
        f(x; θ). None: where the task allows it, which a language model does not. The Pyro pair,
        whose model has the network itself, predicts with f(x; θ) either way.
    latent
        ``"A"``, ``"B"``, or ``"AB"``.
    curvature
        ``"kronecker"`` or ``"full"``. The latter has linearised predictions only. Its draws are
        made at the end of the fit, kept and saved; the history has its ``log_evidence``.
    num_draws
        Number of draws with ``curvature="full"``; each takes the memory of the latent factors once
        more. None: 32.

    References
    ----------
    E. Daxberger et al. (2021), "Laplace Redux", NeurIPS. A. X. Yang et al. (2024), "Bayesian
    Low-rank Adaptation for Large Language Models", ICLR, arXiv 2308.13111. R. Eschenhagen et al.
    (2023), "Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures".
    A. Immer et al. (2021), "Improving predictions of Bayesian neural nets via local linearization",
    AISTATS.
    """

    name = "laplace"

    prior_scale: float | None = None
    tune: Tuning | None = None
    linearised: bool | None = None
    latent: Latent = "AB"
    curvature: Structure = "kronecker"
    num_draws: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.linearised is not None:
            true_or_false("linearised", self.linearised)
        if self.prior_scale is not None:
            positive("prior_scale", self.prior_scale)
            if self.tune is not None:
                raise ConfigError(
                    "tune chooses the prior, and prior_scale gives it, got "
                    f"tune={self.tune!r} and prior_scale={self.prior_scale!r}; leave one out"
                )
        if self.num_draws is not None:
            whole_number("num_draws", self.num_draws, at_least=1)
            if not self.full:
                raise ConfigError(
                    "num_draws is how many draws curvature='full' keeps; those of 'kronecker' are "
                    "drawn anew; leave it out"
                )
        if self.full and self.linearised is False:
            raise ConfigError(
                "curvature='full' has the mode of the linear model, which says nothing of the "
                "network's own output there; leave linearised=False out, or curvature"
            )

    @property
    def full(self) -> bool:
        """Whether the curvature is the full matrix."""
        return self.curvature == "full"

    @property
    def reads_inputs(self) -> bool:
        return True

    @property
    def size(self) -> int:
        """The number of draws that are kept."""
        return self.num_draws or defaults.NUM_SAMPLES

    @property
    def supports(self) -> Supports:
        return Supports(
            rank_allocation=True,
            post_hoc="computed",
            stored_draws=self.full,
            linearised=self.full or self.linearised is not False,
            independent_layers=not self.full,
            distinct_prior=True,
            all_examples=True,
            gaussian_head=not self.full,
        )

    def build(self, bank: AdapterBank) -> Program:
        return FullLaplaceProgram(bank, self) if self.full else LaplaceProgram(bank, self)

    def infer(self, fit: Fit) -> None:
        start = MAP()
        if self.prior_scale is not None:
            shrunk = fit.program.shrunk if self.full else self.latent
            start = MAP(prior_scale=self.prior_scale, latent=shrunk)
        tune = self._tuning(fit)
        if tune == "validation" and not fit.can_validate:
            raise ConfigError(
                "the prior of 'laplace' is to be tuned on held-out data here, and there are none; "
                "pass eval_data=, or Laplace(prior_scale=...); or choose 'montec' or 'meanfield'"
            )
        if self.full:
            fit.check_dual()
        else:
            _check_widths(fit.program.bank)
        fit.joint.adopt(fit.point(start))
        if self.full:
            self._keep_draws(fit, tune)
        else:
            self._curve(fit, tune)

    def _keep_draws(self, fit: Fit, tune: Tuning | None) -> None:
        """Choose λ by the full curvature, and keep draws of the posterior."""
        program = fit.program
        dual = fit.dual(program.centre_of_all(), self.latent, self.size)

        def score(precision: float) -> float:
            program.keep(dual.deviations(precision), precision)
            return _or_worst(fit.held_out_nll())

        if self.prior_scale is not None:
            precision = self.prior_scale**-2
        elif tune == "marginal_likelihood":
            precision = dual.best_precision()
        else:
            precision = min(GRID, key=score)
        program.keep(dual.deviations(precision), precision)
        fit.log(prior_precision=precision, log_evidence=dual.mode(precision).log_evidence)

    def _curve(self, fit: Fit, tune: Tuning | None) -> None:
        """Set the Kronecker factors, and choose λ by them."""
        program = fit.program
        program.curve(fit.kfac())
        if self.prior_scale is not None:
            set_precision(program.precision, self.prior_scale**-2)
        elif tune == "marginal_likelihood":
            program.precision.fill_(fit.best_precision(*program.evidence()))
        else:
            program.precision.fill_(min(GRID, key=lambda λ: _score(fit, λ)))
        fit.log(prior_precision=float(program.precision))

    def _tuning(self, fit: Fit) -> Tuning | None:
        if self.prior_scale is not None or self.tune is not None:
            return self.tune
        linear = fit.joint.task.linearisable and self.linearised is not False
        return "marginal_likelihood" if linear and not fit.can_validate else "validation"

    def check(self, task: Law) -> None:
        if self.full and not task.linearisable:
            raise ConfigError(
                f"curvature='full' has a row for each output of an example, and "
                f"{task.name!r} has one for each token and word; choose "
                "curvature='kronecker'"
            )
        if self.linearised and not task.linearisable:
            raise ConfigError(
                f"linearised=True has no predictive for {task.name!r}: one Jacobian per "
                "token and word is too many; leave it out for sampled predictions, or use 'montec'"
            )


def _check_widths(bank: AdapterBank) -> None:
    for name, spec in bank.specs.items():
        check_width(
            "the curvature of 'laplace'",
            name,
            max(spec.in_features, spec.out_features),
            f"leave it out of target_modules, with exclude_modules=[{name!r}], or choose 'montec' "
            "or 'meanfield'",
        )


def _score(fit: Fit, precision: float) -> float:
    fit.program.precision.fill_(precision)
    return _or_worst(fit.held_out_nll())


def _or_worst(nll: float) -> float:
    """Return the number, or infinity where it is none: `min` would take NaN for the best."""
    return math.inf if math.isnan(nll) else nll


class LaplaceProgram(FactorProgram):
    """A program with sites ``A`` and ``B``, those that are latent: all entries of a factor, flat.

    Buffers: λ, ``precision``; and for each group of equal blocks of a factor the eigenvectors of
    its Kronecker factors, ``rows_A_0`` (count, r, r) and ``columns_A_0`` (count, c, K), and their
    eigenvalues ``values_A_0`` (count, r, K). K is c, or what `defaults.CURVATURE_BYTES` allows;
    other eigenvalues count as 0. Until `reserve` it is 0: the training needs none.
    """

    precision: Tensor

    options: Laplace

    def __init__(self, bank: AdapterBank, options: Laplace) -> None:
        super().__init__(bank, options)
        self.register_buffer("precision", torch.ones(()))
        self.confine("precision", constraints.positive)
        for factor in options.latent:
            for i, group in enumerate(bank.layouts[factor].groups):
                rows = torch.eye(group.rank).repeat(group.count, 1, 1)
                self.register_buffer(f"rows_{factor}_{i}", rows)
                for name, size in (("columns", group.columns), ("values", group.rank)):
                    self.register_buffer(f"{name}_{factor}_{i}", torch.zeros(group.count, size, 0))
                for name, domain in (
                    ("rows", orthonormal),
                    ("columns", orthonormal),
                    ("values", constraints.nonnegative),
                ):
                    self.confine(f"{name}_{factor}_{i}", domain)

    @torch.no_grad()
    def reserve(self) -> None:
        for factor in self.options.latent:
            for i, group in enumerate(self.bank.layouts[factor].groups):
                kept = min(group.columns, self.kept())
                for name, size in (("columns", group.columns), ("values", group.rank)):
                    old = self.get_buffer(f"{name}_{factor}_{i}")
                    setattr(self, f"{name}_{factor}_{i}", old.new_zeros(group.count, size, kept))

    def kept(self) -> int:
        """Return the most eigenvectors of the columns of a block."""
        groups = [g for factor in self.options.latent for g in self.bank.layouts[factor].groups]
        if 4 * sum(g.count * g.columns**2 for g in groups) <= defaults.CURVATURE_BYTES:
            return max(g.columns for g in groups)
        return max(1, defaults.CURVATURE_BYTES // (4 * sum(g.count * g.columns for g in groups)))

    def prior(self, site: str) -> dist.TorchDistribution:
        return self.normal_prior(site, self.precision.rsqrt())

    def law(self, site: str) -> dist.TorchDistribution:
        values = self._buffers_of("values", site)
        scale = torch.cat([(v + self.precision).rsqrt().flatten() for v in values])
        rows, columns = (self._buffers_of(name, site) for name in ("rows", "columns"))
        groups, loc = self.bank.layouts[site].groups, self.loc(site)
        if len(scale) == len(loc):
            return KroneckerNormal(loc, scale, rows, columns, groups)
        rest = self.precision.rsqrt()
        return TruncatedKroneckerNormal(loc, scale, rest, rows, columns, groups)

    def rank_entries(self, rows: Tensor) -> dict[str, Tensor]:
        return {}  # the curvature is measured after training

    @torch.no_grad()
    def curve(self, portions: Iterable[Mapping[str, Any]]) -> None:
        """Set the curvature, of some blocks at a time: name -> Kronecker factors."""
        self.reserve()
        for curvature in portions:
            for name, factor, i, number in self._places():
                if name in curvature:
                    kept = self.get_buffer(f"values_{factor}_{i}").shape[-1]
                    H = curvature[name]
                    # The product of the traces bounds the eigenvalues.
                    matrices = (H.rows, H.columns, H.rows.trace() * H.columns.trace())
                    with decomposing(f"the curvature in {name!r}", *matrices, remedy=REMEDY):
                        eigen = H.eigen(kept)
                    for part, tensor in zip(("rows", "columns", "values"), eigen, strict=True):
                        self.get_buffer(f"{part}_{factor}_{i}")[number] = tensor

    def _places(self) -> Iterator[tuple[str, str, int, int]]:
        """Yield for each block its name, factor and group, and its number in the group."""
        for factor in self.options.latent:
            blocks = iter(self.bank.layouts[factor].blocks)
            for i, group in enumerate(self.bank.layouts[factor].groups):
                for number in range(group.count):
                    yield next(blocks).name, factor, i, number

    def evidence(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the eigenvalues of H, and θ̄ minus the prior's centre.

        The marginal likelihood of λ depends on these alone.
        """
        values = [v for factor in self.options.latent for v in self._buffers_of("values", factor)]
        means = []
        for factor in self.options.latent:
            prior: Any = self.prior(factor)
            means.append((self.loc(factor) - prior.mean).detach())
        return values, means

    def _buffers_of(self, name: str, factor: str) -> list[Tensor]:
        groups = self.bank.layouts[factor].groups
        return [self.get_buffer(f"{name}_{factor}_{i}") for i in range(len(groups))]

"""Engines that a fit offers to a guide, as protocols, and the curvature that they measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from pyrolora.adapters import FlatFactors

if TYPE_CHECKING:
    from pyrolora.guides.options import Guide


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

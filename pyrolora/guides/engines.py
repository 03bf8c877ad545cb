"""Engines that a fit offers to a guide, as protocols, and the curvature that they measure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from pyrolora.adapters import FlatFactors

if TYPE_CHECKING:
    from pyrolora.guides.options import Guide, Latent


@dataclass(frozen=True)
class Curvature:
    """The generalised Gauss-Newton matrix of −log p(y | A, B), over all n training examples.

    It has the diagonal, and the part that the ranks of a block share: in a block X (r, c) with
    Jacobians G of shape (r, c), one per example and output, ``entries`` is Σ G² and ``ranks`` is
    Σ G Gᵀ.

    Attributes
    ----------
    entries
        (total,), in the order of ``bank.layout(latent)``.
    ranks
        (L, r, r); zero where a block has fewer ranks.
    """

    entries: Tensor
    ranks: Tensor


class Law(Protocol):
    """The attributes of a task that `Guide.check` reads."""

    name: ClassVar[str]
    linearisable: ClassVar[bool]


class Fit(Protocol):
    """The joint model of a fit, its data, and the engines that guides share."""

    @property
    def joint(self) -> Any:
        """The joint model that is inferred."""

    @property
    def program(self) -> Any:
        """The guide's program in it."""

    def svi(self, *, final: bool = True) -> None:
        """Train the pair of `joint`; with ``final`` the result is the posterior."""

    def point(self, guide: Guide, number: int | None = None) -> Any:
        """Train a point mass from its own start, and return its joint model.

        Frozen means stay as they are.

        Parameters
        ----------
        guide
            The options of the point mass.
        number
            The number of this start, where there are several; it has its own seed.
        """

    def points(self, guide: Guide, count: int) -> list[Any]:
        """Train ``count`` point masses, each from its own start, and return their joint models.

        Each is that of `point` with its number; processes that train together share them out.
        """

    @property
    def can_validate(self) -> bool:
        """Whether there is evaluation data."""

    def held_out_nll(self) -> float:
        """Return the negative log-likelihood of the evaluation data under `joint`."""

    def loss(self, factors: FlatFactors, *, held_out: bool = False) -> float:
        """Return −log p per observation, in nats, on the training (or evaluation) data.

        It is a mean over observations and over the draws of ``factors``.
        """

    def kfac(self) -> Iterable[Mapping[str, Any]]:
        """Yield block name -> Kronecker factors of the curvature at the means of `joint`.

        Some layers come at a time, after a pass over the data each.
        """

    def check_dual(self) -> None:
        """Raise `DataError` for more examples than `dual` takes."""

    def dual(self, centre: Tensor, latent: Latent, draws: int) -> Any:
        """Return the posterior of all latent factors in the model linearised at the means.

        Its prior has the mean ``centre``; its methods are ``best_precision()`` and
        ``deviations(λ)``, (draws, P).
        """

    def best_precision(self, eigenvalues: list[Tensor], means: list[Tensor]) -> float:
        """Return the prior's precision with the highest marginal likelihood."""

    def mcmc(self, beta: float, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Run NUTS on `joint`.

        Returns
        -------
        dict, Tensor
            Site -> (chains, draws, ...), and (chains, draws) booleans: which steps diverged.
        """

    def log(self, **numbers: float) -> None:
        """Add an entry to the history."""

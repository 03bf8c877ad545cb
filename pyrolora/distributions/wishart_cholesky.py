"""The Wishart distribution, as a distribution of its lower Cholesky factor."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import Transform


class _LowerFactor(constraints.Constraint):
    """Lower-triangular matrices with a positive diagonal.

    A constraint of our own, because torch's ``lower_cholesky`` has no ``biject_to`` and its
    transform no log-Jacobian, and Pyro's NUTS needs both.
    """

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        return constraints.lower_cholesky.check(value)


lower_factor = _LowerFactor()


class VectorToLowerFactor(Transform):
    """The map R^{r(r+1)/2} -> lower factors.

    The first r entries are the logarithms of the diagonal, the others fill the strictly lower
    triangle row by row. The Jacobian is diagonal (exp x_i on the diagonal of the factor, 1 below
    it), so its log-determinant is the sum of the first r entries.
    """

    domain = constraints.real_vector
    codomain = lower_factor
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VectorToLowerFactor)

    def __hash__(self) -> int:
        return hash(VectorToLowerFactor)

    def _call(self, x: Tensor) -> Tensor:
        r = _side(x.shape[-1])
        row, column = torch.tril_indices(r, r, -1, device=x.device)
        below = x.new_zeros((*x.shape[:-1], r, r))
        below[..., row, column] = x[..., r:]
        return below + torch.diag_embed(x[..., :r].exp())

    def _inverse(self, y: Tensor) -> Tensor:
        r = y.shape[-1]
        row, column = torch.tril_indices(r, r, -1, device=y.device)
        return torch.cat([y.diagonal(dim1=-2, dim2=-1).log(), y[..., row, column]], dim=-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x[..., : y.shape[-1]].sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        r = _side(shape[-1])
        return torch.Size([*shape[:-1], r, r])

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        r = shape[-1]
        return torch.Size([*shape[:-2], r * (r + 1) // 2])


def _side(length: int) -> int:
    """Return the r for which r(r+1)/2 is ``length``."""
    return (math.isqrt(8 * length + 1) - 1) // 2


@biject_to.register(_LowerFactor)
@transform_to.register(_LowerFactor)
def _(constraint: constraints.Constraint) -> Transform:
    return VectorToLowerFactor()


class WishartCholesky(TorchDistribution):
    r"""The lower Cholesky factor L of Σ = L Lᵀ ~ Wishart(ν, S Sᵀ), with E[Σ] = ν S Sᵀ.

    Bartlett: L = S T with T lower triangular, all entries independent, T_ii ~ χ(ν - i + 1) for
    i = 1..r and T_ij ~ N(0, 1) for i > j. No matrix is ever factorised. The density follows from
    the Wishart's and the Jacobian 2^r Π_i L_ii^{r-i+1} of L -> L Lᵀ:

        log p(L) = r log 2 + Σ_i (ν - i) log L_ii - ½ ‖S⁻¹ L‖²
                   - (ν r / 2) log 2 - ν log|S| - log Γ_r(ν / 2)

    Parameters
    ----------
    df : Tensor or float
        Degrees of freedom ν > r - 1, shape ``batch_shape`` after broadcasting. What follows from a
        number alone is computed once.
    scale_tril : Tensor
        S, lower triangular with a positive diagonal, shape ``(*batch_shape, r, r)``.
    scale_diag : Tensor
        In its place the diagonal of a diagonal S, shape ``(*batch_shape, r)``: products with S and
        S⁻¹ then go entry by entry.

    Raises
    ------
    ValueError
        Unless S is given once; with ``validate_args``, when ν <= r - 1 or S is not a lower factor.

    References
    ----------
    M. S. Bartlett (1933), Proc. R. Soc. Edinb. 53, 260-283.
    """

    arg_constraints: ClassVar = {
        "df": constraints.positive,
        "scale_tril": constraints.lower_cholesky,
    }
    support = lower_factor
    has_rsample = True

    scale_diag: Tensor | None
    _tril: Tensor | None
    _df: Tensor | float

    def __init__(
        self,
        df: Tensor | float,
        scale_tril: Tensor | None = None,
        *,
        scale_diag: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if (scale_tril is None) == (scale_diag is None):
            raise ValueError("WishartCholesky needs one of scale_tril and scale_diag")
        scale, event_dims = (scale_tril, 2) if scale_diag is None else (scale_diag, 1)
        assert scale is not None
        batch_shape = scale.shape[:-event_dims]
        if isinstance(df, Tensor):
            df = df.to(scale)
            batch_shape = torch.broadcast_shapes(df.shape, batch_shape)
        self._df = df
        scale = scale.expand(batch_shape + scale.shape[-event_dims:])
        self._tril, self.scale_diag = (scale, None) if scale_diag is None else (None, scale)
        event_shape = torch.Size([scale.shape[-1], scale.shape[-1]])
        super().__init__(batch_shape, event_shape, validate_args=validate_args)
        if self._validate_args and not (self.df > self.rank - 1).all():
            raise ValueError(
                f"WishartCholesky needs df > r - 1 = {self.rank - 1}, got {self.df.min():g}"
            )

    @property
    def rank(self) -> int:
        """The number r of rows."""
        return int(self.event_shape[-1])

    @property
    def df(self) -> Tensor:
        """The degrees of freedom ν, ``batch_shape``."""
        df = self._df
        if not isinstance(df, Tensor):
            df = _number(df, *self._kind())
        return df.expand(self.batch_shape)

    @property
    def multiplier(self) -> Tensor | float:
        """ν as a number, if it is one, to multiply by."""
        return self.df if isinstance(self._df, Tensor) else self._df

    def _kind(self) -> tuple[torch.dtype, torch.device]:
        scale = self._tril if self.scale_diag is None else self.scale_diag
        assert scale is not None
        return scale.dtype, scale.device

    def expand(self, batch_shape: Any, _instance: Any = None) -> WishartCholesky:
        new = self._get_checked_instance(WishartCholesky, _instance)
        batch_shape = torch.Size(batch_shape)
        new._df = self._df
        tril, diag = self._tril, self.scale_diag
        new._tril = None if tril is None else tril.expand(batch_shape + self.event_shape)
        new.scale_diag = None if diag is None else diag.expand(batch_shape + diag.shape[-1:])
        super(WishartCholesky, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def scale_tril(self) -> Tensor:
        """The scale S, (*batch_shape, r, r)."""
        if self._tril is not None:
            return self._tril
        assert self.scale_diag is not None
        return torch.diag_embed(self.scale_diag)

    @property
    def log_det_scale(self) -> Tensor:
        """The log-determinant log|S|, ``batch_shape``."""
        diag = self.scale_diag
        if diag is None:
            diag = self.scale_tril.diagonal(dim1=-2, dim2=-1)
        return diag.log().sum(-1)

    def whiten(self, matrix: Tensor) -> Tensor:
        """Return S⁻¹ X, (..., r, r)."""
        if self.scale_diag is not None:
            return matrix / self.scale_diag.unsqueeze(-1)
        return torch.linalg.solve_triangular(self.scale_tril, matrix, upper=False)

    def _chi_df(self) -> Tensor:
        """Return ν - i + 1 for i = 1..r, shape (*batch_shape, r)."""
        return _chi_df(self.df, self.rank)

    def _gamma_shape(self) -> Tensor:
        """Return half of that, (*batch_shape, r)."""
        if isinstance(self._df, Tensor):
            return self._chi_df() / 2
        return _gamma_shape(self._df, self.rank, *self._kind())

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        # χ(k) = sqrt(2 G) with G ~ Gamma(k / 2, 1), whose rsample is differentiable in k.
        # torch's draws of G are at least the smallest normal number.
        chi = (2 * torch._standard_gamma(self._gamma_shape().expand(shape[:-1]))).sqrt()
        factor = torch.randn(shape, dtype=chi.dtype, device=chi.device).tril_(-1)
        factor.diagonal(dim1=-2, dim2=-1).copy_(chi)
        if self.scale_diag is not None:
            return self.scale_diag.unsqueeze(-1) * factor
        return self.scale_tril @ factor

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        r, df = self.rank, self.df
        log_diagonal = value.diagonal(dim1=-2, dim2=-1).log()
        return (
            ((self._chi_df() - 1) * log_diagonal).sum(-1)
            - 0.5 * self.whiten(value).square().sum((-2, -1))
            - (0.5 * df - 1) * r * math.log(2.0)
            - df * self.log_det_scale
            - torch.mvlgamma(0.5 * df, r)
        )

    @property
    def mean(self) -> Tensor:
        """The mean E[L] = S diag(E[χ(ν - i + 1)]), E[χ(k)] = √2 Γ((k + 1) / 2) / Γ(k / 2)."""
        return self.scale_tril * self._chi_mean().unsqueeze(-2)

    @property
    def variance(self) -> Tensor:
        """The variance Var[L_ij] = Σ_k S_ik² Var[T_kj].

        Var[T] is 1 below the diagonal, and k - E[χ(k)]² on it.
        """
        r = self.rank
        below = torch.ones(r, r, dtype=self.df.dtype, device=self.df.device).tril(-1)
        on = torch.diag_embed(self._chi_df() - self._chi_mean().square())
        return self.scale_tril.square() @ (below + on)

    @property
    def wishart_mean(self) -> Tensor:
        """The mean of the Wishart, E[L Lᵀ] = ν S Sᵀ."""
        return self.df[..., None, None] * self.scale_tril @ self.scale_tril.mT

    def _chi_mean(self) -> Tensor:
        half = 0.5 * self._chi_df()
        return math.sqrt(2.0) * (torch.lgamma(half + 0.5) - torch.lgamma(half)).exp()


def _chi_df(df: Tensor, rank: int) -> Tensor:
    return df.unsqueeze(-1) - torch.arange(rank, dtype=df.dtype, device=df.device)


@lru_cache(maxsize=64)
def _number(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the cached tensor also serves training
        return torch.tensor(number, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _gamma_shape(df: float, rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _chi_df(_number(df, dtype, device), rank) / 2

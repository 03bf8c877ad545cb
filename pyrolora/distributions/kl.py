"""Closed-form Kullback-Leibler divergences, registered with torch (and so with Pyro)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import register_kl

from pyrolora.distributions.column_normal import ColumnNormal
from pyrolora.distributions.wishart_cholesky import WishartCholesky


@register_kl(WishartCholesky, WishartCholesky)
def _kl_wishart(p: WishartCholesky, q: WishartCholesky) -> Tensor:
    """KL of the factors' laws = KL of the Wisharts (L -> L Lᵀ is one to one).

    With V = S Sᵀ and ψ_r the multivariate digamma,

        KL = ½ ν_p (tr(V_q⁻¹ V_p) - r) - ½ ν_q log|V_q⁻¹ V_p|
             + log Γ_r(ν_q / 2) - log Γ_r(ν_p / 2) + ½ (ν_p - ν_q) ψ_r(ν_p / 2)
    """
    r = p.rank
    whitened = torch.linalg.solve_triangular(q.scale_tril, p.scale_tril, upper=False)
    trace = whitened.square().sum((-2, -1))
    log_det = 2 * whitened.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return (
        0.5 * p.df * (trace - r)
        - 0.5 * q.df * log_det
        + torch.mvlgamma(0.5 * q.df, r)
        - torch.mvlgamma(0.5 * p.df, r)
        + 0.5 * (p.df - q.df) * torch.digamma(0.5 * p._chi_df()).sum(-1)
    )


@register_kl(ColumnNormal, ColumnNormal)
def _kl_column_normal(p: ColumnNormal, q: ColumnNormal) -> Tensor:
    """Σ_l c_l [ ½ (‖S_q⁻¹ S_p‖² - r_l) - log|S_q⁻¹ S_p| ], over the r_l rows of each matrix.

    Row i of S_q⁻¹ S_p depends on the first i rows of both factors only, so that a lower rank cuts
    the sums by rows.
    """
    if p.groups != q.groups:
        raise ValueError(f"the matrices differ in shape: {p.groups} and {q.groups}")
    whitened = torch.linalg.solve_triangular(q.scale_tril, p.scale_tril, upper=False)
    per_row = 0.5 * (whitened.square().sum(-1) - 1) - whitened.diagonal(dim1=-2, dim2=-1).log()
    return (per_row * p.entry_weights()).sum((-2, -1))

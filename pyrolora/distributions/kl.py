"""Closed-form Kullback-Leibler divergences, registered with torch (and so with Pyro)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Independent, Normal, register_kl

from pyrolora.distributions.column_normal import ColumnNormal, whiten
from pyrolora.distributions.kronecker_normal import KroneckerNormal
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
    """Σ_l c_l [ ½ (‖S_q⁻¹ S_p‖² - r_l) - log|S_q⁻¹ S_p| ], over the r_l rows of each matrix, and
    ½ Σ_l ‖S_q⁻¹ (M_p - M_q)‖².

    Row i of S_q⁻¹ S_p depends on the first i rows of both factors only, so that a lower rank cuts
    the sums by rows.
    """
    if p.groups != q.groups:
        raise ValueError(f"the matrices differ in shape: {p.groups} and {q.groups}")
    whitened = torch.linalg.solve_triangular(q.scale_tril, p.scale_tril, upper=False)
    per_row = 0.5 * (whitened.square().sum(-1) - 1) - whitened.diagonal(dim1=-2, dim2=-1).log()
    divergence = (per_row * p.entry_weights()).sum((-2, -1))
    if p.loc is None and q.loc is None:
        return divergence
    apart = whiten(q.scale_tril, p.mean - q.mean, q.groups)
    return divergence + 0.5 * apart.square().sum(-1)


@register_kl(KroneckerNormal, Independent)
def _kl_kronecker_normal(p: KroneckerNormal, q: Independent) -> Tensor:
    """To independent normals N(μ_i, σ_i²) over the same entries, with v the variances of p:

        KL = ½ Σ_i [ (v_i + (m_i - μ_i)²) / σ_i² - 1 + log σ_i² ] - Σ_i log S_i

    The rotations are orthogonal, so that Σ_i log S_i² is the log-determinant of p.
    """
    base = q.base_dist
    if not isinstance(base, Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError("the KL of a KroneckerNormal is known to Normal(...).to_event(1)")
    moments = (p.variance + (p.loc - base.loc).square()) / base.scale.square()
    return (0.5 * (moments - 1) + base.scale.log() - p.scale.log()).sum(-1)

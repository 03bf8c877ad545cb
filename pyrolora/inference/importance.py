"""The importance of each rank of the adapters: by ablation on data, or by the posterior alone."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.adapters import FlatFactors
from pyrolora.columns import LABELS, Batch
from pyrolora.data.collate import pass_rows
from pyrolora.guides import Program
from pyrolora.model import JointModel, evaluating


@torch.no_grad()
def ablation(joint: JointModel, batch: Batch, rows: int = defaults.PREDICT_ROWS) -> Tensor:
    """Return AB-LoRA's importance of every rank, in nats per observation.

        score(all ranks) − score(all but this one) + score(this one alone)

    The score is the mean log-likelihood of ``batch`` under the mean adapter, in evaluation mode. It
    takes two evaluations per rank, which share passes as draws do.

    Parameters
    ----------
    joint
        The model.
    batch
        Labelled examples, on the model's device.
    rows
        The most rows (settings x examples) in one pass through the network.

    Returns
    -------
    Tensor
        (L, r_max), layers in the order of the bank's specs; NaN for ranks that are not active.

    References
    ----------
    Z. Liu et al. (2024), "ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language
    Models", NAACL, arXiv 2403.16187.
    """
    bank = joint.program.bank
    means = bank.means()
    active = bank.mask().to(means.B.device)
    observations = joint.task.count(batch[LABELS])
    step = max(1, pass_rows(batch, rows) // len(next(iter(batch.values()))))

    def score(masks: Tensor) -> Tensor:
        """Return the scores of S settings, (S,), with the ranks of ``masks`` (S, L, r_max)."""
        scores = []
        for part in masks.split(step):
            factors = FlatFactors(means.A, bank.kept("B", means.B, part))
            output = joint.network(batch, factors)
            scores.append(joint.task.log_prob(output, batch).double().sum(-1))
        return torch.cat(scores) / observations

    importance = torch.full(active.shape, torch.nan, dtype=torch.double, device=active.device)
    with evaluating(joint):
        whole = score(active[None])
        for places in active.nonzero().split(step):
            alone = torch.zeros(len(places), *active.shape, dtype=torch.bool, device=active.device)
            alone[torch.arange(len(places)), places[:, 0], places[:, 1]] = True
            worth = whole - score(active & ~alone) + score(alone)
            importance[places[:, 0], places[:, 1]] = worth
    return importance


@torch.no_grad()
def signal_to_noise(program: Program, num_samples: int = defaults.ALLOCATION_DRAWS) -> Tensor:
    """Return the squared signal-to-noise ratio of the update b_k a_kᵀ of every rank.

        s_a s_b / (s_a v_b + v_a s_b + v_a v_b),   s_a = ‖E a_k‖²,   v_a = E ‖a_k − E a_k‖²

    with a_k row k of A, b_k column k of B, independent under the guide; 0 where the signal is zero.
    E a_k and E b_k are those of the mean adapter. v are those that the guide states
    (`Program.variances`), or else means over draws. (The mean of S draws has the squared norm
    s + v / S on average, and would show a signal where there is none.) Noise in units of the rows
    has the same ratio at every size of the mean. What differs between ranks is then how far the
    data narrow them: often by less than draws could tell. The network is not run.

    Returns
    -------
    Tensor
        (L, r_max), layers in the order of the bank's specs; NaN for ranks that are not active.
        Infinite for a guide without width.
    """
    bank = program.bank
    with evaluating(program):
        means = program.mean()
        variances = program.variances() or _drawn(program, means, num_samples)
    signals, spreads = [], []
    for factor in "AB":
        mean, apart = (getattr(found, factor).double() for found in (means, variances))
        matrices = bank.layouts[factor].matrices
        signals.append({n: m.sum(-1) for n, m in matrices(mean.square()).items()})
        spreads.append({n: m.sum(-1) for n, m in matrices(apart).items()})
    active = bank.mask().to(means.A.device)
    ratios = torch.full(active.shape, torch.nan, dtype=torch.double, device=active.device)
    for ratio, name in zip(ratios, bank.specs, strict=True):
        (s_a, s_b), (v_a, v_b) = ((part[0][name], part[1][name]) for part in (signals, spreads))
        noise = s_a * v_b + v_a * s_b + v_a * v_b
        ratio[: len(noise)] = torch.where(s_a * s_b > 0, s_a * s_b / noise, 0.0)
    return ratios.masked_fill(~active, torch.nan)


def _drawn(program: Program, means: FlatFactors, num_samples: int) -> FlatFactors:
    """Return the mean squared distance of draws from the means."""
    factors = program.factors(program.draw(num_samples))
    A, B = (
        (getattr(factors, f) - getattr(means, f)).square().expand(num_samples, -1).mean(0)
        for f in "AB"
    )
    return FlatFactors(A, B)

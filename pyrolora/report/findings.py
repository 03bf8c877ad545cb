"""Findings of a report: each function warns of one thing, in plain words, or returns None."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pyrolora.diagnostics.chance import no_gain
from pyrolora.diagnostics.contraction import Contraction
from pyrolora.diagnostics.overconfidence import overconfidence
from pyrolora.guides.nuts import HIGH_R_HAT
from pyrolora.tasks import Prediction

ENOUGH_EXAMPLES = 100
ENOUGH_DRAWS = 16
LEAST_ENTRIES = 8
"""The fewest entries of the log that show a trend."""
MATERIAL_RISE = 0.05
"""The share of the whole rise of the ELBO that may still happen at the end."""


FindingName = Literal[
    "overconfident",
    "no_better_than_chance",
    "no_update",
    "prior_dominated",
    "not_converged",
    "chains_disagree",
    "few_examples",
    "few_draws",
]


@dataclass(frozen=True)
class Finding:
    """One warning.

    Attributes
    ----------
    name
        The name by which programs know it.
    title
        A heading.
    found
        What was found, with numbers.
    advice
        What to do.
    """

    name: FindingName
    title: str
    found: str
    advice: str


def overconfident(prediction: Prediction) -> Finding | None:
    """Warn where predictions promise more than they keep, by more than two standard errors.

    `Prediction.promise` says what is promised; a prediction without one is never warned about.
    """
    promise = prediction.promise()
    gap = None if promise is None else overconfidence(promise)
    if promise is None or gap is None:
        return None
    return Finding(
        "overconfident",
        "The predictions are overconfident",
        promise.statement.format(**dataclasses.asdict(gap)),
        "Do not read the probabilities as frequencies. Give the posterior more spread (a larger "
        "kl_weight, more latent factors, an ensemble), train for fewer epochs, or calibrate on "
        "held-out data (posterior.calibrate, pyrolora.predictive.Conformal).",
    )


def no_better_than_chance(
    prediction: Prediction, without_adapters: Callable[[], Prediction | None]
) -> Finding | None:
    """Warn where predictions are no better on these labels than those that ignore the fit.

    Parameters
    ----------
    prediction
        Its `baseline` is what it has to beat: for classes the frequencies of these labels, for a
        regression the normal distribution of these targets, so that no prediction that is the same
        for all examples is better.
    without_adapters
        Returns the prediction by the network without its adapters, the baseline of all others.
    """
    chance = no_gain(prediction, without_adapters)
    if chance is None:
        return None
    losses = ", and the answers are no closer either" if chance.losses_too else ""
    return Finding(
        "no_better_than_chance",
        f"The predictions are no better than the {chance.baseline}",
        f"The log-likelihood per {prediction.row} differs from that of the {chance.baseline} by "
        f"{chance.nats:+.3f} nats (standard error {chance.error:.3f}){losses}: nothing in these "
        f"{chance.n} {prediction.row}s shows that anything was learnt.",
        "Check that labels and inputs belong together and that the loss fell; train longer, or "
        "with more data. The width of the posterior is no evidence of learning: random labels "
        "change it as real ones do.",
    )


def prior_dominated(
    blocks: Sequence[Contraction],
    *,
    trained: bool = False,
    chosen: bool = False,
    relative: bool = False,
) -> Finding | None:
    """Warn where the posterior is its prior in more than half of the blocks.

    Parameters
    ----------
    trained
        Whether gradient steps made the widths (`has_trained_widths`), so that the schedule, and not
        the data, may have left them there.
    chosen
        Whether examples that were held back moved the width of prior and posterior: then it is no
        choice of the user's.
    relative
        Whether examples that are held back could choose it: with ``units="row"``.
    """
    same = [block for block in blocks if block.prior_dominated]
    if chosen or 2 * len(same) <= len(blocks):
        return None
    scales = np.median([block.scale for block in blocks])
    cause = "The data told the posterior next to nothing about them."
    if trained:
        cause = "Whether the data or the number of training steps is the cause is not known."
    choose = "Have examples choose its width (hold_back), l" if relative else "L"
    return Finding(
        "prior_dominated",
        "The spread of the adapters is the prior's, not the data's",
        f"In {len(same)} of {len(blocks)} blocks the draws have the prior's spread around the "
        f"prior's mean (median of posterior over prior spread: {scales:.2f}). {cause}",
        f"The uncertainty then measures the choice of the prior. {choose}ower kl_weight, use more "
        "data or train longer; or adapt fewer layers or ranks.",
    )


def no_update(norms: Mapping[str, float]) -> Finding | None:
    """Warn where the mean update, ‖s B A‖, is exactly zero in more than half of the layers.

    With B at its start no gradient of the data ever reached them, as Adam makes a step of any.
    """
    zero = [name for name, norm in norms.items() if norm == 0]
    if 2 * len(zero) <= len(norms):
        return None
    return Finding(
        "no_update",
        "The adapters never left their start",
        f"In {len(zero)} of {len(norms)} layers the mean update is exactly zero: no gradient of "
        "the data reached them, and the network predicts as without them.",
        "Check that the inputs reach these layers and that labels count. Means and widths there "
        "come from the start, the prior and the schedule, whatever they look like.",
    )


def not_converged(history: Sequence[Mapping[str, Any]]) -> Finding | None:
    """Warn where the ELBO was still rising when the training ended.

    The last two quarters of the log's entries are compared. The warning fires where the mean of the
    last exceeds that of the third by more than twice the standard error of the difference, with the
    scatter around a straight line, and by more than 5 % of the rise since the start. In an ensemble
    the member that rises most decides.
    """
    members: dict[Any, list[float]] = {}
    for entry in history:
        if "elbo" in entry:
            members.setdefault(entry.get("member"), []).append(float(entry["elbo"]))
    shares = [share for values in members.values() if (share := _rising(values)) is not None]
    if not shares:
        return None
    return Finding(
        "not_converged",
        "The fit had not converged",
        f"The objective (ELBO) was still rising at the end: {max(shares):.0%} of its whole rise "
        "came between the third and the last quarter of the training.",
        "Train for more epochs, or with a higher learning rate. The posterior's spread converges "
        "last and is to be trusted least.",
    )


def _rising(values: Sequence[float]) -> float | None:
    """Return the share of the whole rise in the last quarter, if it is more than noise."""
    if len(values) < LEAST_ENTRIES:
        return None
    quarter = len(values) // 4
    last = np.array(values[-2 * quarter :])
    steps = np.arange(len(last))
    residual = last - np.polyval(np.polyfit(steps, last, 1), steps)
    scatter = (residual @ residual / (len(last) - 2)) ** 0.5
    before, after = last[:quarter].mean(), last[quarter:].mean()
    whole = after - values[0]
    rise = after - before
    if rise > 2 * scatter * (2 / quarter) ** 0.5 and rise > MATERIAL_RISE * whole > 0:
        return float(rise / whole)
    return None


def chains_disagree(history: Sequence[Mapping[str, Any]]) -> Finding | None:
    """Warn where Markov chains have not mixed, or have diverged."""
    entry = next((entry for entry in reversed(history) if "r_hat" in entry), None)
    if entry is None or (entry["r_hat"] < HIGH_R_HAT and not entry.get("divergences")):
        return None
    return Finding(
        "chains_disagree",
        "The Markov chains are not to be trusted yet",
        f"R-hat of the adapter norms is {entry['r_hat']:.2f} (it should be below {HIGH_R_HAT}), "
        f"the effective sample size is {entry['effective_sample_size']:.0f}, and "
        f"{entry.get('divergences', 0)} steps diverged.",
        "Take more warmup_steps and num_samples, a higher target_accept_prob, or smaller adapters.",
    )


def few_examples(examples: int) -> Finding | None:
    """Warn of fewer than 100 examples to judge by."""
    if examples >= ENOUGH_EXAMPLES:
        return None
    return Finding(
        "few_examples",
        "There are few examples",
        f"With {examples} examples, a share among them, such as an accuracy of one half, is "
        f"known to ±{0.5 / examples**0.5:.2f} (a standard error), and each bin of the reliability "
        "table holds only a handful.",
        f"Take the numbers as rough, or score on at least {ENOUGH_EXAMPLES} examples.",
    )


def few_draws(draws: int, *, stored: int | None = None, point: bool = False) -> Finding | None:
    """Warn of fewer than 16 draws, where more could be had.

    Parameters
    ----------
    draws
        S; 0 for the mean adapter alone.
    stored
        How many draws are stored, where they are a list.
    point
        Whether the posterior is one point, so that all its draws are the same.
    """
    if point or draws >= min(ENOUGH_DRAWS, stored or ENOUGH_DRAWS):
        return None
    if draws < 2:
        found = "One setting of the adapters was used, so that nothing on this page shows what the "
        found += "posterior is unsure about: mutual information is zero everywhere."
    else:
        found = f"With {draws} draws a probability has a Monte Carlo error of up to "
        found += f"±{0.5 / draws**0.5:.2f}."
    return Finding("few_draws", "There are few draws", found, "Raise num_samples; 32 is usual.")

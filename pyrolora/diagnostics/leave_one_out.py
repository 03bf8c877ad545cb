"""Leave-one-out cross-validation of a posterior at any weight of the KL."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyrolora.arviz.containers import CALIBRATED, container, dataset, group_names, is_modern
from pyrolora.diagnostics.psis import psis
from pyrolora.errors import ConfigError, DataError

ATTRIBUTES = ("kl_weight", "temperature", "num_examples")
UNITS = {"log": 1, "negative_log": -1, "deviance": -2}
"""ArviZ's names for the scale of a score -> the factor of log p."""


def by_places(held_back: int) -> str:
    """Return the warning that examples held back are looked for in other data than the fit's."""
    return (
        f"{held_back} of the training examples were held back, and are known by their places "
        "alone; these are other examples than those of the fit, or in another order, so that "
        "others are left out: pass the training data as the fit got them"
    )


def loo(idata: Any) -> Any:
    """Estimate from the training data how well each example is predicted when it is left out.

    This is ``az.loo`` for a posterior of any β. The draws of a fit are aimed at
    ∝ p(θ) Π_i p(y_i|θ)^(1/β). The weights r_i = p(y_i|θ)^(−1/β), smoothed (PSIS), remove the
    contribution of example i from them, and it is scored by

        elpd_i = log Σ_s w_is p(y_i|θ_s),   w_i ∝ r_i, Σ_s w_is = 1,

    the log-density that the β-posterior of the other n − 1 examples gives it. ``az.loo`` has the
    weights of β = 1: from a cold posterior (β < 1) it removes too little, so that it is too good;
    from a hot one too much. At β = 1 both are the same.

    At a temperature T, which the fit or `calibrate` has chosen, the weights are the same, and the
    scored predictions are p_T(y_i|θ_s): elpd is that of T, and ``az.loo`` is at T = 1.

    Only the draws are weighed: means, heads and the noise of a regression that were fitted to the
    same example stay, so that the estimate is exact only for draws of the posterior itself. Of
    a text the weights do not take out the EOS, which a language model learns and no score has.

    Parameters
    ----------
    idata
        The result of ``Posterior.to_arviz(data=train, log_likelihood=True)`` for the training data,
        or what was read from its file, or several joined by `as_chains`. Of the training examples
        that the fit held back (``hold_back``) nothing is scored; they are known by their places, so
        that the order is that of the fit.

    Returns
    -------
    arviz.ELPDData
        With the values of every example and their k̂, which are those of the weights r_i; for
        ``print``, ``az.plot_khat``, and ``az.compare({"a": loo(a), "b": loo(b)})``.

    Raises
    ------
    ConfigError
        When there are no log-likelihoods or no β in ``idata``.
    DataError
        When the log-likelihoods belong to other examples than the training data, or are the same
        under every draw.

    References
    ----------
    A. Vehtari, A. Gelman, J. Gabry (2017), "Practical Bayesian model evaluation using leave-one-out
    cross-validation and WAIC", Statistics and Computing 27.
    """
    import arviz

    group, kept = _likelihoods(idata)
    posterior, beta = dataset(idata["posterior"]), float(group.attrs["kl_weight"])
    likelihoods = _by_example(group["y"])
    tempered = {"posterior": posterior, "log_likelihood": group.astype(float) / beta}
    # k̂ and its warning are those of the weights; the scores that they weigh are put in below.
    result = arviz.loo(container(arviz, tempered), pointwise=True)
    weights, _ = psis(-likelihoods / beta, _relative_efficiency(arviz, posterior))
    scores = likelihoods
    if group.attrs["temperature"] != 1:
        calibrated = _per_example(dataset(idata["sample_stats"])[[CALIBRATED]])[CALIBRATED]
        scores = _by_example(calibrated.isel(example=kept))
    each = np.logaddexp.reduce(weights + scores, axis=-1)
    whole = float((np.logaddexp.reduce(scores, axis=-1) - np.log(scores.shape[-1])).sum())
    return _replaced(arviz, result, each, whole)


def _likelihoods(idata: Any) -> tuple[Any, list[int]]:
    """Return log p(y_i|θ_s) of the examples that were learnt, and their places among all."""
    if "log_likelihood" not in group_names(idata):
        raise ConfigError(
            "leave-one-out weighs draws by the log-likelihoods of the training data, and idata has "
            "none; make them with posterior.to_arviz(data=train, log_likelihood=True)"
        )
    group = dataset(idata["log_likelihood"])
    if group.attrs.get("held_back") and not {"fit_seed", "temperature"} <= {*group.attrs}:
        raise ConfigError(
            "leave-one-out needs the examples that were learnt, and the fits that are joined here "
            "held back different ones; call loo on each, or fit with hold_back=0"
        )
    missing = [name for name in ATTRIBUTES if name not in group.attrs]
    if missing:
        raise ConfigError(
            f"the log-likelihoods have no attributes {missing}, which Posterior.to_arviz writes: "
            "so that the β of the fit is not known; az.loo takes β = 1"
        )
    group, expected = _per_example(group), group.attrs["num_examples"]
    kept = _learnt(group.attrs, group.sizes["example"])
    if len(kept) != expected:
        raise DataError(
            f"leave-one-out needs the training data, {expected} examples, got {len(kept)}; "
            "pass to_arviz the data that the posterior was fitted on, or score others with evaluate"
        )
    if group.attrs.get("other_data") and len(kept) < group.sizes["example"]:
        warnings.warn(by_places(int(group.attrs["held_back"])), UserWarning, stacklevel=3)
    group = group.isel(example=kept)
    if np.ptp(_by_example(group["y"]), axis=-1).max() == 0:
        raise DataError(
            "the log-likelihoods are the same under every draw: the posterior is a point, or has "
            "one draw, and no weights take an example out of it; score held-out data with evaluate"
        )
    return group, kept


def _learnt(attrs: Mapping[str, Any], n: int) -> list[int]:
    """Return which of n examples the posterior was fitted on, where n are all training examples."""
    held_back = int(attrs.get("held_back", 0))
    if not held_back or n != attrs["num_examples"] + held_back:
        return list(range(n))
    from pyrolora.data.prepared import at_random  # which needs torch, as nothing else here does

    apart = {*at_random(n, held_back, int(attrs.get("fit_seed", 0)))}
    return [number for number in range(n) if number not in apart]


def _per_example(group: Any) -> Any:
    """Sum the scores of the rows of each example, where a row is less than an example.

    The labels of such rows are the numbers of their examples.
    """
    row = next(dim for dim in group.dims if dim not in ("chain", "draw"))
    if row == "example":
        return group
    return group.groupby(row).sum(keep_attrs=True).rename({row: "example"})


def _by_example(scores: Any) -> np.ndarray:
    """Return scores as (n, S), in double precision."""
    values = scores.transpose("example", "chain", "draw").values
    return values.reshape(len(values), -1).astype(np.float64)


def _relative_efficiency(arviz: Any, posterior: Any) -> float:
    """Return effective draws over draws, which decides where the tail begins, as in ``az.loo``."""
    draws = posterior.sizes["chain"] * posterior.sizes["draw"]
    if posterior.sizes["chain"] == 1:
        return 1.0
    sizes = dataset(arviz.ess(posterior, method="mean"))
    return float(np.hstack([sizes[name].values.ravel() for name in sizes.data_vars]).mean() / draws)


def _replaced(arviz: Any, result: Any, each: np.ndarray, whole: float) -> Any:
    """Put the scores ``each``, (n,), into ArviZ's result; ``whole`` is that of unweighted draws."""
    total, p, pointwise = "elpd_loo", "p_loo", "loo_i"
    if is_modern(arviz):
        total, p, pointwise = "elpd", "p", "elpd_i"
    unit = UNITS[result["scale"]]
    result[total] = unit * float(each.sum())
    result["se"] = abs(unit) * float((len(each) * each.var()) ** 0.5)
    result[p] = whole - float(each.sum())
    result[pointwise] = result[pointwise].copy(data=unit * each)
    return result

"""Comparison of several posteriors on the same data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from pyrolora import defaults
from pyrolora.columns import INPUTS
from pyrolora.data.examples import as_examples
from pyrolora.data.labels import class_names_of, has_names, plain_name
from pyrolora.errors import ConfigError
from pyrolora.posterior import Posterior
from pyrolora.predictive import evaluate


def compare(
    posteriors: Mapping[str, Posterior],
    data: Any,
    num_samples: int | None = None,
    *,
    draws: Iterable[int] | None = None,
    outside: Any = None,
    batch_size: int = defaults.BATCH_SIZE,
    seed: int | None = None,
) -> pd.DataFrame:
    """Return the metrics of several posteriors on the same labelled data.

    Parameters
    ----------
    posteriors
        Name -> posterior; their networks may differ. Each predicts at its own temperature
        (`Posterior.calibrate`).
    data
        As in `Posterior.evaluate`.
    num_samples
        Draws per posterior; None: 32, or every member of an ensemble once.
    draws
        Instead of ``num_samples`` and ``seed``, the numbers of the draws of each posterior, as in
        `Posterior.sample`.
    outside
        Data of another distribution, labels not needed: adds ``ood_auroc``.
    batch_size
        Examples per batch.
    seed
        Makes the draws repeatable.

    Returns
    -------
    pandas.DataFrame
        One row per posterior, in the order of the mapping: the metrics of `Posterior.evaluate`,
        and ``nll_difference``, the mean over examples of how much the loss −log p̄ exceeds that of
        the posterior with the lowest mean, with its standard error ``difference_se`` (that of
        paired differences, since most of what makes an example hard is the same for all). For a
        language model these two are nats per text, not per token. ``pyrolora.report.as_table``
        makes a table for the terminal of it.

    Raises
    ------
    ConfigError
        For an empty mapping, values that are no posteriors, tasks that differ, or labels without
        names for networks that number their classes differently.
    """
    if not isinstance(posteriors, Mapping) or not posteriors:
        raise ConfigError(
            "compare() takes a mapping of names to posteriors, {'map': a, 'montec': b}, got "
            f"{posteriors!r:.80}"
        )
    for name, posterior in posteriors.items():
        if not isinstance(posterior, Posterior):
            raise ConfigError(
                f"{name!r} is a {type(posterior).__name__}, not a posterior; pass posteriors"
            )
    tasks = {posterior.task.name for posterior in posteriors.values()}
    if len(tasks) > 1:
        raise ConfigError(
            f"the posteriors have different tasks, {sorted(tasks)}; compare those of one task"
        )
    _check_classes(posteriors, data)
    numbers = next(iter(posteriors.values())).predictor.numbers(
        draws, num_samples=num_samples, seed=seed
    )
    options: dict[str, Any] = {"draws": numbers, "batch_size": batch_size, "seed": seed}
    rows, losses = {}, {}
    for name, posterior in posteriors.items():
        inside = posterior.predict(data, num_samples, **options)
        other = None
        if outside is not None:
            other = posterior.predict(posterior.inputs_of(outside), num_samples, **options)
        rows[name] = evaluate(inside, other)
        scores = inside.counted().log_predictive
        assert scores is not None
        losses[name] = -scores.double()
    best = losses[min(losses, key=lambda name: float(losses[name].mean()))]
    for name, loss in losses.items():
        if len(loss) != len(best):
            raise ConfigError(
                f"{name!r} sees {len(loss)} examples in the data, another posterior {len(best)}"
            )
        difference = loss - best
        rows[name]["nll_difference"] = float(difference.mean())
        deviation = float(difference.std()) if len(loss) > 1 else math.nan
        rows[name]["difference_se"] = deviation / math.sqrt(len(loss))
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("posterior")


def _check_classes(posteriors: Mapping[str, Posterior], data: Any) -> None:
    """Raise `ConfigError` for labels that are numbers, of networks that number classes differently.

    Labels that are names are turned into the numbers of each network.
    """
    orders = {
        name: class_names_of(posterior.base, posterior.task)
        for name, posterior in posteriors.items()
        if posterior.task.names_classes
    }
    for (one, first), (other, second) in itertools.combinations(orders.items(), 2):
        names = set(first.values())
        plain, others = ([*map(plain_name, order.values())] for order in (first, second))
        if plain == others or {*plain} != {*others}:
            continue
        if not has_names(as_examples(data, INPUTS, defaults.SCORE_SPLITS), names):
            raise ConfigError(
                f"the networks number their classes differently, {one!r} {first} and {other!r} "
                f"{second}, and the data's labels are numbers; give them names: "
                "data.cast_column('label', datasets.ClassLabel(names=[...]))"
            )

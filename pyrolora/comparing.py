"""Comparison of several posteriors on the same data."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from pyrolora import defaults
from pyrolora.columns import INPUTS
from pyrolora.data.examples import as_examples
from pyrolora.data.labels import class_names_of, has_names, plain_name
from pyrolora.errors import ConfigError, listed
from pyrolora.posterior import Posterior
from pyrolora.predictive import TokenPrediction
from pyrolora.predictive.standard_errors import Scores, scores


def compare(
    posteriors: Mapping[str, Posterior],
    data: Any,
    num_samples: int | None = None,
    *,
    draws: Iterable[int] | None = None,
    outside: Any = None,
    reference: str | None = None,
    batch_size: int = defaults.BATCH_SIZE,
    seed: int | None = None,
) -> pd.DataFrame:
    """Return the metrics of several posteriors on the same labelled data.

    Parameters
    ----------
    posteriors
        Name -> posterior; their networks may differ. Each predicts at its own
        `Posterior.temperature`.
    data
        As in `Posterior.evaluate`.
    num_samples
        Draws per posterior; None: 32, or every member of an ensemble once.
    draws
        Instead of ``num_samples`` and ``seed``, the numbers of the draws of each posterior, as in
        `Posterior.sample`.
    outside
        Data of another distribution, labels not needed: adds ``ood_auroc``.
    reference
        The name of the posterior that the others are compared with; None: the one with the lowest
        ``nll`` on these data.
    batch_size
        Examples per batch.
    seed
        Makes the draws repeatable.

    Returns
    -------
    pandas.DataFrame
        One row per posterior, in the order of the mapping. For each metric of `Posterior.evaluate`,
        such as ``accuracy``, there are ``accuracy`` and ``accuracy_se``, its standard error over
        examples; and, for two posteriors or more, ``accuracy_difference``, its excess over that of
        the reference, ``accuracy_difference_se``, and ``accuracy_more_than_chance``: whether the
        95 % interval of the difference leaves zero out
        (`pyrolora.predictive.standard_errors.Difference`). Differences are paired: most of what
        makes an example hard is the same for all posteriors. Standard errors of means are closed
        forms, those of other metrics come from the bootstrap. Of many differences that are all
        chance, one in 20 still passes for more. ``pyrolora.report.as_table`` makes a table for the
        terminal of it.

    Raises
    ------
    ConfigError
        For an empty mapping, values that are no posteriors, an unknown reference, tasks that
        differ, or labels without names for networks that number their classes differently.
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
    if reference is not None and reference not in [*posteriors]:
        raise ConfigError(
            f"reference must be the name of a posterior, one of {listed([*posteriors], None)}, got "
            f"{reference!r}"
        )
    _check_classes(posteriors, data)
    numbers = next(iter(posteriors.values())).predictor.numbers(
        draws, num_samples=num_samples, seed=seed
    )
    options: dict[str, Any] = {"draws": numbers, "batch_size": batch_size, "seed": seed}
    scored: dict[str, Scores] = {}
    seen: dict[str, int] = {}
    tokens: dict[str, Any] = {}
    for name, posterior in posteriors.items():
        inside = posterior.predict(data, num_samples, **options)
        other = None
        if outside is not None:
            other = posterior.predict(posterior.inputs_of(outside), num_samples, **options)
            seen[name] = len(other.examples.unique())
        scored[name] = scores(inside, other)
        tokens[name] = inside.num_tokens if isinstance(inside, TokenPrediction) else None
    _check_examples({name: one.examples for name, one in scored.items()}, "data")
    if seen:
        _check_examples(seen, "outside data")
    _warn_of_tokens(tokens)
    if reference is None:
        reference = min(scored, key=lambda name: scored[name].metrics["nll"])
    against = scored[reference] if len(scored) > 1 else None
    rows = {name: dict(_columns(one, against)) for name, one in scored.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("posterior")


def _columns(one: Scores, reference: Scores | None) -> Iterator[tuple[str, float | bool]]:
    """Yield the columns of each metric of one posterior."""
    for name, value in one.metrics.items():
        yield name, value
        yield f"{name}_se", one.error(name)
        if reference is None or name not in reference.metrics:
            continue
        difference = one.difference(reference, name)
        yield f"{name}_difference", difference.value
        yield f"{name}_difference_se", difference.error
        yield f"{name}_more_than_chance", difference.more_than_chance


def _check_examples(seen: Mapping[str, int], where: str) -> None:
    """Raise `ConfigError` where posteriors see different numbers of examples."""
    (first, one), *others = seen.items()
    for name, other in others:
        if other != one:
            raise ConfigError(
                f"{name!r} sees {other} examples in the {where}, {first!r} {one}; give examples "
                "that all of them can read, none of which is empty or cut away"
            )


def _warn_of_tokens(tokens: Mapping[str, Any]) -> None:
    """Warn of language models that count other tokens, whose scores per token say nothing."""
    (first, one), *others = tokens.items()
    for name, other in others:
        if one is not None and other is not None and one.tolist() != other.tolist():
            warnings.warn(
                f"{name!r} counts {int(other.sum())} tokens in the data, {first!r} "
                f"{int(one.sum())}: nats per token, and perplexities, of different tokens cannot "
                "be compared; compare the sums, posterior.log_likelihood(data)",
                UserWarning,
                stacklevel=3,
            )


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

"""One self-contained page about a posterior: no script, no network, readable on a narrow screen."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from pyrolora import defaults
from pyrolora.checks import path_like
from pyrolora.data.labels import class_names_of
from pyrolora.diagnostics.chance import without_adapters
from pyrolora.diagnostics.contraction import (
    Contraction,
    contractions,
    update_norms,
)
from pyrolora.errors import ConfigError, listed
from pyrolora.files import write_whole
from pyrolora.guides import full_name
from pyrolora.guides.wrapping import innermost
from pyrolora.predictive import auroc, evaluate, reliability_table
from pyrolora.predictive.standard_errors import scores
from pyrolora.report import findings
from pyrolora.report.examples import Examples
from pyrolora.report.facts import (
    Subject,
    chose_width,
    data_facts,
    label_table,
    option_facts,
    posterior_facts,
    versions,
)
from pyrolora.report.findings import Finding
from pyrolora.report.pictures import fit_pictures, posterior_pictures, prediction_pictures
from pyrolora.report.shaded import shaded_texts
from pyrolora.report.tables import Estimate, example_tables, metrics_table
from pyrolora.report.widths import about_widths, contraction_table, prior_finding
from pyrolora.tasks import Prediction

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Judgement:
    """A posterior judged by data.

    Attributes
    ----------
    findings
        The warnings.
    metrics
        Scores by name; without labels only ``ood_auroc``, if there are outside data.
    prediction, outside
        The predictions for the data, and for outside data.
    which
        The draws, as options of `Posterior.predict`.
    blocks
        The spread of every block against the prior's.
    plain
        Predicts without the adapters.
    """

    findings: list[Finding]
    metrics: dict[str, float]
    prediction: Prediction
    outside: Prediction | None
    which: dict[str, Any]
    blocks: list[Contraction]
    plain: Callable[[], Prediction | None]


def judge_by(
    posterior: Subject,
    data: Any,
    *,
    outside: Any = None,
    num_samples: int | None = None,
    draws: Iterable[int] | None = None,
    batch_size: int = defaults.BATCH_SIZE,
    seed: int | None = None,
) -> Judgement:
    """Return the scores and warnings of a report; the parameters are those of `report_on`."""
    which = _draws(posterior, num_samples, draws, seed)
    count = len(which["draws"]) if "draws" in which else which["num_samples"]
    options: dict[str, Any] = {"batch_size": batch_size, **which}
    prediction = posterior.predict(data, **options)
    other = None
    if outside is not None:
        other = posterior.predict(posterior.inputs_of(outside), **options)
    metrics = _metrics(prediction, other)
    blocks = contractions(posterior.model.program)
    plain = cache(partial(without_adapters, posterior, data, batch_size))
    warnings = _findings(posterior, prediction, count, blocks, plain)
    return Judgement(warnings, metrics, prediction, other, which, blocks, plain)


@dataclass(frozen=True)
class Report:
    """A page about a posterior, with its warnings and metrics.

    Attributes
    ----------
    html
        The whole page.
    findings
        The warnings, as they stand on the page.
    metrics
        Scores by name; without labels only ``ood_auroc``, if there are outside data.
    """

    html: str
    findings: list[Finding]
    metrics: dict[str, float]

    def write(self, path: str | Path) -> Path:
        """Write the page, whole or not at all, over an older one."""
        file = page_file(path)
        write_whole(file, self.html.encode())
        return file


def page_file(path: str | Path) -> Path:
    """Return the path to write a page to.

    Raises
    ------
    ConfigError
        When ``path`` is a folder, or its folder does not exist.
    """
    path_like("path", path)
    file = Path(path)
    if file.is_dir():
        raise ConfigError(
            f"{file} is a folder; name a file in it, such as {str(file / 'report.html')!r}"
        )
    if not file.parent.is_dir():
        raise ConfigError(f"there is no folder {file.parent} to write {file.name} to; make it")
    return file


def report_on(
    posterior: Subject,
    data: Any,
    *,
    outside: Any = None,
    num_samples: int | None = None,
    draws: Iterable[int] | None = None,
    batch_size: int = defaults.BATCH_SIZE,
    seed: int | None = None,
) -> Report:
    """Make the report that `Posterior.report` writes; the parameters are described there."""
    judged = judge_by(
        posterior,
        data,
        outside=outside,
        num_samples=num_samples,
        draws=draws,
        batch_size=batch_size,
        seed=seed,
    )
    prediction, other, which = judged.prediction, judged.outside, judged.which
    names = class_names_of(posterior.base, posterior.task)
    examples = Examples(data, posterior.base, posterior.tokenizer, names)
    idata = posterior.to_arviz(seed=which.get("seed"))
    estimates = _estimates(prediction, other, judged.plain)
    texts = []
    if prediction.token_entropy is not None:
        texts = shaded_texts(posterior, prediction, examples, which)
    decisions = prediction.decisions()
    html = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            title=f"{full_name(posterior.options)} on {type(posterior.base).__name__}",
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            draws=_stated(which),
            size=len(examples),
            outside_size=None if other is None else len(other.examples.unique()),
            findings=judged.findings,
            metrics=metrics_table(judged.metrics, estimates, prediction.higher_is_better),
            pictures=list(prediction_pictures(prediction, other)),
            reliability=_used_bins(decisions)
            if decisions and decisions.targets is not None
            else None,
            tables=example_tables(prediction, examples),
            texts=texts,
            fit_pictures=list(fit_pictures(posterior.history)),
            posterior_pictures=list(
                posterior_pictures(idata, innermost(posterior.model.program).options.unit)
            ),
            contractions=contraction_table(judged.blocks),
            about_widths=about_widths(
                posterior.model.program, judged.blocks, chosen=chose_width(posterior)
            ),
            labelled=prediction.targets is not None,
            facts_of_posterior=posterior_facts(posterior),
            options=option_facts(posterior.options),
            layers=list(posterior.bank.specs.values()),
            data=data_facts(examples, prediction),
            labels=label_table(examples, prediction),
            versions=versions(),
        )
    )
    return Report(html, judged.findings, judged.metrics)


def _draws(
    posterior: Subject, num_samples: int | None, draws: Iterable[int] | None, seed: int | None
) -> dict[str, Any]:
    """Return the draws as options of `Posterior.predict`, with a number and a seed in any case."""
    numbers = posterior.predictor.numbers(draws, num_samples=num_samples, seed=seed)
    if numbers is not None:
        return {"draws": numbers}
    if num_samples is None:
        num_samples = posterior.model.program.usual_draws()
    return {
        "num_samples": num_samples,
        "seed": int(torch.randint(2**31, ())) if seed is None else seed,
    }


def _stated(which: Mapping[str, Any]) -> str:
    """Return the draws in words."""
    if "draws" in which:
        return f"the draws {listed(which['draws'], most=20)}"
    count = which["num_samples"]
    return f"{f'{count} draws' if count else 'the mean adapter'}, seed {which['seed']}"


def _metrics(prediction: Prediction, outside: Prediction | None) -> dict[str, float]:
    """Return the scores; without labels only how well outside data are told apart."""
    if prediction.targets is not None:
        return evaluate(prediction, outside)
    if outside is None:
        return {}
    return {"ood_auroc": auroc(prediction.uncertainty, outside.uncertainty)}


def _estimates(
    prediction: Prediction,
    outside: Prediction | None,
    plain: Callable[[], Prediction | None],
) -> dict[str, Estimate]:
    """Return the standard error of each metric, and its difference without the adapters."""
    if prediction.targets is None:
        return {}
    one, other = scores(prediction, outside), plain()
    if type(other) is not type(prediction):  # none, or that of another task than the choice of one
        return {name: Estimate(error) for name, error in one.errors().items()}
    assert other is not None
    without = scores(other)
    return {
        name: Estimate(error, one.difference(without, name) if name in without.metrics else None)
        for name, error in one.errors().items()
    }


def _findings(
    posterior: Subject,
    prediction: Prediction,
    num_samples: int,
    blocks: list[Contraction],
    plain: Callable[[], Prediction | None],
) -> list[Finding]:
    """Return all warnings; ``plain`` predicts without the adapters."""
    program = posterior.model.program
    sites = posterior.sample(2, seed=0)
    factors = program.factors(sites)
    point = factors.draws is None or len(factors.distinct()[1]) < 2
    checked = [
        findings.overconfident(prediction),
        findings.no_better_than_chance(prediction, plain),
        findings.no_update(update_norms(program)),
        prior_finding(posterior, blocks),
        findings.not_converged(posterior.history),
        findings.chains_disagree(posterior.history),
        findings.few_examples(len(prediction.examples.unique())),
        findings.few_draws(num_samples, stored=program.stored(), point=point),
    ]
    return [finding for finding in checked if finding is not None]


def _used_bins(prediction: Prediction) -> pd.DataFrame:
    """Return the reliability table without empty bins, with the gap of each."""
    table = reliability_table(prediction)
    table = table[table["count"] > 0]
    bins = [f"{low:.2f} to {high:.2f}" for low, high in zip(table.low, table.high, strict=True)]
    return table.drop(columns=["low", "high"]).assign(
        **{"confidence in": bins, "gap": table.confidence - table.accuracy}
    )[["confidence in", "count", "confidence", "accuracy", "gap"]]


def _environment() -> Environment:
    """Return jinja's environment; it escapes all text of the data."""
    environment = Environment(
        loader=PackageLoader("pyrolora.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    return environment


def _number(value: Any) -> str:
    """Format whole numbers and texts as they are, other numbers with three digits."""
    if isinstance(value, bool | str | int | np.integer):
        return str(value)
    if not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"

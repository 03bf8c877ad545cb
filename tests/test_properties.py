"""Any argument and any data is taken rightly, or refused by an error of ours."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from problems import WORDS, bert, llama, reviews, texts, tokenizer

import pyrolora
from pyrolora import AdapterConfig, RankAllocation, TextOptions, guides
from pyrolora.errors import ConfigError, PyroLoraError

FEW = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
FEWER = settings(FEW, max_examples=8)  # of what takes a fit, or a prediction
ODD: list[Any] = [
    *([], {}, (), [0], [1.5], {"a": 1}, {1}, range(3), object(), print, b"x", 1 + 2j),
    *(Fraction(1, 2), Decimal("0.5"), 10**400, -(10**400), 2**31, 2**63, 2**64, 1e308),
    *(np.float32(0.5), np.int64(2), np.array(2), np.array([1, 2]), np.bool_(True)),
    *(torch.tensor(2), torch.tensor(0.5), torch.tensor([1, 2]), torch.float32),
    *("mean", "A", "row", "montec", "1", "", "\ud800", "a\x00b", "é" * 300),
]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(ODD),
)
"""Values of every kind; whole numbers are small, since many draws only take long, or too large."""
DATA = reviews(4)


def accepted(call: Callable[[], Any]) -> Any:
    """Return what the call does, or None where it is refused by an error with all its parts."""
    try:
        return call()
    except PyroLoraError as error:
        message = str(error)
        assert len(message) > 20, message
        message.encode()  # it can be written
        return None


OPTIONS = [
    (kind, field.name)
    for kind in (*map(guides.guide_class, guides.available()), AdapterConfig, TextOptions)
    for field in dataclasses.fields(kind)
] + [(RankAllocation, field.name) for field in dataclasses.fields(RankAllocation)]


@FEW
@given(st.sampled_from(OPTIONS), VALUES)
def test_an_option_is_taken_or_refused(option: tuple[Any, str], value: Any) -> None:
    check_option(option, value)


def check_option(option: tuple[Any, str], value: Any) -> None:
    kind, name = option
    made = accepted(lambda: kind(**{name: value}))
    if made is None:
        return
    assert made == kind(**{name: value})
    if isinstance(made, guides.Guide) and isinstance(value, float):
        assert math.isfinite(value)
    accepted(lambda: guides.as_guide(made)) if isinstance(made, guides.Guide) else None


@pytest.fixture(scope="module")
def posterior() -> pyrolora.Posterior:
    options = {"epochs": 1, "seed": 0, "adapter": AdapterConfig(r=2), "tokenizer": tokenizer()}
    return pyrolora.fit(bert(initializer_range=0.3), reviews(8), "montec", **options)


@pytest.fixture(scope="module")
def writer() -> pyrolora.Posterior:
    options = {"epochs": 1, "seed": 0, "adapter": AdapterConfig(r=2), "tokenizer": tokenizer()}
    return pyrolora.fit(llama(), texts(8), "montec", **options)


ARGUMENTS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "sample": (lambda p, **o: p.sample(**o), ("num_samples", "draws", "seed")),
    "predict": (
        lambda p, **o: p.predict(**{"data": DATA, "num_samples": 2, **o}),
        ("num_samples", "batch_size", "seed", "data"),
    ),
    "predict by numbers": (lambda p, **o: p.predict(DATA, **o), ("draws",)),
    "evaluate": (
        lambda p, **o: p.evaluate(DATA, **{"num_samples": 2, **o}),
        ("num_samples", "batch_size", "seed", "outside"),
    ),
    "log_likelihood": (
        lambda p, **o: p.log_likelihood(DATA, **{"num_samples": 2, **o}),
        ("num_samples", "batch_size", "seed"),
    ),
    "to_arviz": (
        lambda p, **o: p.to_arviz(**{"num_samples": 2, **o}),
        ("num_samples", "data", "seed", "log_likelihood", "factors"),
    ),
    "khat": (
        lambda p, **o: p.khat(reviews(8), **{"num_samples": 25, **o}),
        ("num_samples", "seed", "per_layer"),
    ),
    "factors": (lambda p, **o: p.factors(**o), ("draws",)),
    "merge": (lambda p, **o: p.merge(**o), ("draw", "dequantize")),
    "interval": (lambda p, **o: p.predict(DATA, 2, seed=0).interval(**o), ("mass",)),
    "report": (lambda p, **o: p.report(**{"data": DATA, "num_samples": 2, **o}), ("path",)),
    "save": (lambda p, **o: p.save(**o), ("path",)),
    "to_peft": (lambda p, **o: p.to_peft(**o), ("path",)),
    "card": (lambda p, **o: p.card(**o), ("repo_id",)),
    "pipeline": (lambda p, **o: p.pipeline(**o), ("task", "num_samples", "draws", "seed")),
    "select": (lambda p, **o: p.predict(DATA, 0).select(**o), ("rows",)),
    "temperature": (lambda p, **o: setattr(p, "temperature", o["value"]), ("value",)),
    "texts": (lambda p, **o: setattr(p, "texts", o["value"]), ("value",)),
    "compare": (
        lambda p, **o: pyrolora.compare(**{"posteriors": {"it": p}, "data": DATA, **o}),
        ("posteriors", "data", "num_samples", "draws", "batch_size", "seed", "reference"),
    ),
}
USES = [(use, name) for use, (_, names) in ARGUMENTS.items() for name in names]


@settings(FEW, max_examples=20)
@given(st.sampled_from(USES), VALUES)
def test_an_argument_is_taken_or_refused(posterior: Any, use: Any, value: Any) -> None:
    check_argument(posterior, use, value)


def check_argument(posterior: Any, use: tuple[str, str], value: Any) -> None:
    name, argument = use
    assume(not (argument == "path" and isinstance(value, str)))  # nothing is written here
    assume(not (argument in ("data", "outside") and callable(value)))
    try:
        accepted(lambda: ARGUMENTS[name][0](posterior, **{argument: value}))
    finally:
        posterior.temperature = 1.0


@FEW
@given(st.data())
def test_an_argument_of_a_plot_is_taken_or_refused(posterior: Any, data: Any) -> None:
    """Every argument of every plot; one that is refused has drawn nothing."""
    prediction = posterior.predict(DATA, 2, seed=0)
    usual = {
        "history": posterior.history,
        "idata": posterior.to_arviz(2, seed=0),
        "probs": prediction.probs,
        "targets": prediction.targets,
        "inside": prediction.entropy,
        "prediction": prediction,
        "tokens": ["a", "b"],
        "values": [0.5, 1.0],
    }
    name = data.draw(st.sampled_from(pyrolora.plots.__all__))
    plot = getattr(pyrolora.plots, name)
    parameters = inspect.signature(plot).parameters
    argument, value = data.draw(st.sampled_from([*parameters])), data.draw(VALUES)
    assume(not (argument == "bins" and isinstance(value, int | np.integer) and value > 100))
    axes = Figure().subplots()
    options = {p: usual[p] for p in parameters if p in usual}
    drawn = accepted(lambda: plot(**{**options, "ax": axes, argument: value}))
    assert drawn is axes or (drawn is None and not axes.has_data())


@pytest.mark.parametrize("count", [2**31, 2**63, 10**400])
def test_more_draws_than_there_is_memory_for_are_refused(posterior: Any, count: int) -> None:
    for use in (posterior.sample, posterior.summary, lambda n: posterior.predict(DATA, n)):
        with pytest.raises(ConfigError, match="num_samples must be at most"):
            use(count)


def test_a_rate_that_no_float_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match="learning_rate must be a finite number"):
        pyrolora.fit(bert(), DATA, tokenizer=tokenizer(), learning_rate=10**400)


WRITTEN = ("num_samples", "seed", "inputs", "max_new_tokens", "temperature", "top_k", "top_p")


@FEWER
@given(st.sampled_from(WRITTEN), VALUES)
def test_an_argument_of_writing_is_taken_or_refused(writer: Any, name: str, value: Any) -> None:
    options = {"inputs": ["the film"], "num_samples": 1, "max_new_tokens": 2, "do_sample": True}
    accepted(lambda: writer.generate(**{**options, name: value}))


FITTED = (
    *("guide", "epochs", "learning_rate", "batch_size", "seed", "adapter", "task", "choices"),
    *("texts", "prior", "training", "callbacks", "num_examples", "eval_data", "tokenizer"),
)


@FEWER
@given(st.sampled_from(FITTED), VALUES)
def test_an_argument_of_a_fit_is_taken_or_refused(name: str, value: Any) -> None:
    assume(not (name == "epochs" and isinstance(value, int | float) and value > 5))
    options = {"epochs": 1, "adapter": AdapterConfig(r=2), "tokenizer": tokenizer()}
    network = bert()
    found = accepted(lambda: pyrolora.fit(network, DATA, **{**options, name: value}))
    assert found is None or isinstance(found, pyrolora.Posterior)


CELLS = st.one_of(
    st.text(max_size=6),
    st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join),
    st.none(),
    st.integers(-2, 3),
    st.floats(),
    st.lists(st.integers(-1, 20), max_size=4),
)
COLUMNS = st.sampled_from(["text", "label", "labels", "input_ids", "sentence", "other", "choices"])
TABLES = st.lists(st.dictionaries(COLUMNS, CELLS, max_size=3), max_size=4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@FEW
@given(st.one_of(TABLES, st.lists(CELLS, max_size=4), VALUES))
def test_data_is_predicted_or_refused(posterior: Any, data: Any) -> None:
    found = accepted(lambda: posterior.predict(data, 2, seed=0))
    if found is not None:
        assert found.draws.shape[1] == len(data)
        assert torch.isfinite(found.draws).all()


@pytest.mark.filterwarnings("ignore::UserWarning")
@FEWER
@given(TABLES)
def test_data_is_learnt_or_refused(data: Any) -> None:
    options = {"epochs": 1, "adapter": AdapterConfig(r=2), "tokenizer": tokenizer()}
    found = accepted(lambda: pyrolora.fit(bert(), data, "map", **options))
    assert found is None or torch.isfinite(found.predict(data, 0).draws).all()


SENTENCES = st.lists(
    st.lists(st.sampled_from(WORDS[4:]), max_size=9).map(" ".join), min_size=1, max_size=5
)


@FEWER
@given(SENTENCES, st.integers(1, 5), st.integers(0, 2**64 - 1))
def test_a_prediction_depends_neither_on_its_batch_nor_on_its_neighbours(
    posterior: Any, sentences: list[str], size: int, seed: int
) -> None:
    together = posterior.predict(sentences, 2, batch_size=size, seed=seed).draws
    for number, sentence in enumerate(sentences[:3]):
        alone = posterior.predict([sentence], 2, seed=seed).draws
        torch.testing.assert_close(together[:, number], alone[:, 0], rtol=1e-4, atol=1e-5)

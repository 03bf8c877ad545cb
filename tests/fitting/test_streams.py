"""Streams: the steps of a fit read a part of them, which stands for all n examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from problems import arguments, llama, reviews, tokenizer

import pyrolora
from pyrolora import AdapterConfig, TextOptions
from pyrolora.errors import ConfigError, DataError
from pyrolora.guides import MeanField

TEXTS = reviews(24).remove_columns("label")


def stream() -> datasets.IterableDataset:
    return TEXTS.to_iterable_dataset()


def fitted(data: Any, folder: Path, guide: Any = None, **options: Any) -> Any:
    args = {name: options.pop(name) for name in ("max_steps",) if name in options}
    return pyrolora.fit(
        llama(initializer_range=0.3), data, MeanField() if guide is None else guide,
        tokenizer=tokenizer(), adapter=AdapterConfig(r=2), training=arguments(folder, **args),
        **options,
    )  # fmt: skip


def test_a_stream_is_learnt_as_the_examples_that_its_steps_read(tmp_path: Path) -> None:
    """Six steps of four examples read all 24: the fit is that of the data set."""
    found = fitted(stream(), tmp_path, num_examples=24)
    expected = fitted(TEXTS, tmp_path)
    assert found.model.num_examples == 24
    assert found.history[5]["loss"] == expected.history[5]["loss"]
    for name, pair in found.factors().items():
        assert all(map(torch.equal, pair, expected.factors()[name]))


def test_examples_of_a_stream_stand_for_all_of_it(tmp_path: Path) -> None:
    """The log-likelihood is scaled to n, the KL is not, and the loss stays one per token."""
    part, whole = (
        fitted(stream(), tmp_path, num_examples=n, max_steps=1) for n in (24, 2400)
    )  # fmt: skip
    few, many = part.history[0], whole.history[0]
    assert whole.model.num_examples == 2400
    assert many["log_likelihood"] == pytest.approx(100 * few["log_likelihood"], rel=1e-4)
    assert many["kl/A"] == pytest.approx(few["kl/A"], rel=1e-5)
    assert -many["log_likelihood"] / 100 == pytest.approx(-few["log_likelihood"], rel=1e-4)
    assert abs(many["loss"]) < 2 * abs(few["loss"])


def test_the_texts_of_a_stream_are_packed(tmp_path: Path) -> None:
    packed = TextOptions(packing=True, max_length=30)
    made = fitted(stream(), tmp_path, "map", num_examples=24, max_steps=2, texts=packed)
    assert made.model.num_examples == 24
    assert made.model.rows == 24


def test_packed_rows_of_a_stream_are_as_many_as_the_steps_read(tmp_path: Path) -> None:
    packed = TextOptions(packing=True, max_length=200)
    read: list[int] = []

    def examples() -> Any:
        for number in range(240):
            read.append(number)
            yield TEXTS[number % len(TEXTS)]

    data = datasets.IterableDataset.from_generator(examples)
    made = fitted(data, tmp_path, "map", num_examples=240, max_steps=1, texts=packed)
    assert made.model.num_examples == 240
    assert max(read) > 8  # four rows hold more than four texts each
    assert made.history[-1]["epoch"] <= 1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, DataError, "the size of a streamed data set is unknown.*pass num_examples="),
        ({"num_examples": 0}, ConfigError, "num_examples must be a whole number"),
        ({"num_examples": 24, "max_steps": -1}, DataError, "say how many steps"),
        ({"num_examples": 20}, DataError, "num_examples=20, and the stream goes on after 24"),
        ({"num_examples": 50, "max_steps": 9}, DataError, "the stream has 24 examples"),
        ({"num_examples": 24, "guide": "laplace"}, ConfigError, "'laplace' needs all examples at"),
        ({"num_examples": 24, "guide": "nuts"}, ConfigError, "'nuts' needs all examples at once"),
    ],
    ids=str,
)
def test_a_stream_of_unknown_size_is_refused(
    options: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        fitted(stream(), tmp_path, **options)


def test_other_data_say_their_size_themselves(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_examples is for streams"):
        fitted(TEXTS, tmp_path, num_examples=24)
    made = fitted(TEXTS, tmp_path, "map", max_steps=1)
    with pytest.raises(DataError, match=r"from_list\(list\(data.take\(n\)\)\)"):
        made.predict(stream())

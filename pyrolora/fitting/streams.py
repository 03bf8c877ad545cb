"""Streams as training data: the examples that the steps of a fit read, which stand for all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import datasets
from transformers import TrainingArguments

from pyrolora.checks import whole_number
from pyrolora.data import Prepared
from pyrolora.errors import ConfigError, DataError
from pyrolora.fitting.request import Request
from pyrolora.fitting.training import arguments_of


def read_stream(request: Request) -> Request:
    """Return the request with the first examples of its stream in memory, if it has one.

    They are as many as the steps read, each once, in the order that the Trainer draws. The
    log-likelihood of n examples, ``num_examples``, is estimated by theirs: a step's b examples are
    scaled by n / b, as in any fit.

    Raises
    ------
    ConfigError
        For a guide that needs all examples at once, and ``num_examples`` of other data.
    DataError
        For a stream without ``max_steps`` or ``num_examples``, or with another number of examples
        than that.
    """
    data = request.data
    if isinstance(data, datasets.IterableDatasetDict):
        data = data.get("train", data)
    if not isinstance(data, datasets.IterableDataset):
        if request.num_examples is not None:
            raise ConfigError(
                "num_examples is for streams (datasets.IterableDataset), whose size is not known; "
                "leave it out"
            )
        return request
    count = _needed(request, arguments_of(request), data)
    held_out, table = request.held_out, _first(data, count, int(request.num_examples or 0))
    return dataclasses.replace(request, data=table, eval_data=held_out, stream=data)


def fill_rows(request: Request, data: Prepared, prepared: Callable[[Any], Prepared]) -> Prepared:
    """Return packed data of a stream with a row for each that the steps read, if it has so many.

    Examples share rows, so that more of them are read than of data in a row each.
    """
    needed = read = len(request.data) if request.stream is not None else 0
    total = int(request.num_examples or 0)
    while data.texts is not None and len(data) < needed and read < total:
        read = min(total, math.ceil(1.1 * read * needed / len(data)))
        data = prepared(_first(request.stream, read, total))
    return data


def _first(stream: Any, count: int, total: int) -> datasets.Dataset:
    """Return the first examples of a stream, which has ``total``."""
    rows = list(stream.take(count))
    if not rows or total < len(rows) or (len(rows) < count and total != len(rows)):
        raise DataError(
            f"num_examples={total}, and the stream "
            f"{'has' if len(rows) < count else 'goes on after'} {len(rows)} examples; give the "
            "number of all its examples"
        )
    return datasets.Dataset.from_list(rows, features=stream.features)


def _needed(request: Request, args: TrainingArguments, data: Any) -> int:
    """Return the number of examples that the steps of a fit read."""
    if args.max_steps <= 0:
        raise DataError(
            "the data is a stream, whose end is not known; say how many steps to train: "
            "training=TrainingArguments(..., max_steps=1000)"
        )
    if request.num_examples is None:
        raise DataError(
            "the size of a streamed data set is unknown, and the posterior depends on it; pass "
            f"num_examples=, the number of all its examples{_hint(data)}, or make it a "
            "datasets.Dataset: datasets.Dataset.from_list(list(data.take(n)))"
        )
    whole_number("num_examples", request.num_examples, at_least=1, at_most=math.inf)
    if request.options.supports.all_examples:
        raise ConfigError(
            f"guide {request.options.name!r} needs all examples at once, and a stream has them in "
            "turn; choose another guide, or make it a datasets.Dataset"
        )
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return args.max_steps * per_step


def _hint(data: Any) -> str:
    """Return the number that the stream states itself, which no filter changes."""
    known = (getattr(data.info, "splits", None) or {}).get(str(data.split))
    return "" if known is None else f" (before any filter {known.num_examples})"

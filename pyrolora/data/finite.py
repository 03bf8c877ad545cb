"""Features that are NaN or infinite, which no training step may meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pyrolora.columns import LABELS
from pyrolora.data.collate import Collator
from pyrolora.data.examples import TensorExamples, as_numbers, is_plain
from pyrolora.data.token_rows import is_real
from pyrolora.errors import DataError


def check_features(examples: Any, collate: Collator) -> None:
    """Raise `DataError` for features that are not finite in the network's precision.

    Tensors and stored columns are checked whole. Of other data the first thousand examples are,
    and the rest with `check_row` where all labels are read; of pictures and sounds fewer, which are
    checked as they are read.
    """
    if isinstance(examples, TensorExamples):
        check_finite(collate.converted(examples.columns), range(len(examples)))
        collate([examples[0]])
        return
    step = 100 if collate.media is None else 8
    last = min(len(examples), 10 * step)
    for start in range(0, last, step):
        numbers = range(start, min(start + step, last))
        check_finite(collate([examples[i] for i in numbers]), numbers)
    if is_plain(examples):
        _check_columns(examples, collate.dtype)


def check_row(row: Mapping[str, Any], number: int, dtype: torch.dtype) -> None:
    """Raise `DataError` for real features of an example that are not finite in ``dtype``."""
    for name, value in row.items():
        real = isinstance(value, Tensor | np.ndarray) or is_real(value)
        if name == LABELS or not real:
            continue
        tensor = as_numbers(value)
        if tensor.is_floating_point() and not torch.isfinite(tensor.to(dtype)).all():
            raise DataError(_message(name, number))


def check_finite(batch: Mapping[str, Any], numbers: Sequence[int]) -> None:
    """Raise `DataError` for features that are not finite, with the number of their example."""
    for name, tensor in batch.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if not torch.isfinite(tensor).all():
            bad = (~torch.isfinite(tensor)).flatten(1 if tensor.dim() > 1 else 0)
            row = int((bad.any(-1) if bad.dim() > 1 else bad).nonzero()[0])
            raise DataError(_message(name, numbers[row]))


def _check_columns(data: datasets.Dataset, dtype: torch.dtype) -> None:
    """Check the columns of a data set as they are stored, without making examples of them."""
    schema = data.features.arrow_schema
    real = [field.name for field in schema if field.name != LABELS and _is_real(field.type)]
    if not real:
        return
    stored, size = data.with_format("arrow", columns=real), 1000
    for start in range(0, len(data), size):
        table = stored[start : start + size]
        for name in real:
            if not _finite(table[name].combine_chunks(), dtype):
                rows = enumerate(data.with_format(None)[start : start + size][name], start)
                for number, value in rows:
                    check_row({name: value}, number, dtype)


def _is_real(kind: pa.DataType) -> bool:
    while (inner := _inside(kind)) is not None:
        kind = inner
    return bool(pa.types.is_floating(kind))


def _inside(kind: pa.DataType) -> pa.DataType | None:
    """Return the type of what a list, or an array of several dimensions, holds."""
    if isinstance(kind, pa.BaseExtensionType):
        return kind.storage_type
    lists = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list
    return kind.value_type if any(is_one(kind) for is_one in lists) else None


def _finite(values: pa.Array, dtype: torch.dtype) -> bool:
    while _inside(values.type) is not None:
        extended = isinstance(values.type, pa.BaseExtensionType)
        values = values.storage if extended else values.flatten()
    numbers = torch.from_numpy(values.drop_null().to_numpy(zero_copy_only=False).copy())
    return bool(torch.isfinite(numbers.to(dtype)).all())


def _message(name: str, number: int) -> str:
    return (
        f"{name!r} of example {number} is not finite (NaN or infinity, or too large for the "
        "network's precision); remove or fill such examples"
    )

"""Labels: all of a data set's, the names of classes, the numbers of names, the tokens hidden from a
masked language model."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling

from pyrolora.errors import DataError
from pyrolora.inference.examples import TensorExamples, as_dict, as_numbers, is_plain, is_text
from pyrolora.likelihoods import IGNORED
from pyrolora.model import INPUTS, LABELS

# Devlin et al. (2019): 15 % of the tokens, of which transformers replaces 80 % by the mask and 10 %
# by random tokens.
HIDDEN_SHARE = 0.15
# With the tokens of a text, so that it always hides the same ones and scores compare.
HIDDEN_SEED = 0


def raw_labels(examples: Any) -> Tensor:
    """The labels of training examples, before any network is known."""
    if len(examples) == 0:
        raise DataError("the data is empty: it has 0 examples")
    labels = all_labels(examples, lambda example: as_dict(example, INPUTS))
    if labels is None:
        raise DataError(no_labels(examples))
    return labels


def no_labels(examples: Any) -> str:
    """What to say of examples without labels."""
    columns = sorted(as_dict(examples[0], INPUTS))
    return (
        f"the data has no labels: expected a column 'labels' or 'label', got {columns}; rename the "
        "target column, for example data.rename_column('target', 'label') (--label target on the "
        "command line)"
    )


def class_names(examples: Any) -> list[str] | None:
    """The names of the classes of training examples: those of a ``ClassLabel``, or the strings that
    its labels are, sorted; None where labels are numbers."""
    column = _label_column(examples)
    if column is None:
        return None
    feature = examples.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
    elif is_text(feature):
        names = sorted({str(name) for name in examples.unique(column) if name is not None})
    else:
        return None
    if len(names) < 2:
        raise DataError(f"a classification needs two classes, and all labels are {names}")
    return names


def has_names(examples: Any, classes: Collection[str]) -> bool:
    """Whether the labels are names, or numbers that have some of the names of these classes."""
    if not isinstance(examples, datasets.Dataset):
        return False
    column = _label_column(examples.with_format(None))
    feature = None if column is None else examples.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return not set(classes).isdisjoint(feature.names)
    return is_text(feature)


def has_class_labels(examples: Any) -> bool:
    """Whether there is one label an example, not one a token."""
    if is_plain(examples):
        column = _label_column(examples)
        return column is not None and not isinstance(
            examples.features[column], datasets.Sequence | datasets.List | datasets.LargeList
        )
    label = as_dict(examples[0], INPUTS).get(LABELS) if len(examples) else None
    return label is not None and np.ndim(label) == 0


def _label_column(examples: Any) -> str | None:
    if not is_plain(examples):
        return None
    return next((name for name in (LABELS, "label") if name in examples.column_names), None)


def numbered(data: datasets.Dataset, network: nn.Module) -> datasets.Dataset:
    """Labels that are names, or numbers of names in another order than the network's, turned to
    the network's numbers."""
    stored, form = data.with_format(None), data.format
    column = _label_column(stored)
    id2label = getattr(getattr(network, "config", None), "id2label", None)
    if column is None or not id2label:
        return data
    ids = {name: int(number) for number, name in id2label.items()}
    feature, rows = data.features[column], stored[column]
    if isinstance(feature, datasets.ClassLabel):
        known = [ids.get(name) for name in feature.names]
        if not any(number is not None for number in known) or known == list(range(len(known))):
            return data  # the network's names say nothing of these, or the same
        rows = [None if row is None or row < 0 else feature.names[row] for row in rows]
    elif not is_plain(data):
        return data  # the transform may turn texts into numbers by itself
    elif not is_text(feature) or (_unnamed(ids) and not set(ids) & set(rows)):
        return data
    unknown = sorted({name for name in rows if name is not None and name not in ids})
    if unknown:
        raise DataError(
            f"the label {unknown[0]!r} is none of the network's classes, {sorted(ids)}; "
            "rename it, or leave such examples out"
        )
    numbers = [None if name is None else ids[name] for name in rows]
    made = stored.remove_columns(column).add_column(column, numbers)
    kind, columns, rest = form["type"], form["columns"], form["output_all_columns"]
    return made.with_format(kind, columns, rest, **form["format_kwargs"])


def network_classes(network: nn.Module) -> dict[int, str]:
    """The names that the network has for its classes, by number; none where they are those that
    transformers makes up."""
    id2label = getattr(getattr(network, "config", None), "id2label", None) or {}
    names = {int(number): str(name) for number, name in id2label.items()}
    return {} if _unnamed(names.values()) else names


def _unnamed(ids: Collection[str]) -> bool:
    """Whether these are the names that transformers makes up."""
    return set(ids) == {f"LABEL_{i}" for i in range(len(ids))}


def all_labels(
    examples: Any, as_row: Callable[[Any], Mapping[str, Any]], *, partly: bool = False
) -> Tensor | None:
    """All labels, (n,), or (n, T) for sequences, ragged ones filled with -100; None without, or,
    if ``partly`` is allowed, where some have none."""
    if isinstance(examples, TensorExamples) and LABELS in examples.columns:
        return examples.columns[LABELS]
    if is_plain(examples) and LABELS in examples.column_names:
        rows = list(examples.with_format(None)[LABELS])
    elif LABELS not in as_row(examples[0]):
        return None
    else:
        rows = [as_row(examples[i]).get(LABELS) for i in range(len(examples))]
    missing = [i for i, row in enumerate(rows) if row is None]
    if missing and partly:
        return None
    if missing:
        raise DataError(f"{len(missing)} examples have no label, the first is example {missing[0]}")
    try:
        tensors = [as_numbers(row) for row in rows]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"labels must be numbers, got {rows[0]!r}; map class names to 0..C-1 first"
        ) from error
    if tensors[0].dim() == 1:
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=IGNORED)
    return torch.stack(tensors)


def hidden(
    examples: Any, as_row: Callable[[Any], Mapping[str, Any]], tokenizer: Any
) -> datasets.Dataset:
    """Texts without labels for a masked language model: some tokens hidden, at least one in each,
    and labels that say what they were; the same ones at every call."""
    if getattr(tokenizer, "mask_token", None) is None:
        raise DataError(
            "to hide tokens of texts without labels a masked language model needs a tokenizer with "
            f"a mask token, got {'none' if tokenizer is None else type(tokenizer).__name__}; pass "
            "tokenizer=, or 'labels' with -100 at the tokens that are not to be predicted"
        )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=HIDDEN_SHARE)
    rows = []
    for i in range(len(examples)):
        row = as_row(examples[i])
        ids = torch.as_tensor(row["input_ids"])
        fixed = torch.as_tensor(
            tokenizer.get_special_tokens_mask(ids.tolist(), already_has_special_tokens=True)
        ).bool()
        if "attention_mask" in row:
            fixed |= torch.as_tensor(row["attention_mask"]) == 0
        if fixed.all():
            raise DataError(f"example {i} has no token that could be hidden; leave it out")
        seed = zlib.crc32(ids.numpy().tobytes(), HIDDEN_SEED)
        collator.generator = torch.Generator().manual_seed(seed)
        inputs, labels = ids, torch.full_like(ids, IGNORED)
        while labels.eq(IGNORED).all():
            inputs, labels = collator.torch_mask_tokens(ids.clone(), fixed)
        rows.append({**row, "input_ids": inputs.tolist(), LABELS: labels.tolist()})
    return datasets.Dataset.from_list(rows)

"""Choices of a language model between texts, by their likelihood."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pyrolora import defaults
from pyrolora.adapters import FlatFactors
from pyrolora.columns import IGNORED, LABELS
from pyrolora.data import prepare
from pyrolora.data.columns import CHOICES, check_text, context_columns, unread, warn_unread
from pyrolora.data.encoding import Encoder
from pyrolora.data.examples import as_examples, is_plain
from pyrolora.data.inputs import context_length
from pyrolora.data.labels import no_labels
from pyrolora.data.tokenising import choice_number, choice_texts
from pyrolora.errors import ConfigError, DataError
from pyrolora.model import JointModel
from pyrolora.predictive.predict import predict
from pyrolora.tasks import ClassPrediction, TokenScores


def choice_rows(data: Any, joint: JointModel) -> Any:
    """Return the data as rows with a column ``choices``, if a language model is to choose."""
    if not joint.task.causal:
        return None
    rows = as_examples(data, "input_ids", defaults.SCORE_SPLITS)
    return rows if is_plain(rows) and CHOICES in rows.column_names else None


def choose(
    joint: JointModel,
    data: Any,
    factors: FlatFactors,
    tokenizer: Any,
    *,
    per_token: bool = False,
    need_labels: bool = False,
    batch_size: int = defaults.BATCH_SIZE,
    temperature: float = 1.0,
) -> ClassPrediction:
    """Return p_s(c) ∝ exp(log p(choice c | context, draw s)) over each example's choices.

    A choice follows its context after a space. Its log-likelihood is the sum over the tokens of
    both together after the ones that they share with the context alone.

    Parameters
    ----------
    data
        As in `pyrolora.fit`, with a column ``choices`` (texts) and one of context; ``label`` is the
        number of the right one, and optional.
    per_token
        Take the mean over tokens instead of the sum, so that long choices are not at a
        disadvantage.
    need_labels
        Refuse data without labels.
    temperature
        T of the law of each token.

    Returns
    -------
    ClassPrediction
        Its probability is 0 at the choices that an example with fewer does not have.
    """
    rows = choice_rows(data, joint)
    if rows is None:
        raise ConfigError(
            "choosing by likelihood needs a causal language model, and data with a column 'choices'"
            f" beside the question; the task is {joint.task.name!r}"
        )
    context = context_columns(rows)
    check_text(rows, context, tokenizer)
    warn_unread(unread(rows.column_names, (*context, CHOICES)), type(joint.base).__name__)
    choices = [choice_texts(texts) for texts in rows[CHOICES]]
    contexts = [" ".join(parts) for parts in zip(*(rows[name] for name in context), strict=True)]
    targets = _targets(rows, choices, need_labels)
    longest = context_length(joint.base)
    examples = [
        _example(tokenizer, before, choice, longest)
        for before, texts in zip(contexts, choices, strict=True)
        for choice in texts
    ]
    prepared = prepare(examples, joint.base, joint.task, tokenizer)
    read = predict(
        joint,
        prepared,
        factors,
        batch_size=batch_size,
        kind=TokenScores,
        temperature=temperature,
    )
    assert isinstance(read, TokenScores)
    assert read.log_likelihood is not None
    scores = read.log_likelihood / read.num_tokens if per_token else read.log_likelihood
    sizes = [len(texts) for texts in choices]
    padded = pad_sequence(list(scores.mT.split(sizes)), True, -torch.inf)  # (n, C, S)
    log_probs = padded.permute(2, 0, 1).log_softmax(-1)
    picked = None
    if targets is not None:
        picked = log_probs.gather(-1, targets.expand(len(log_probs), -1)[..., None]).squeeze(-1)
    return ClassPrediction(targets, picked, log_probs.exp())


def _example(tokenizer: Any, context: str, choice: str, longest: float) -> dict[str, list[int]]:
    """Return the last ``longest`` tokens of both; those of the context have no label."""
    encoder = Encoder(tokenizer, math.inf)
    alone, both = encoder([context, f"{context} {choice}"])["input_ids"]
    pairs = zip(alone, both, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(alone), len(both)))
    if shared == len(both):
        raise DataError(f"a choice of {context[:40]!r} adds no token to it: {choice!r}")
    if not shared:
        raise DataError(
            f"nothing stands before the choice {choice[:40]!r} that could predict its first token; "
            "give it a context, or a tokenizer that puts a token before every text"
        )
    cut = int(max(0, len(both) - longest))
    both, shared = both[cut:], max(shared - cut, 1)
    return {
        "input_ids": both,
        "attention_mask": [1] * len(both),
        LABELS: [IGNORED] * shared + both[shared:],
    }


def _targets(rows: Any, choices: list[list[str]], need_labels: bool) -> Tensor | None:
    column = next((name for name in ("label", LABELS) if name in rows.column_names), None)
    if column is None:
        if need_labels:
            raise DataError(no_labels(rows.column_names))
        return None
    pairs = zip(rows[column], rows[CHOICES], strict=True)
    numbers = [choice_number(label, texts) for label, texts in pairs]
    if not need_labels and any(number in (None, -1) for number in numbers):
        return None
    for number, (label, texts) in enumerate(zip(numbers, choices, strict=True)):
        if not isinstance(label, int) or not 0 <= label < len(texts):
            raise DataError(
                f"the label of example {number} is {label!r}, and it has {len(texts)} choices; "
                "count them from 0"
            )
    return torch.tensor(numbers, dtype=torch.long)

"""Scores of continuations: how sure all draws are of every token that one of them wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pyrolora import defaults
from pyrolora.adapters import FlatFactors
from pyrolora.columns import DECODER_IDS, DECODER_MASK, IGNORED, LABELS
from pyrolora.data import prepare
from pyrolora.data.examples import TensorExamples
from pyrolora.data.media.pieces import PER_TOKEN, joined
from pyrolora.data.padding import MASK
from pyrolora.model import JointModel
from pyrolora.predictive.generation import Generation
from pyrolora.predictive.predict import predict
from pyrolora.tasks import TokenPrediction


def scored(
    joint: JointModel,
    prompts: Sequence[Tensor],
    others: Mapping[str, list[Tensor]],
    written: Sequence[Sequence[Tensor]],
    draw: Tensor,
    factors: FlatFactors,
    pad: int,
    tokenizer: Any,
    rows: int,
    temperature: float,
    start: int | None = None,
) -> Generation:
    """Return the continuations with the scores that all draws give them.

    Parameters
    ----------
    joint
        The joint model.
    prompts, others
        Token ids and other inputs, one row per prompt.
    written
        The continuations of each prompt.
    draw
        The number of the draw that wrote each continuation of a prompt.
    factors
        The factors of all draws.
    pad
        The id that fills rows up.
    tokenizer
        Turns ids to text, or None.
    rows
        Most rows (draws x texts) of one pass.
    temperature
        T of the scores (`Task.at`).
    start
        The id with which a decoder of its own starts; None where prompts are continued.
    """
    pairs = [(p, new) for p, texts in zip(prompts, written, strict=True) for new in texts]
    beside = {n: [row for row in rows for _ in written[0]] for n, rows in others.items()}
    examples = _examples(pairs, beside, pad) if start is None else _apart(pairs, beside, pad, start)
    prepared = prepare(examples, joint.base, joint.task)
    read = predict(
        joint,
        prepared,
        factors,
        batch_size=min(defaults.BATCH_SIZE, rows),
        rows=rows,
        temperature=temperature,
    )
    assert isinstance(read, TokenPrediction)
    assert read.log_likelihood is not None
    shape = (len(prompts), len(draw))

    def aligned(values: Tensor) -> Tensor:
        """Turn (n K, longest), of what is predicted, to (n, K, T), of the continuations alone."""
        before = [len(p) - 1 if start is None else 0 for p, _ in pairs]
        parts = [
            row[first : first + len(new)]
            for row, first, (_, new) in zip(values, before, pairs, strict=True)
        ]
        return pad_sequence(parts, True, torch.nan).unflatten(0, shape)

    news = [new for _, new in pairs]
    counted = pad_sequence([torch.ones_like(new, dtype=torch.bool) for new in news], True, False)
    texts = tokens = None
    if tokenizer is not None:
        texts = [[_decode(tokenizer, new) for new in news] for news in written]
        tokens = [[[_decode(tokenizer, i) for i in new] for new in news] for news in written]
    return Generation(
        sequences=pad_sequence(news, True, pad).unflatten(0, shape),
        mask=counted.unflatten(0, shape),
        draw=draw,
        log_likelihood=read.log_likelihood.unflatten(1, shape),
        entropy=aligned(read.entropy),
        aleatoric=aligned(read.aleatoric),
        prompts=None if tokenizer is None else [_decode(tokenizer, p) for p in prompts],
        texts=texts,
        tokens=tokens,
    )


def _examples(
    pairs: Sequence[tuple[Tensor, Tensor]], beside: Mapping[str, list[Tensor]], pad: int
) -> TensorExamples:
    """Return whole texts of one length, whose labels are the tokens of the continuations.

    Token types go on with their last value, and those of pictures with 0, as in transformers'
    ``generate``.
    """
    whole = [torch.cat(pair) for pair in pairs]
    columns = {
        "input_ids": pad_sequence(whole, True, pad),
        MASK: pad_sequence([torch.ones_like(ids) for ids in whole], True, 0),
        LABELS: pad_sequence(
            [torch.cat([torch.full_like(p, IGNORED), new]) for p, new in pairs], True, IGNORED
        ),
    }
    for name, rows in beside.items():
        if name in PER_TOKEN:
            last = [r[-1:] if name == PER_TOKEN[0] else r.new_zeros(1) for r in rows]
            continued = [
                torch.cat([r, end.expand(len(n))])
                for r, end, (_, n) in zip(rows, last, pairs, strict=True)
            ]
            columns[name] = pad_sequence(continued, True, 0)
        else:
            columns |= joined(name, rows)
    return TensorExamples(columns)


def _apart(
    pairs: Sequence[tuple[Tensor, Tensor]], beside: Mapping[str, list[Tensor]], pad: int, start: int
) -> TensorExamples:
    """Return the prompts, with the continuations as labels and as the inputs of the decoder."""
    prompts, news = [p for p, _ in pairs], [new for _, new in pairs]
    read = [torch.cat([torch.full_like(new[:1], start), new[:-1]]) for new in news]
    columns = {
        "input_ids": pad_sequence(prompts, True, pad),
        MASK: pad_sequence([torch.ones_like(ids) for ids in prompts], True, 0),
        LABELS: pad_sequence(news, True, IGNORED),
        DECODER_IDS: pad_sequence(read, True, pad),
        DECODER_MASK: pad_sequence([torch.ones_like(new) for new in news], True, 0),
    }
    for name, rows in beside.items():
        columns[name] = pad_sequence(rows, True, 0) if name in PER_TOKEN else torch.cat(rows)
    return TensorExamples(columns)


def _decode(tokenizer: Any, ids: Tensor) -> str:
    return tokenizer.decode(ids.reshape(-1).tolist(), skip_special_tokens=ids.dim() > 0)

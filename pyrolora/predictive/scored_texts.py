"""Scores of continuations: how sure all draws are of every token that one of them wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pyrolora import defaults
from pyrolora.adapters import AnyFactors
from pyrolora.columns import DECODER_IDS, DECODER_MASK, IGNORED, LABELS
from pyrolora.data import Prepared, prepare
from pyrolora.data.examples import TensorExamples
from pyrolora.data.media.pieces import PER_TOKEN, joined
from pyrolora.data.padding import MASK
from pyrolora.model import JointModel
from pyrolora.predictive.generation import Generation
from pyrolora.predictive.predict import predict
from pyrolora.tasks import Prediction, TokenPrediction


@dataclass(frozen=True)
class Texts:
    """Continuations of prompts, for draws to read: each different one once.

    Attributes
    ----------
    joint
        The joint model.
    prompts, others
        Token ids and other inputs, one row per prompt.
    written
        The continuations of each prompt.
    pad
        The id that fills rows up.
    start
        The id with which a decoder of its own starts; None where prompts are continued.
    """

    joint: JointModel
    prompts: Sequence[Tensor]
    others: Mapping[str, list[Tensor]]
    written: Sequence[Sequence[Tensor]]
    pad: int
    start: int | None = None

    @cached_property
    def places(self) -> dict[tuple[int, tuple[int, ...]], int]:
        """The different continuations, by prompt and ids, in the order in which they are read."""
        pairs = [(i, _key(new)) for i, news in enumerate(self.written) for new in news]
        return {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}

    @property
    def lengths(self) -> list[int]:
        """The tokens of each different text, those of its prompt included where it is continued."""
        before = 0 if self.start is not None else 1
        return [before * len(self.prompts[i]) + len(ids) for i, ids in self.places]

    def prepared(self) -> Prepared:
        """Return the different texts as examples, filled up to the longest."""
        pairs = [(self.prompts[i], torch.tensor(ids, dtype=torch.long)) for i, ids in self.places]
        beside = {name: [rows[i] for i, _ in self.places] for name, rows in self.others.items()}
        examples = (
            _examples(pairs, beside, self.pad)
            if self.start is None
            else _apart(pairs, beside, self.pad, self.start)
        )
        return prepare(examples, self.joint.base, self.joint.task)

    def generation(
        self, read: Prediction, draw: Tensor, tokenizer: Any, prompts: Sequence[int] | None = None
    ) -> Generation:
        """Return the continuations of some prompts (None: all), with what draws read in them.

        Parameters
        ----------
        read
            The prediction of the draws for `prepared`.
        draw
            (K,): the number of the draw that wrote each continuation of a prompt.
        tokenizer
            Turns ids to text, or None.
        prompts
            The numbers of the prompts.
        """
        assert isinstance(read, TokenPrediction)
        assert read.log_likelihood is not None
        chosen = range(len(self.prompts)) if prompts is None else prompts
        pairs = [(i, new) for i in chosen for new in self.written[i]]
        read = read.select(torch.tensor([self.places[i, _key(new)] for i, new in pairs]))
        assert read.log_likelihood is not None
        shape = (len(chosen), len(draw))

        def aligned(values: Tensor) -> Tensor:
            """Turn (n K, longest), of what is predicted, to (n, K, T), of continuations alone."""
            before = [len(self.prompts[i]) - 1 if self.start is None else 0 for i, _ in pairs]
            parts = [
                row[first : first + len(new)]
                for row, first, (_, new) in zip(values, before, pairs, strict=True)
            ]
            return pad_sequence(parts, True, torch.nan).unflatten(0, shape)

        news = [new for _, new in pairs]
        counted = [torch.ones_like(new, dtype=torch.bool) for new in news]
        texts = tokens = prompt_texts = None
        if tokenizer is not None:
            prompt_texts = [_decode(tokenizer, self.prompts[i]) for i in chosen]
            texts = [[_decode(tokenizer, new) for new in self.written[i]] for i in chosen]
            tokens = [
                [[_decode(tokenizer, token) for token in new] for new in self.written[i]]
                for i in chosen
            ]
        return Generation(
            sequences=pad_sequence(news, True, self.pad).unflatten(0, shape),
            mask=pad_sequence(counted, True, False).unflatten(0, shape),
            draw=draw,
            log_likelihood=read.log_likelihood.unflatten(1, shape),
            entropy=aligned(read.entropy),
            aleatoric=aligned(read.aleatoric),
            prompts=prompt_texts,
            texts=texts,
            tokens=tokens,
        )


def scored(
    texts: Texts,
    draw: Tensor,
    factors: AnyFactors,
    tokenizer: Any,
    rows: int,
    temperature: float,
) -> Generation:
    """Return the continuations with the scores that all draws give them.

    Parameters
    ----------
    texts
        The continuations.
    draw
        The number of the draw that wrote each continuation of a prompt.
    factors
        The factors of all draws.
    tokenizer
        Turns ids to text, or None.
    rows
        Most rows (draws x texts) of one pass.
    temperature
        T of the scores (`Task.at`).
    """
    read = predict(
        texts.joint,
        texts.prepared(),
        factors,
        batch_size=min(defaults.BATCH_SIZE, rows),
        rows=rows,
        temperature=temperature,
    )
    return texts.generation(read, draw, tokenizer)


def _key(ids: Tensor) -> tuple[int, ...]:
    return tuple(ids.tolist())


def _examples(
    pairs: Sequence[tuple[Tensor, Tensor]], beside: Mapping[str, list[Tensor]], pad: int
) -> TensorExamples:
    """Return whole texts of one length, whose labels are the tokens of the continuations.

    Token types go on with their last value, and those of pictures with 0, as in transformers'
    ``generate``.
    """
    whole = [torch.cat(pair) for pair in pairs]
    labels = [torch.cat([torch.full_like(p, IGNORED), new]) for p, new in pairs]
    columns = {
        "input_ids": pad_sequence(whole, True, pad),
        MASK: pad_sequence([torch.ones_like(ids) for ids in whole], True, 0),
        LABELS: pad_sequence(labels, True, IGNORED),
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

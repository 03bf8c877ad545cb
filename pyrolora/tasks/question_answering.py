"""Extractive question answering: the span of a context that answers a question."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import datasets
import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.columns import LABELS, Batch
from pyrolora.data import Collator
from pyrolora.data.columns import SPANS
from pyrolora.data.inputs import encoder_for
from pyrolora.data.padding import MASK
from pyrolora.data.spans import (
    ANSWERS,
    BESIDE,
    CONTEXT,
    EXAMPLE,
    FIRST,
    NONE,
    PAST,
    QUESTION,
    answer_of,
    context_tokens,
    encode_spans,
    none_token,
)
from pyrolora.distributions import drawn_residual
from pyrolora.errors import ConfigError, DataError
from pyrolora.tasks.base import Task, in_float32
from pyrolora.tasks.checkpoint import Checkpoint
from pyrolora.tasks.multiple_choice import IMPOSSIBLE
from pyrolora.tasks.span_prediction import SpanPrediction
from pyrolora.tasks.unsupported import classes_of

OF_WINDOWS = (EXAMPLE, FIRST, PAST, NONE)


class SpanCollator(Collator):
    """Questions and contexts, or their tokens, to a batch of windows.

    ``labels`` (b, 2) are the first and the last token of the answer; for none twice the token
    that stands for it.
    """

    targets = (
        "a column 'answers' with the 'text' and 'answer_start' of each, or 'start_positions' and "
        "'end_positions' beside tokens"
    )
    beside = SPANS
    internal = frozenset(OF_WINDOWS)

    def __init__(self, network: Any, tokenizer: Any) -> None:
        super().__init__(network, tokenizer)
        self.taken = (self.taken - {*SPANS}) | {*OF_WINDOWS}
        self.pads_right = True  # the places of answers count from the left
        self.contexts: Sequence[str] | None = None
        self.references: list[tuple[str, ...] | None] = []

    def check_data(self, examples: Any) -> None:
        """Take all data; `encode` says what is missing."""

    def with_labels(self, data: datasets.Dataset) -> datasets.Dataset:
        """Return the data with its labels; of tokens also with the number of each row."""
        names = data.column_names
        if "input_ids" in names and EXAMPLE not in names:
            data = data.add_column(EXAMPLE, [*range(len(data))])
        if LABELS in names or not {*SPANS} <= {*names}:
            return data
        columns = (data.with_format(None)[name] for name in SPANS)
        rows = [None if None in pair else [*pair] for pair in zip(*columns, strict=True)]
        return data.remove_columns(list(SPANS)).add_column(LABELS, rows)

    def encode(self, data: datasets.Dataset) -> tuple[datasets.Dataset, tuple[str, ...]]:
        made = encode_spans(data, self.tokenizer, encoder_for(self.tokenizer, self.context).limit)
        plain = data.with_format(None)
        self.contexts = plain[CONTEXT][:]
        answers = (
            (answer_of(row, i) for i, row in enumerate(plain)) if ANSWERS in plain.features else ()
        )
        self.references = [None if a is None else a.texts or ("",) for a in answers]
        return made, (QUESTION, CONTEXT, ANSWERS, *BESIDE)

    def example(self, example: Any) -> dict[str, Any]:
        row = super().example(example)
        ids = row.get("input_ids")
        if ids is None or FIRST in row:
            return row
        ids = torch.as_tensor(ids).tolist()
        kinds = row.get("token_type_ids")
        kinds = None if kinds is None else torch.as_tensor(kinds).tolist()
        inside = context_tokens(ids, kinds, self.tokenizer)
        row[FIRST] = [t if own else -1 for t, own in enumerate(inside)]
        row[PAST] = [t + 1 if own else -1 for t, own in enumerate(inside)]
        row[NONE] = none_token(self.tokenizer, ids)
        return row

    def labels_of(self, row: Mapping[str, Any], mask: list[int] | None) -> Any:
        places = [row.get(name) for name in SPANS]
        if LABELS in row or None in places:
            return row.get(LABELS)
        return [int(place) for place in places]  # type: ignore[arg-type]

    def check(self, examples: Any, labels: Tensor | None, explicit: set[str]) -> None:
        """Raise `DataError` for answers past their tokens; warn of those too long to be found."""
        if labels is None:
            return
        tokenised = labels.tolist() if self.contexts is None else []
        for i, (start, end) in enumerate(tokenised):
            size = len(self.example(examples[i])["input_ids"])
            if not 0 <= start <= end < size:
                raise DataError(
                    f"the answer of row {i} is from token {start} to token {end}, and it has "
                    f"{size} tokens; transformers would leave it out of its loss: give answers "
                    "that were cut twice the place of the CLS token, or leave them out"
                )
        long = int((labels[:, 1] - labels[:, 0] >= defaults.MAX_ANSWER).sum())
        if long:
            warnings.warn(
                f"{long} of {len(labels)} answers have more than {defaults.MAX_ANSWER} tokens; "
                "they are learnt and scored, and answers so long are never predicted",
                stacklevel=2,
            )

    def part(self, numbers: list[int]) -> Self:
        made = copy.copy(self)
        if self.contexts is not None:
            made.contexts = [self.contexts[i] for i in numbers]
            made.references = [self.references[i] for i in numbers if self.references]
        return made

    def finish(self, prediction: Any, examples: Any) -> Any:
        """Return the prediction with its answers as texts, and those of the data."""
        if self.contexts is not None:
            texts = [c[max(a, 0) : max(b, 0)] for c, (a, b) in self._pairs(prediction.span)]
            known: list[Any] = self.references if prediction.targets is not None else []
        else:
            texts = self._of_tokens(prediction.span, examples)
            known = []
            if prediction.targets is not None:
                known = [(text,) for text in self._of_tokens(prediction.targets, examples)]
        return replace(prediction, texts=tuple(texts), references=tuple(known) or None)

    def _pairs(self, spans: Tensor) -> Iterator[tuple[str, list[int]]]:
        assert self.contexts is not None
        return zip(self.contexts, spans.tolist(), strict=True)

    def _of_tokens(self, spans: Tensor, examples: Any) -> list[str]:
        """Return the tokens of these spans as texts, or as numbers without a tokenizer."""
        texts = []
        for i, (start, end) in enumerate(spans.tolist()):
            ids = self.example(examples[i])["input_ids"][max(start, 0) : max(end, 0)]
            ids = torch.as_tensor(ids).tolist()
            numbers = " ".join(map(str, ids))
            texts.append(numbers if self.tokenizer is None else self.tokenizer.decode(ids).strip())
        return texts


class QuestionAnswering(Task):
    """Spans: log p(y) = log softmax(f_start)[first] + log softmax(f_end)[last].

    f is (..., b, T, 2), the logits of a window's tokens; padding has probability 0. A window that
    has not the whole answer has that of the token for none. transformers' loss is the mean of the
    two terms, −½ log p of a mean window; it gives padding a probability, too, and leaves out
    answers past the last token, which are refused here.

    A row of the likelihood is a window: a context that is longer than the network reads has
    several, which overlap, and the fit counts each. In predictions a row is an example, whose
    log-likelihood is the sum over its windows.
    """

    name = "question-answering"
    reads = "the places of answers in a context"
    aliases = ("extractive-question-answering", "question-ans", "qa")
    collator = SpanCollator
    extras = OF_WINDOWS
    discrete = True
    classes = classes_of("QUESTION_ANSWERING")
    auto = "AutoModelForQuestionAnswering"
    prediction = SpanPrediction
    tempers = True

    @classmethod
    def implied(cls, checkpoint: Checkpoint) -> bool:
        return checkpoint.layout == "spans"

    def output(self, raw: Any) -> Tensor:
        parts = [getattr(raw, f"{name}_logits", None) for name in ("start", "end")]
        if not all(isinstance(part, Tensor) for part in parts):
            fields = list(raw) if isinstance(raw, Mapping) else type(raw).__name__
            raise ConfigError(
                "a network for extractive question answering gives 'start_logits' and "
                f"'end_logits', this one gives {fields}; load it with "
                "AutoModelForQuestionAnswering"
            )
        return in_float32(torch.stack(parts, -1))  # type: ignore[arg-type]

    def logits(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the logits of the first and of the last token, (..., b, 2, T)."""
        logits, mask = self.tempered(output).transpose(-1, -2), batch.get(MASK)
        return logits if mask is None else logits.masked_fill(mask[:, None] == 0, IMPOSSIBLE)

    def log_probs(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the log-probability of each token to be the first and the last, (..., b, 2, T)."""
        return self.logits(output, batch).log_softmax(-1)

    def law(self, output: Tensor, batch: Batch) -> dist.TorchDistribution:
        logits = self.logits(output, batch)
        return dist.Categorical(logits=logits, validate_args=False).to_event(1)

    def targets(self, batch: Batch) -> Tensor | None:
        """Return the first and the last token, (b, 2): the labels, or transformers' two columns."""
        if LABELS not in batch and {*SPANS} <= {*batch}:
            return torch.stack([batch[name] for name in SPANS], -1)
        return batch.get(LABELS)

    def curvature(self, output: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield one vector, e_y − p with y drawn from p, for the first and the last token.

        E[v vᵀ] is the Hessian, with a block diag(p) − p pᵀ for each of them.
        """
        yield drawn_residual(self.logits(output.detach(), batch)).transpose(-1, -2)

    def check_labels(self, labels: Tensor, network: Any) -> None:
        if labels.dim() != 2 or labels.shape[-1] != 2 or labels.is_floating_point():
            raise DataError(
                "extractive question answering needs the numbers of the first and the last token "
                f"of each answer, (n, 2), got labels of dtype {labels.dtype} and shape "
                f"{tuple(labels.shape)}"
            )

    def check_output(self, output: Tensor, labels: Tensor) -> None:
        if output.dim() != 3:
            raise DataError(
                "extractive question answering needs two logits per token, (n, T, 2), got shape "
                f"{tuple(output.shape)}"
            )

    def check_reading(self, output: Tensor, batch: Batch, network: Any) -> None:
        """Raise `ConfigError` unless there are logits for each token."""
        size = np.shape(batch["input_ids"])[-1]
        if output.shape[-2] != size:
            raise ConfigError(
                f"this {type(network).__name__} gives logits for {output.shape[-2]} of {size} "
                "tokens; load it with AutoModelForQuestionAnswering"
            )

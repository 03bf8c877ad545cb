"""Predictions of extractive question answering: the answers of contexts, with their uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from pyrolora import defaults
from pyrolora.columns import Batch
from pyrolora.data.spans import EXAMPLE, FIRST, NONE, NOWHERE, PAST
from pyrolora.tasks.evidence import Promise
from pyrolora.tasks.prediction import Prediction, entropy_of, table_of, tail_of

RECORDED_BY_DRAW = ("none", "total", "candidates", "scores")
"""The parts of a record of shape (S, windows, ...)."""


@dataclass(frozen=True)
class SpanPrediction(Prediction):
    """The likeliest answer of each question, joined over the windows of its context.

    A window w has a probability p_w(a) = p(start) p(end) for every span a of its part of the
    context, of at most `defaults.MAX_ANSWER` tokens, and p_w(∅) for no answer. An example has the
    answer a of one window and none in the others, or no answer at all: its probability is

        P(a) = mean_s  o_s(a) / (1 + Σ_b o_s(b)),     o_s(a) = Σ_w p_w(a | s) / p_w(∅ | s)

    over the draws s, and P(∅) has 1 in place of o(a). The answer is the one of highest P.

    Attributes
    ----------
    draws
        The probability of the answer under each draw, (S, n).
    span, targets
        [start, end) of the answer in the context, in characters, (n, 2); in tokenised data, in
        tokens of the row. -1 for no answer.
    start_entropy, end_entropy
        H[p̄] of the first and of the last token, summed over windows, (n,), in nats.
    windows
        The number of windows of each example, (n,).
    aleatoric
        mean_s H[p_s] of both, summed over windows, (n,), in nats.
    texts, references
        The answers, and all answers of the data: "" for none. Tokens without a tokenizer are
        written as numbers.
    """

    target_dims = ("bound",)
    higher_is_better: ClassVar[Mapping[str, bool | None]] = {
        "nll": False,
        "aurc": False,
        "exact_match": True,
        "f1": True,
    }

    draws: Tensor
    span: Tensor
    start_entropy: Tensor
    end_entropy: Tensor
    aleatoric: Tensor
    windows: Tensor
    numbered: bool = False
    texts: tuple[str, ...] | None = None
    references: tuple[tuple[str, ...], ...] | None = None

    @staticmethod
    def reduce(task: Any, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
        scores = torch.cat([task.log_probs(output, batch) for output in outputs]).float()
        start, end = scores.unbind(-2)  # (S, b, T)
        none = batch[NONE].expand(len(start), -1)[..., None]
        nothing = (start.gather(-1, none) + end.gather(-1, none)).squeeze(-1)
        inside = batch[PAST] > batch[FIRST]
        total, first, last, found = _likeliest(start, end, inside, nothing)
        pairs = [
            part.gather(-1, place.expand(len(start), -1, -1))
            for part, place in ((start, first), (end, last))
        ]
        record = {
            "none": nothing,
            "total": total,
            "candidates": (pairs[0] + pairs[1]).masked_fill(~found, -torch.inf),
            "spans": torch.stack(
                [batch[FIRST].gather(-1, first), batch[PAST].gather(-1, last)], -1
            ),
            "entropy": entropy_of(scores.exp().mean(0)),
            "aleatoric": entropy_of(scores.exp()).mean(0).sum(-1),
        }
        labels = task.targets(batch)
        if labels is not None:
            places = (batch[FIRST].gather(-1, labels[:, :1]), batch[PAST].gather(-1, labels[:, 1:]))
            record["targets"] = torch.cat(places, -1)
            record["scores"] = scores.gather(-1, labels.expand(len(start), -1, -1)[..., None]).sum(
                (-1, -2)
            )
        if EXAMPLE in batch:
            record[EXAMPLE] = batch[EXAMPLE]
        return {name: part.cpu() for name, part in record.items()}

    @classmethod
    def collect(cls, records: Sequence[dict[str, Tensor]], task: Any) -> SpanPrediction:
        names = [name for name in records[0] if all(name in record for record in records)]
        parts = {
            name: torch.cat([record[name] for record in records], int(name in RECORDED_BY_DRAW))
            for name in names
        }
        count = parts["none"].shape[1]
        rows = parts.get(EXAMPLE, torch.arange(count))
        examples = [*_windows_of(rows)]
        found = [_answer(parts, windows) for windows in examples]
        labelled = "targets" in parts
        entropy = torch.stack([parts["entropy"][w].sum(0) for w in examples])
        return cls(
            targets=torch.stack([parts["targets"][w].amax(0) for w in examples])
            if labelled
            else None,
            log_likelihood=torch.stack([parts["scores"][:, w].sum(-1) for w in examples], -1)
            if labelled
            else None,
            draws=torch.stack([draws for draws, _ in found], -1),
            span=torch.stack([span for _, span in found]),
            start_entropy=entropy[:, 0],
            end_entropy=entropy[:, 1],
            aleatoric=torch.stack([parts["aleatoric"][w].sum() for w in examples]),
            windows=torch.tensor([len(w) for w in examples]),
            numbered=EXAMPLE in parts,
        )

    def examples_of(self, terms: int) -> int:
        """Return the number of examples where ``terms`` are their windows."""
        return len(self.windows) if terms == int(self.windows.sum()) else terms

    def in_order(self, order: Sequence[int]) -> Self:
        """Return the examples in the order of the data, where windows do not say theirs."""
        return self if self.numbered else super().in_order(order)

    def select(self, rows: Tensor) -> Self:
        chosen: dict[str, Any] = {}
        for name in ("texts", "references"):
            values = getattr(self, name)
            chosen[name] = None if values is None else tuple(values[i] for i in rows.tolist())
        return replace(super().select(rows), **chosen)

    @property
    def probability(self) -> Tensor:
        """The probability of the answer, (n,): the mean over draws."""
        return self.draws.mean(0)

    @property
    def entropy(self) -> Tensor:
        """The entropy of the first and the last token together, summed over windows, (n,)."""
        return self.start_entropy + self.end_entropy

    @property
    def epistemic(self) -> Tensor:
        """The part of the entropy on which draws disagree, (n,), in nats."""
        return (self.entropy - self.aleatoric).clamp(min=0)

    @property
    def uncertainty(self) -> Tensor:
        """1 minus the probability of the answer, (n,)."""
        return 1 - self.probability

    @property
    def loss(self) -> Tensor | None:
        """1 where the answer matches no reference exactly, else 0, (n,)."""
        if self.targets is None:
            return None
        if self.references is None:
            return (self.span != self.targets).any(-1).float()
        return torch.tensor([1 - scores["exact_match"] for scores in self._scored()])

    def _scored(self) -> Iterator[dict[str, float]]:
        """Yield the scores of each example, which ignore case, punctuation and articles."""
        from torchmetrics.functional.text import squad

        assert self.texts is not None
        assert self.references is not None
        for text, known in zip(self.texts, self.references, strict=True):
            answers = {"text": [*known], "answer_start": [0] * len(known)}
            scores = squad(
                {"prediction_text": text, "id": "0"},
                {"answers": answers, "id": "0"},
            )
            yield {name: float(value) / 100 for name, value in scores.items()}

    def metrics(self) -> dict[str, float | Tensor]:
        """Return exact matches and the F1 of words, both from 0 to 1, of each example, (n,)."""
        if self.references is None:
            return {}
        scores = [*self._scored()]
        return {
            name: torch.tensor([one[name] for one in scores], dtype=torch.float64)
            for name in ("exact_match", "f1")
        }

    def interval(self, mass: float = 0.9) -> tuple[Tensor, Tensor]:
        """Return bounds (n,) of the central interval of the answer's probability over draws."""
        tail = tail_of(mass)
        return self.draws.quantile(tail, dim=0), self.draws.quantile(1 - tail, dim=0)

    def predictive_draws(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        return {"probability": (self.draws, (self.row,))}  # other answers are not drawn

    def to_pandas(self) -> pd.DataFrame:
        columns = {
            "probability": self.probability,
            "start": self.span[:, 0],
            "end": self.span[:, 1],
            "entropy": self.entropy,
            "start_entropy": self.start_entropy,
            "end_entropy": self.end_entropy,
            "aleatoric": self.aleatoric,
            "epistemic": self.epistemic,
        }
        table = table_of(columns, None)
        if self.texts is not None:
            table.insert(0, "predicted", pd.Series(self.texts, dtype=object))
        if self.references is not None:
            table["target"] = pd.Series([known[0] for known in self.references], dtype=object)
        return table

    uncertainty_name = "1 − probability of the answer"
    risk_name = "share of answers without an exact match"
    risk_from_zero = True
    surprise_note = "{count} of {total} answers are wrong; these are the most confident of them."

    @property
    def surprise(self) -> Tensor | None:
        """The probability of the wrong answers, (n,); NaN for the right ones."""
        loss = self.loss
        return None if loss is None else self.probability.masked_fill(loss == 0, torch.nan)

    def promise(self) -> Promise | None:
        """Return the probabilities of the answers, and which of them are right."""
        return Promise.of_confidence(
            self.probability,
            self.loss,
            "The mean probability of the answers is {promised:.3f}, and {kept:.3f} of them are "
            "right: it is {gap:.3f} too high, with a standard error of {error:.3f}.",
        )

    def columns(self, class_name: Callable[[int, int], str]) -> dict[str, Sequence[Any]]:
        known: dict[str, Sequence[Any]] = {}
        if self.references is not None:
            known["target"] = [texts[0] or "(no answer)" for texts in self.references]
        if self.texts is not None:
            known["predicted"] = [text or "(no answer)" for text in self.texts]
        return {
            **known,
            "probability": self.probability.tolist(),
            "entropy": self.entropy.tolist(),
            "mutual information": self.epistemic.tolist(),
        }


def _likeliest(
    start: Tensor, end: Tensor, inside: Tensor, nothing: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log Σ_a p(a) of each draw, (S, b), and the likeliest spans: first, last, (b, K).

    ``start`` and ``end`` are (S, b, T); a span lies ``inside``, (b, T), at both ends. The last part
    says which of the K are spans: a window of few tokens has fewer.
    """
    longest = min(defaults.MAX_ANSWER, start.shape[-1])
    ends = F.pad(inside, (0, longest - 1)).unfold(-1, longest, 1)
    allowed = inside[..., None] & ends  # (b, T, L): from t to t + l
    mean = torch.zeros(allowed.shape, device=start.device)
    totals = []
    for s in range(len(start)):
        last = F.pad(end[s], (0, longest - 1), value=-torch.inf).unfold(-1, longest, 1)
        table = (start[s][..., None] + last).masked_fill(~allowed, -torch.inf)
        totals.append(table.flatten(1).logsumexp(-1))
        whole = torch.logaddexp(totals[-1], nothing[s])
        mean += (table - whole[:, None, None]).exp()
    count = min(defaults.ANSWERS_PER_WINDOW, mean[0].numel())
    places = mean.flatten(1).topk(count).indices
    first = places // longest
    last_token = (first + places % longest).clamp(max=start.shape[-1] - 1)
    return torch.stack(totals), first, last_token, allowed.flatten(1).gather(-1, places)


def _windows_of(examples: Tensor) -> Iterator[Tensor]:
    """Yield the numbers of the windows of each example."""
    order = examples.argsort(stable=True)
    _, counts = examples[order].unique_consecutive(return_counts=True)
    yield from order.split(counts.tolist())


def _answer(parts: Mapping[str, Tensor], windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probability of the likeliest answer under each draw, (S,), and its span, (2,)."""
    none = parts["none"][:, windows]
    whole = torch.logsumexp(F.pad(parts["total"][:, windows] - none, (1, 0)), -1)  # 1 is for none
    odds = (parts["candidates"][:, windows] - none[..., None] - whole[:, None, None]).exp()
    spans, which = parts["spans"][windows].flatten(0, 1).unique(dim=0, return_inverse=True)
    probs = torch.zeros(len(odds), len(spans)).index_add(1, which, odds.flatten(1))
    probs = torch.cat([probs, (-whole).exp()[:, None]], -1)
    spans = torch.cat([spans, torch.tensor([NOWHERE])])
    best = int(probs.mean(0).argmax())
    return probs[:, best], spans[best]

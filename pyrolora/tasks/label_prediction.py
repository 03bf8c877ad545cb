"""Predictions of several labels per example, each with its uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor

from pyrolora.columns import Batch
from pyrolora.tasks.classification import ClassPrediction, ClassProbabilities
from pyrolora.tasks.evidence import Baseline, Promise
from pyrolora.tasks.prediction import joined, table_of


@dataclass(frozen=True)
class MultiLabelPrediction(ClassProbabilities):
    """Probabilities of labels: ``draws`` is (S, n, C), ``targets`` (n, C) of 0 and 1.

    The labels of an example are independent given a draw. Each splits its uncertainty as
    H[p̄] = mean_s H[p_s] + mutual information, (n, C): ``label_entropy``, ``label_aleatoric``,
    ``label_epistemic``, in nats. ``entropy``, ``aleatoric`` and ``epistemic`` are their sums over
    labels, (n,). The entropy of all labels together is at most the sum of theirs.
    """

    target_dims = ("class",)
    higher_is_better: ClassVar[Mapping[str, bool | None]] = {
        "micro_f1": True,
        "macro_f1": True,
        "exact_match": True,
        "mean_average_precision": True,
        "label_auroc": True,
        "nll": False,
        "ece": False,
        "brier": False,
        "aurc": False,
    }

    @staticmethod
    def reduce(task: Any, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
        probs, scores, labels = [], [], task.targets(batch)
        for output in outputs:
            probs.append(task.tempered(output).sigmoid().cpu())
            if labels is not None:
                scores.append(task.log_prob(output, batch).cpu())
        record = {"draws": torch.cat(probs)}
        if labels is not None:
            record |= {"log_likelihood": torch.cat(scores), "targets": labels.long().cpu()}
        return record

    @classmethod
    def collect(cls, records: Sequence[dict[str, Tensor]], task: Any) -> MultiLabelPrediction:
        return cls(
            draws=torch.cat([record["draws"] for record in records], dim=1),
            targets=joined(records, "targets", 0),
            log_likelihood=joined(records, "log_likelihood", 1),
        )

    def decided(self, probs: Tensor) -> Tensor:
        """Return 1 where a probability is above one half, else 0, (..., C)."""
        return (probs > 0.5).long()

    @property
    def predicted(self) -> Tensor:
        """1 for labels of a probability above one half, else 0, (n, C)."""
        return self.decided(self.probs)

    @property
    def label_entropy(self) -> Tensor:
        """H[p̄] of each label, (n, C)."""
        return _binary_entropy(self.probs)

    @property
    def label_aleatoric(self) -> Tensor:
        """mean_s H[p_s] of each label, (n, C)."""
        return _binary_entropy(self.draws).mean(0)

    @property
    def label_epistemic(self) -> Tensor:
        """H[p̄] − mean_s H[p_s] >= 0, the mutual information of a label and the draw, (n, C)."""
        return (self.label_entropy - self.label_aleatoric).clamp(min=0)

    @property
    def entropy(self) -> Tensor:
        """The sum of the labels' entropies, (n,)."""
        return self.label_entropy.sum(-1)

    @property
    def aleatoric(self) -> Tensor:
        """The sum of the labels' aleatoric parts, (n,)."""
        return self.label_aleatoric.sum(-1)

    @property
    def epistemic(self) -> Tensor:
        """The sum of the labels' epistemic parts, (n,)."""
        return self.label_epistemic.sum(-1)

    @property
    def uncertainty(self) -> Tensor:
        """The sum of the labels' entropies, (n,), in nats."""
        return self.entropy

    @property
    def loss(self) -> Tensor | None:
        """The share of the labels that are predicted wrongly, (n,): the Hamming loss."""
        wrong = self._wrong()
        return None if wrong is None else wrong.float().mean(-1)

    def _wrong(self) -> Tensor | None:
        return None if self.targets is None else self.predicted != self.targets

    def predictive_draws(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        dims = (self.row, "class")
        return {"y": (torch.bernoulli(self.draws).long(), dims), "probs": (self.draws, dims)}

    def to_pandas(self) -> pd.DataFrame:
        columns = {
            **self.prob_columns(),
            "entropy": self.entropy,
            "aleatoric": self.aleatoric,
            "epistemic": self.epistemic,
        }
        table = table_of(columns, None)
        table.insert(self.draws.shape[-1], "predicted", self._names(self.predicted))
        if self.targets is not None:
            table["target"] = self._names(self.targets)
        return table

    def _names(self, labels: Tensor) -> pd.Series:
        """Return the list of the classes of each example, as names or as numbers."""
        names: Sequence[Any] = self.classes or range(labels.shape[-1])
        rows = [[names[c] for c in row.nonzero().flatten().tolist()] for row in labels]
        return pd.Series(rows, dtype=object)

    uncertainty_name = "sum of the labels' predictive entropies (nats)"
    risk_name = "share of wrong labels"
    risk_from_zero = True
    surprise_note = (
        "{count} of {total} examples have a wrong label; these have the most confident of them."
    )

    @property
    def surprise(self) -> Tensor | None:
        """The highest confidence of a wrong label, (n,); NaN where all labels are right."""
        wrong = self._wrong()
        if wrong is None:
            return None
        highest = self._confidence().masked_fill(~wrong, -1).amax(-1)
        return highest.masked_fill(highest < 0, torch.nan)

    def _confidence(self) -> Tensor:
        return torch.maximum(self.probs, 1 - self.probs)

    def decisions(self) -> ClassPrediction:
        """Return a prediction with a row per example and label, of the classes no and yes."""
        yes = self.draws.flatten(1)
        targets = None if self.targets is None else self.targets.flatten()
        return ClassPrediction(targets, None, torch.stack([1 - yes, yes], -1))

    def class_counts(self) -> dict[str, Tensor]:
        counts = {"predicted": self.predicted.sum(0)}
        return counts if self.targets is None else {"target": self.targets.sum(0), **counts}

    def promise(self) -> Promise | None:
        """Return the confidences, and which labels are right, summed over the labels of a row."""
        wrong = self._wrong()
        if wrong is None or len(wrong) < 2:
            return None
        right = (~wrong).double().sum(-1)
        return Promise(
            self._confidence().double().sum(-1),
            right,
            "The mean confidence is {promised:.3f}, and {kept:.3f} of the labels are right: the "
            "confidence is {gap:.3f} too high, with a standard error of {error:.3f}.",
            counts=torch.full_like(right, wrong.shape[-1]),
        )

    def baseline(self, without_adapters: Callable[[], Any]) -> Baseline | None:
        """Return the scores of independent labels with their frequencies in these data."""
        if self.targets is None:
            return None
        y = self.targets.double()
        share = y.mean(0)
        scores = torch.special.xlogy(y, share) + torch.special.xlogy(1 - y, 1 - share)
        wrong = (share > 0.5).double() != y
        return Baseline("frequencies of the labels", scores.sum(-1), wrong.double().mean(-1))

    def columns(self, class_name: Callable[[int, int], str]) -> dict[str, Sequence[Any]]:
        def named(labels: Tensor) -> list[str]:
            rows = [row.nonzero().flatten().tolist() for row in labels]
            return [", ".join(class_name(i, c) for c in row) for i, row in enumerate(rows)]

        return {
            **({} if self.targets is None else {"target": named(self.targets)}),
            "predicted": named(self.predicted),
            "least sure label": [class_name(*pair) for pair in enumerate(self._least_sure())],
            "entropy": self.entropy.tolist(),
            "mutual information": self.epistemic.tolist(),
        }

    def _least_sure(self) -> list[int]:
        return self.label_entropy.argmax(-1).tolist()


def _binary_entropy(probs: Tensor) -> Tensor:
    """Return the entropy of Bernoulli variables, of the shape of ``probs``, in nats."""
    return -torch.special.xlogy(probs, probs) - torch.special.xlogy(1 - probs, 1 - probs)

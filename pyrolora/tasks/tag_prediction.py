"""Predictions of token classification: a tag per token that counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import pandas as pd
import torch
from torch import Tensor

from pyrolora.columns import Batch
from pyrolora.data.padding import MASK
from pyrolora.tasks.classification import ClassPrediction
from pyrolora.tasks.prediction import joined


@dataclass(frozen=True)
class TagPrediction(ClassPrediction):
    """Class probabilities with one row per counted token: ``draws`` is (S, m, C).

    ``example`` and ``position`` are (m,): the number of the token's example in the data, and its
    place among the tokens of that example, without padding.
    """

    row = "token"
    higher_is_better: ClassVar[Mapping[str, bool | None]] = {
        **ClassPrediction.higher_is_better,
        "entity_precision": True,
        "entity_recall": True,
        "entity_f1": True,
    }

    example: Tensor = field(kw_only=True)
    position: Tensor = field(kw_only=True)

    @staticmethod
    def reduce(task: Any, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
        mask = task.token_mask(batch)
        seen = batch.get(MASK, torch.ones_like(mask))
        record = {
            "example": mask.nonzero()[:, 0].cpu(),
            "position": (seen.long().cumsum(-1) - 1)[mask].cpu(),
            "size": torch.tensor(len(mask)),
        }
        labels = task.targets(batch)
        probs, scores = [], []
        for output in outputs:
            probs.append(task.token_logits(output, batch)[..., mask, :].softmax(-1).cpu())
            if labels is not None:
                scores.append(task.row_log_prob(output, batch).cpu())
        record["draws"] = torch.cat(probs)
        if labels is not None:
            record |= {"log_likelihood": torch.cat(scores), "targets": labels[mask].cpu()}
        return record

    @classmethod
    def collect(cls, records: Sequence[dict[str, Tensor]], task: Any) -> TagPrediction:
        before = [0]
        for record in records:
            before.append(before[-1] + int(record["size"]))
        examples = [r["example"] + n for r, n in zip(records, before, strict=False)]
        return cls(
            draws=torch.cat([record["draws"] for record in records], dim=1),
            targets=joined(records, "targets", 0),
            log_likelihood=joined(records, "log_likelihood", 1),
            example=torch.cat(examples),
            position=torch.cat([record["position"] for record in records]),
        )

    @property
    def examples(self) -> Tensor:
        """The number of each token's example in the data, (m,)."""
        return self.example

    def places(self) -> dict[str, Tensor]:
        return {"position": self.position}

    def in_order(self, order: Sequence[int]) -> Self:
        """Return the tokens in the order of the data; the prediction was made in another order."""
        numbers = torch.as_tensor(order)[self.example]
        return replace(self, example=numbers).select(numbers.argsort(stable=True))

    def of_examples(self, numbers: Tensor) -> Self:
        """Return the tokens of these examples, numbered anew, so that none runs into its copy."""
        counts = self.example.bincount(minlength=int(numbers.max()) + 1)
        first, sizes = (counts.cumsum(0) - counts)[numbers], counts[numbers]
        copies = torch.arange(len(numbers)).repeat_interleave(sizes)
        within = torch.arange(len(copies)) - (sizes.cumsum(0) - sizes)[copies]
        rows = self.example.argsort(stable=True)[first[copies] + within]
        return replace(self.select(rows), example=copies)

    def metrics(self) -> dict[str, float | Tensor]:
        """Return precision, recall and F1 of whole entities, by seqeval as the CoNLL script counts.

        There are none where the classes are not named by IOB or IOBES, as O, B-PER and I-PER are.
        """
        from seqeval.metrics import f1_score, precision_score, recall_score

        if self.classes is None or not names_entities(self.classes):
            return {}
        assert self.targets is not None
        counts = self.example.unique_consecutive(return_counts=True)[1].tolist()
        tags = [
            [[self.classes[c] for c in row.tolist()] for row in numbers.split(counts)]
            for numbers in (self.targets, self.predicted)
        ]
        scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
        return {f"entity_{n}": float(score(*tags, zero_division=0)) for n, score in scores.items()}

    def to_pandas(self) -> pd.DataFrame:
        places = {"example": self.example.numpy(), "position": self.position.numpy()}
        return pd.concat([pd.DataFrame(places), super().to_pandas()], axis=1)

    def columns(self, class_name: Callable[[int, int], str]) -> dict[str, Sequence[Any]]:
        return {"position": self.position.tolist(), **super().columns(class_name)}


def names_entities(classes: Iterable[str]) -> bool:
    """Return whether classes are named by IOB or IOBES: O, and B-, I-, E- or S- with a type."""
    inside = [name for name in classes if name != "O"]
    return bool(inside) and all(re.fullmatch(r"[BIES]-.+", name) for name in inside)

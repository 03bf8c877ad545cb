"""Predictions of the tokens of known texts, with their uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import pandas as pd
import torch
from torch import Tensor

from pyrolora.columns import IGNORED, Batch
from pyrolora.distributions import rows_at_once
from pyrolora.tasks.evidence import Promise
from pyrolora.tasks.prediction import Prediction, entropy_of, filled, joined, table_of


@dataclass(frozen=True)
class TokenPrediction(Prediction):
    """Predictions of the tokens of known texts, NaN where a token does not count.

    ``entropy`` and ``aleatoric`` are (n, T), in nats; (n, T-1) for a causal model, which predicts
    every token but the first. The (S, n, T, vocabulary) probabilities are never held.
    ``log_likelihood`` sums an example's counted tokens; ``num_tokens`` (n,) says how many there
    are.
    """

    higher_is_better: ClassVar[Mapping[str, bool | None]] = {"nll": False, "perplexity": False}

    entropy: Tensor
    aleatoric: Tensor
    num_tokens: Tensor

    @staticmethod
    def reduce(task: Any, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
        mask = task.token_mask(batch)
        labels = task.targets(batch)
        total: Tensor | None = None
        aleatoric = torch.zeros(mask.shape, device=mask.device)
        scores, count = [], 0
        for output in outputs:
            logits = task.token_logits(output, batch)
            total = torch.zeros_like(logits[0]) if total is None else total
            for part in _pieces(logits):
                probs = logits[..., part, :].softmax(-1)
                total[..., part, :] += probs.sum(0)
                aleatoric[:, part] += entropy_of(probs).sum(0)
            count += len(output)
            del logits  # at a temperature they are a copy, and the scores make another
            if labels is not None:
                scores.append(task.log_prob(output, batch).cpu())
            del output  # before the next draws have theirs
        assert total is not None
        pieces = [entropy_of(total[:, part] / count) for part in _pieces(total)]
        entropies = {"entropy": torch.cat(pieces, 1), "aleatoric": aleatoric / count}
        record = {
            name: task.spread(values.masked_fill(~mask, torch.nan), batch, torch.nan).cpu()
            for name, values in entropies.items()
        }
        record["num_tokens"] = mask.sum(-1).cpu()
        if labels is not None:
            counted = task.spread(labels.masked_fill(~mask, IGNORED), batch, IGNORED)
            record |= {"log_likelihood": torch.cat(scores), "targets": counted.cpu()}
        return record

    @classmethod
    def collect(cls, records: Sequence[dict[str, Tensor]], task: Any) -> TokenPrediction:
        length = max(record["entropy"].shape[1] for record in records)
        padded = [
            {
                **record,
                "entropy": filled(record["entropy"], length, torch.nan),
                "aleatoric": filled(record["aleatoric"], length, torch.nan),
                **(
                    {"targets": filled(record["targets"], length, IGNORED)}
                    if "targets" in record
                    else {}
                ),
            }
            for record in records
        ]
        return cls(
            entropy=torch.cat([record["entropy"] for record in padded]),
            aleatoric=torch.cat([record["aleatoric"] for record in padded]),
            num_tokens=torch.cat([record["num_tokens"] for record in padded]),
            targets=joined(padded, "targets", 0),
            log_likelihood=joined(padded, "log_likelihood", 1),
        )

    @property
    def epistemic(self) -> Tensor:
        """The mutual information of token and draw, of the shape of ``entropy``."""
        return (self.entropy - self.aleatoric).clamp(min=0)

    @property
    def uncertainty(self) -> Tensor:
        """The mean entropy of the tokens that count, (n,), in nats per token."""
        return self.entropy.nanmean(-1)

    @property
    def loss(self) -> Tensor | None:
        """The negative log-likelihood of the mixture over draws, (n,), in nats per token."""
        scores = self.log_predictive
        return None if scores is None else -scores / self.num_tokens

    def counted(self) -> Self:
        return self.select(self.num_tokens.nonzero().flatten())

    def predictive_draws(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        return {}  # the texts that the model might have written are not drawn

    def to_pandas(self) -> pd.DataFrame:
        columns = {
            "num_tokens": self.num_tokens,
            "entropy": self.uncertainty,
            "aleatoric": self.aleatoric.nanmean(-1),
            "epistemic": self.epistemic.nanmean(-1),
        }
        if self.loss is not None:
            columns["nll"] = self.loss
        return table_of(columns, None)

    uncertainty_name = "mean entropy per token (nats)"
    risk_name = "nats per token"
    surprise_note = "The texts that cost the most nats per token above what their entropy expects."

    @property
    def token_entropy(self) -> Tensor | None:
        """The entropy of every token, (n, T); (n, T-1) of a causal model."""
        return self.entropy

    @property
    def surprise(self) -> Tensor | None:
        """The nats per token above the mean entropy, (n,)."""
        return None if self.loss is None else self.loss - self.uncertainty

    def promise(self) -> Promise | None:
        """Return the log-likelihood that the entropies expect of each text, and the actual one."""
        if self.log_predictive is None:
            return None
        return Promise(
            -self.entropy.double().nansum(-1),
            self.log_predictive.double(),
            "The log-likelihood per token is {kept:.3f} nats, and the predictions themselves "
            "expect {promised:.3f}: {gap:.3f} too much, with a standard error of {error:.3f}.",
            counts=self.num_tokens,
        )

    def columns(self, class_name: Callable[[int, int], str]) -> dict[str, Sequence[Any]]:
        return {
            **({} if self.loss is None else {"nats per token": self.loss.tolist()}),
            "entropy": self.uncertainty.tolist(),
            "mutual information": self.epistemic.nanmean(-1).tolist(),
            "tokens": self.num_tokens.tolist(),
        }


def _pieces(logits: Tensor) -> Iterator[slice]:
    """Yield slices of the tokens of (..., T, classes) logits, as few as `rows_at_once` allows."""
    size, classes = logits.shape[-2:]
    step = max(1, rows_at_once(logits) * size * classes // logits.numel())
    return (slice(first, first + step) for first in range(0, size, step))

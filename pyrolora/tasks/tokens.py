"""What language models share: one label a token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import pandas as pd
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrolora.columns import IGNORED, Batch
from pyrolora.distributions import LogitsCategorical
from pyrolora.errors import DataError
from pyrolora.tasks.base import Task
from pyrolora.tasks.classification import check_one_label
from pyrolora.tasks.prediction import Prediction, entropy_of, filled, joined, table_of


@dataclass(frozen=True)
class TokenPrediction(Prediction):
    """Predictions of the tokens of given texts: per token, NaN where a token does not count.

    ``entropy`` and ``aleatoric`` are (n, T), in nats; (n, T-1) of a causal model, which predicts
    every token but the first. The (S, n, T, vocabulary) probabilities are never held.
    ``log_likelihood`` sums an example's counted tokens; ``num_tokens`` (n,) says how many there
    are.
    """

    higher_is_better: ClassVar[Mapping[str, bool | None]] = {"nll": False, "perplexity": False}

    entropy: Tensor
    aleatoric: Tensor
    num_tokens: Tensor

    @staticmethod
    def reduce(task: TokenTask, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
        mask = task.token_mask(batch)
        labels = task.targets(batch)
        total: Tensor | float = 0.0
        aleatoric: Tensor | float = 0.0
        scores, count = [], 0
        for output in outputs:
            probs = task.token_logits(output).softmax(-1)
            total = total + probs.sum(0)
            aleatoric = aleatoric + entropy_of(probs).sum(0)
            count += len(output)
            if labels is not None:
                scores.append(task.log_prob(output, batch).cpu())
        assert isinstance(total, Tensor)
        assert isinstance(aleatoric, Tensor)
        record = {
            "entropy": entropy_of(total / count).masked_fill(~mask, torch.nan).cpu(),
            "aleatoric": (aleatoric / count).masked_fill(~mask, torch.nan).cpu(),
            "num_tokens": mask.sum(-1).cpu(),
        }
        if labels is not None:
            counted = labels.masked_fill(~mask, IGNORED)
            record |= {"log_likelihood": torch.cat(scores), "targets": counted.cpu()}
        return record

    @classmethod
    def collect(cls, records: Sequence[dict[str, Tensor]], task: Task) -> TokenPrediction:
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
        """The mean entropy of the tokens that count, (n,), in nats a token."""
        return self.entropy.nanmean(-1)

    @property
    def loss(self) -> Tensor | None:
        """The negative log-likelihood of the mixture over draws, (n,), in nats a token."""
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


@dataclass(frozen=True)
class TokenScores(TokenPrediction):
    """The log-likelihoods of given texts alone: their entropies, which take a softmax over the
    vocabulary at every token, are NaN."""

    @staticmethod
    def reduce(task: TokenTask, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
        mask, labels = task.token_mask(batch), task.targets(batch)
        assert labels is not None
        unknown = torch.full(mask.shape, torch.nan)
        return {
            "entropy": unknown,
            "aleatoric": unknown,
            "num_tokens": mask.sum(-1).cpu(),
            "log_likelihood": torch.cat([task.log_prob(o, batch).cpu() for o in outputs]),
            "targets": labels.masked_fill(~mask, IGNORED).cpu(),
        }


class TokenTask(Task):
    """log p(y) of an example is the **sum** over its labelled tokens of log softmax(f_{t-d})[y_t],
    with f (..., b, T, vocabulary) and the distance d, ``shift``, of a token from the place that
    predicts it. Tokens labelled -100 do not count.
    """

    prediction = TokenPrediction
    tempers = True
    shift: ClassVar[int]
    title: ClassVar[str]
    """What errors call the network."""

    def law(self, output: Tensor, batch: Batch) -> dist.TorchDistribution:
        tokens = LogitsCategorical(self.token_logits(output), validate_args=False)
        return tokens.mask(self.token_mask(batch)).to_event(1)

    def targets(self, batch: Batch) -> Tensor | None:
        labels = batch.get("labels")
        return None if labels is None else labels[..., self.shift :].clamp(min=0)

    def token_logits(self, output: Tensor) -> Tensor:
        """(..., b, T-d, vocabulary): what the tokens d..T-1 are predicted by."""
        return self.tempered(output[..., : output.shape[-2] - self.shift, :])

    def token_mask(self, batch: Batch) -> Tensor:
        """(b, T-d) booleans: which tokens count; without labels all that are not padding, and that
        no padding predicts."""
        labels = batch.get("labels")
        if labels is not None:
            return labels[..., self.shift :].ne(IGNORED)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        return mask[..., self.shift :] & mask[..., : mask.shape[-1] - self.shift]

    def curvature(self, output: Tensor, batch: Batch) -> Iterator[Tensor]:
        """One vector, e_y − p with y drawn from p at each token that counts: E[v vᵀ] is the
        Hessian, whose blocks are diag(p) − p pᵀ a token."""
        logits = self.token_logits(output.detach())
        drawn = torch.distributions.Categorical(logits=logits, validate_args=False).sample()
        residual = -logits.softmax(-1)
        residual.scatter_add_(-1, drawn[..., None], torch.ones_like(residual[..., :1]))
        yield F.pad(residual * self.token_mask(batch)[..., None], (0, 0, 0, self.shift))

    def check_labels(self, labels: Tensor, network: nn.Module) -> None:
        vocabulary = getattr(getattr(network, "config", None), "vocab_size", None)
        if labels.is_floating_point():
            check_one_label(labels, f"{self.title} needs token ids as 'labels'")
        if labels.dim() != 2 or labels.is_floating_point():
            raise DataError(
                f"{self.title} needs one token id a position as 'labels', got labels of dtype "
                f"{labels.dtype} and shape {tuple(labels.shape)}; leave 'labels' out to learn from "
                "the text alone"
            )
        if self.count(labels) == 0:
            first = " or a text's first, which nothing predicts" if self.shift else ""
            raise DataError(
                f"every token is labelled -100 (ignored){first}; there is nothing to learn from, "
                "or to score"
            )
        counted = labels[labels.ne(IGNORED)]
        if counted.min() < 0 or (vocabulary is not None and counted.max() >= vocabulary):
            raise DataError(
                f"token labels must be in 0..{(vocabulary or 0) - 1} or -100, got "
                f"{int(counted.min())}..{int(counted.max())}; was another tokenizer used?"
            )

    def check_output(self, output: Tensor, labels: Tensor) -> None:
        if output.dim() != 3:
            raise DataError(
                f"{self.title} gives logits (n, T, vocabulary); this network gave shape "
                f"{tuple(output.shape)}"
            )

    def count(self, labels: Tensor) -> int:
        return int(labels[..., self.shift :].ne(IGNORED).sum())

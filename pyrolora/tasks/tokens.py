"""Tasks with one label per token: tags, and the tokens of language models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import pandas as pd
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrolora.columns import IGNORED, LABELS, PLACES, Batch
from pyrolora.data import Collator
from pyrolora.distributions import LogitsCategorical, drawn_residual, rows_at_once
from pyrolora.errors import ConfigError, DataError
from pyrolora.tasks.base import Task
from pyrolora.tasks.classification import check_one_label
from pyrolora.tasks.evidence import Promise
from pyrolora.tasks.prediction import Prediction, entropy_of, filled, joined, table_of

LOOKED_AT = 100
"""The number of examples that show whether labels are the tokens of their texts."""


class TokenTask(Task):
    """One label per token, of which the likelihood of an example is the product.

    log p(y) is the **sum** over the labelled tokens of log softmax(f_{t-d})[y_t]. f is
    (..., b, T, classes), over the vocabulary or over tags, and d, ``shift``, is the distance of a
    token from the place that predicts it. Tokens labelled -100 do not count. Where the batch names
    places (`pyrolora.columns.PLACES`), f has their rows alone, (..., b, K, classes), and the tokens
    here are those that they predict.
    """

    tempers = True
    shift: ClassVar[int]
    title: ClassVar[str]
    """The name of such a network in errors."""

    def law(self, output: Tensor, batch: Batch) -> dist.TorchDistribution:
        tokens = LogitsCategorical(self.token_logits(output, batch), validate_args=False)
        return tokens.mask(self.token_mask(batch)).to_event(1)

    def targets(self, batch: Batch) -> Tensor | None:
        labels = batch.get("labels")
        return None if labels is None else self.predicted(labels, batch).clamp(min=0)

    def predicted(self, values: Tensor, batch: Batch) -> Tensor:
        """Return those of (b, T) values of tokens that the logits predict: (b, T-d), or (b, K)."""
        places = batch.get(PLACES)
        if places is None:
            return values[..., self.shift :]
        return values.gather(-1, places + self.shift)

    def spread(self, values: Tensor, batch: Batch, fill: float) -> Tensor:
        """Return values of predicted tokens in their places of the text, (b, T-d)."""
        places = batch.get(PLACES)
        if places is None:
            return values
        size = len(values), batch[LABELS].shape[-1] - self.shift
        return values.new_full(size, fill).scatter(-1, places, values)

    def token_logits(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the logits (..., b, T-d, classes) of the tokens d..T-1, or those of K tokens."""
        last = output.shape[-2] - (0 if PLACES in batch else self.shift)
        return self.tempered(output[..., :last, :])

    def token_mask(self, batch: Batch) -> Tensor:
        """Return (b, T-d) or (b, K) booleans, true for predicted tokens that count.

        Without labels these are the tokens that are not padding, and that no padding predicts.
        """
        labels = batch.get("labels")
        if labels is not None:
            return self.predicted(labels, batch).ne(IGNORED)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        return mask[..., self.shift :] & mask[..., : mask.shape[-1] - self.shift]

    def curvature(self, output: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield one vector, e_y − p with y drawn from p at each token that counts.

        E[v vᵀ] is the Hessian, with one block diag(p) − p pᵀ per token.
        """
        logits = self.token_logits(output.detach(), batch)
        residual = drawn_residual(logits) * self.token_mask(batch)[..., None]
        yield F.pad(residual, (0, 0, 0, output.shape[-2] - residual.shape[-2]))

    def count(self, labels: Tensor) -> int:
        return int(labels[..., self.shift :].ne(IGNORED).sum())


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
    def reduce(task: TokenTask, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
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
            if labels is not None:
                scores.append(task.log_prob(output, batch).cpu())
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


class LanguageModel(TokenTask):
    """A `TokenTask` whose labels are tokens of the vocabulary."""

    keeps_labels = True
    prediction = TokenPrediction

    def check_labels(self, labels: Tensor, network: nn.Module) -> None:
        vocabulary = vocabulary_of(network)
        if labels.is_floating_point():
            check_one_label(labels, f"{self.title} needs token ids as 'labels'")
        if labels.dim() != 2 or labels.is_floating_point():
            raise DataError(
                f"{self.title} needs one token id per position as 'labels', got labels of dtype "
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

    def check_reading(self, output: Tensor, batch: Batch, network: nn.Module) -> None:
        """Raise `ConfigError` unless there are logits of the vocabulary for each token."""
        labels, (places, width) = batch[LABELS], output.shape[-2:]
        vocabulary = vocabulary_of(network)
        few = isinstance(vocabulary, int) and width < vocabulary
        if places != labels.shape[-1] or few or int(labels.max()) >= width:
            raise ConfigError(
                f"{self.title} gives logits of its vocabulary for each of its input's "
                f"{labels.shape[-1]} tokens, and this {type(network).__name__} gives {width} for "
                f"{places} (the vocabulary has {vocabulary}, the labels go up to "
                f"{int(labels.max())}); for a tag per token use task='token-classification', for "
                "texts that differ from the input 'text2text-generation' with a network for it"
            )


def _pieces(logits: Tensor) -> Iterator[slice]:
    """Yield slices of the tokens of (..., T, classes) logits, as few as `rows_at_once` allows."""
    size, classes = logits.shape[-2:]
    step = max(1, rows_at_once(logits) * size * classes // logits.numel())
    return (slice(first, first + step) for first in range(0, size, step))


def vocabulary_of(network: nn.Module) -> int | None:
    """Return the number of tokens in the vocabulary; of two, the one that is written."""
    config = getattr(network, "config", None)
    parts = (*(getattr(config, name, None) for name in ("text_config", "decoder")), config)
    sizes = (getattr(part, "vocab_size", None) for part in parts)
    return next((size for size in sizes if isinstance(size, int)), None)


def check_own_tokens(examples: Any, collate: Collator, *, causal: bool) -> None:
    """Raise `DataError` for labels that are not the tokens of their texts.

    They may be tags, or tokens that the user has shifted already. In texts for a masked model, some
    tokens are hidden or replaced by random ones.
    """
    mask = getattr(collate.tokenizer, "mask_token_id", None)
    if not causal and mask is None:
        return
    same = shifted = count = 0
    for i in range(min(len(examples), LOOKED_AT)):
        row = collate.example(examples[i])
        labels, ids = torch.as_tensor(row[LABELS]), row.get("input_ids")
        if ids is None or labels.shape != torch.as_tensor(ids).shape:
            return
        ids = torch.as_tensor(ids)
        counted = labels != IGNORED
        fits = (labels == ids) | (ids == mask if mask is not None and not causal else False)
        same += int(fits[counted].sum())
        shifted += int((labels[:-1] == ids[1:])[counted[:-1]].sum())
        count += int(counted.sum())
    if 2 * same >= count:
        return
    if causal and 2 * shifted >= count:
        raise DataError(
            "the labels are the input_ids one place on; the task shifts them itself, as "
            "transformers does: give each token's id as its own label, -100 where it does not count"
        )
    raise DataError(
        f"of {count} labels of tokens {same} are their tokens' ids"
        + ("" if causal else " or those of hidden tokens")
        + ": they are tags (use task='token-classification'), or of another text, or of another "
        "tokenizer; a language model's labels are the ids of its own input"
    )

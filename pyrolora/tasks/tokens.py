"""What language models share: one label a token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrolora.columns import IGNORED, Batch
from pyrolora.distributions import LogitsCategorical
from pyrolora.errors import DataError
from pyrolora.tasks.base import Task
from pyrolora.tasks.classification import check_one_label


class TokenTask(Task):
    """log p(y) of an example is the **sum** over its labelled tokens of log softmax(f_{t-d})[y_t],
    with f (..., b, T, vocabulary) and the distance d, ``shift``, of a token from the place that
    predicts it. Tokens labelled -100 do not count.
    """

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

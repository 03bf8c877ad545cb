"""A categorical distribution that keeps its logits as they are."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import Categorical
from torch import Tensor
from torch.distributions import Distribution


class LogitsCategorical(Categorical):
    """``Categorical(logits=...)`` that normalises where it is asked for a density, and not before.

        log p(y) = f_y - log Σ_v exp f_v

    Pyro's keeps normalised logits beside the unnormalised ones, and its gradient makes two more
    tensors of their size. Those of a language model are the largest tensors of a step: (b, T,
    vocabulary).

    Parameters
    ----------
    logits : Tensor
        f, shape ``(*batch_shape, vocabulary)``.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self._param = logits  # torch's name for what was given
        self._num_events = logits.shape[-1]
        Distribution.__init__(self, logits.shape[:-1], validate_args=validate_args)

    @property
    def logits(self) -> Tensor:
        """The normalised logits: the logarithms of the probabilities."""
        return self._param.log_softmax(-1)

    @property
    def probs(self) -> Tensor:
        return self._param.softmax(-1)

    @property
    def param_shape(self) -> torch.Size:
        return self._param.shape

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogitsCategorical:
        shape = torch.Size(batch_shape)
        return LogitsCategorical(self._param.expand(*shape, -1), validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        chosen = value.long().expand(shape).unsqueeze(-1)
        logits = self.logits.expand(*shape, self._num_events)
        return logits.gather(-1, chosen).squeeze(-1)

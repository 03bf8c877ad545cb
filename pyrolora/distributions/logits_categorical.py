"""A categorical distribution that keeps its logits as they are."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import Categorical
from torch import Tensor
from torch.distributions import Distribution

from pyrolora import defaults


def rows_at_once(logits: Tensor) -> int:
    """Return how many rows of (..., classes) logits to normalise at a time."""
    on_cpu = logits.device.type == "cpu"
    most = defaults.LOGITS_CPU if on_cpu else defaults.LOGITS
    return max(1, most // logits.shape[-1])


def drawn_residual(logits: Tensor) -> Tensor:
    """Return e_y − p with y drawn from p, the softmax of the logits (..., classes).

    E[v vᵀ] of such a v is diag(p) − p pᵀ, the Hessian of −log p(y) in the logits.
    """
    drawn = torch.distributions.Categorical(logits=logits, validate_args=False).sample()
    residual = -logits.softmax(-1)
    return residual.scatter_add_(-1, drawn[..., None], torch.ones_like(residual[..., :1]))


class LogitsCategorical(Categorical):
    """``Categorical(logits=...)`` that normalises where it is asked for a density, and not before.

        log p(y) = f_y - log Σ_v exp f_v

    Pyro's keeps normalised logits beside the unnormalised ones, and its gradient makes two more
    tensors of their size. Those of a language model are the largest tensors of a step: (b, T,
    vocabulary). Here the gradient is the only one: rows are normalised some at a time
    (`rows_at_once`), and once more for the gradient.

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
        chosen = value.long().expand(shape)
        if shape != self.batch_shape:
            logits = self.logits.expand(*shape, self._num_events)
            return logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        rows: Tensor = _LogProb.apply(self._param.reshape(-1, self._num_events), chosen.flatten())
        return rows.reshape(shape)


class _LogProb(torch.autograd.Function):
    """The log-probabilities (n,) of ``chosen`` classes (n,) under the softmax of logits (n, C)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(logits, chosen)
        rows = rows_at_once(logits)
        pairs = zip(logits.split(rows), chosen.unsqueeze(-1).split(rows), strict=True)
        return torch.cat([f.log_softmax(-1).gather(-1, y) for f, y in pairs]).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradients g (1[v = y] − softmax(f)_v) of the logits."""
        logits, chosen = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            ones = torch.zeros_like(logits).scatter_(-1, chosen.unsqueeze(-1), 1.0)
            return grad.unsqueeze(-1) * (ones - logits.softmax(-1)), None
        result, rows = torch.empty_like(logits), rows_at_once(logits)
        columns = (logits, result, chosen.unsqueeze(-1), grad.unsqueeze(-1))
        for f, out, y, g in zip(*(column.split(rows) for column in columns), strict=True):
            outer = torch.zeros_like(f).scatter_(-1, y, g)
            # The formula as log_softmax's own gradient computes it, to the last bit.
            torch.ops.aten._log_softmax_backward_data.out(
                outer, f.log_softmax(-1), -1, f.dtype, out=out
            )
        return result, None

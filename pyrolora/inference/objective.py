"""The objective of a fit as a module that the Trainer minimises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyrolora.columns import Batch
from pyrolora.inference.elbo import NamedELBO
from pyrolora.model import JointGuide, JointModel


class NotEvaluated(ArithmeticError):
    """The parameters at hand are none of a law: a scale of zero, a singular covariance."""


class Objective(nn.Module):
    """The loss that the Trainer minimises: −ELBO of one batch, in nats per observation.

    A constant divisor changes no optimum; without it the Trainer's gradient clipping would bite at
    every step.

    Parameters
    ----------
    joint
        The joint model.
    observations
        The number of observations of the whole data, as far as it is known: examples, or labelled
        tokens.
    """

    # The Trainer must not divide the loss by the accumulation steps: `compute_loss` weighs each
    # micro-batch by its share of the examples, which is exact when they differ in size.
    accepts_loss_kwargs = True

    def __init__(self, joint: JointModel, observations: float) -> None:
        super().__init__()
        self.observations = observations
        self.estimator = NamedELBO()
        self.elbo = self.estimator(joint, JointGuide(joint.program))

    @property
    def joint(self) -> JointModel:
        return self.elbo.model

    def forward(self, batch: Batch, kl_weight: float) -> Tensor:
        with evaluated():
            return self.elbo(batch, kl_weight=kl_weight) / self.observations

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.joint.activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.joint.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)


@contextmanager
def evaluated() -> Iterator[None]:
    """Raise `NotEvaluated` where the numbers of a law are none of its own."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NotEvaluated(_first_line(error)) from error
    except ValueError as error:
        if not re.search("of (the )?distribution ", str(error)):  # as validation of laws says
            raise
        raise NotEvaluated(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

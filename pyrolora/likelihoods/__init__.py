"""Likelihoods, one a file; chosen from the network's class, or by name."""

from __future__ import annotations

from torch import nn

from pyrolora.errors import ConfigError, UnknownNameError
from pyrolora.likelihoods.base import IGNORED, Likelihood
from pyrolora.likelihoods.causal_lm import CausalLM
from pyrolora.likelihoods.classification import Classification
from pyrolora.likelihoods.masked_lm import MaskedLM
from pyrolora.likelihoods.multiple_choice import CHOICE_MASK, MultipleChoice
from pyrolora.likelihoods.regression import Regression
from pyrolora.likelihoods.tasks import check_task, unsupported_task
from pyrolora.likelihoods.tokens import TokenLikelihood

_REGISTRY: dict[str, type[Likelihood]] = {
    kind.name: kind for kind in (Classification, Regression, CausalLM, MultipleChoice, MaskedLM)
}


def available() -> list[str]:
    """The names of all likelihoods."""
    return list(_REGISTRY)


def likelihood_for(network: nn.Module, name: str | None = None) -> Likelihood:
    """The likelihood called ``name``, or the one that the class of ``network`` calls for.

    Raises
    ------
    UnknownNameError
        For a name that does not exist.
    ConfigError
        For a network of a task without a likelihood; without a name, when the class of ``network``
        says nothing.
    """
    if name is None or name in _REGISTRY:
        check_task(network)
    if name is not None:
        if name not in _REGISTRY:
            raise UnknownNameError(
                f"unknown likelihood {name!r}; choose one of {', '.join(available())}"
            )
        return _REGISTRY[name]()
    for kind in _REGISTRY.values():
        if kind.matches(network):
            return kind()
    raise ConfigError(
        f"cannot tell the likelihood from a {type(network).__name__}; "
        f"pass likelihood= one of {', '.join(available())}"
    )


__all__ = [
    "CHOICE_MASK",
    "IGNORED",
    "CausalLM",
    "Classification",
    "Likelihood",
    "MaskedLM",
    "MultipleChoice",
    "Regression",
    "TokenLikelihood",
    "available",
    "likelihood_for",
    "unsupported_task",
]

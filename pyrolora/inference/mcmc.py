"""Markov chains on a joint model, given its parameters."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import init_to_sample
from torch import Tensor

from pyrolora.columns import Batch
from pyrolora.errors import NonFiniteError
from pyrolora.model import JointModel, evaluating
from pyrolora.options import changed_numbers
from pyrolora.seeding import give_way


def nuts(
    joint: JointModel,
    batch: Batch,
    beta: float = 1.0,
    *,
    chains: int,
    num_samples: int,
    warmup_steps: int,
    target_accept_prob: float = 0.8,
    max_tree_depth: int = 10,
    progress: bool = True,
) -> tuple[dict[str, Tensor], Tensor]:
    """Draw the latent sites from p(θ) p(y | θ)^{1/β} by Pyro's NUTS, without dropout.

    Parameters
    ----------
    joint
        The joint model; all of its parameters are constants.
    batch
        All of the data.
    beta
        The weight of the prior, relative to the likelihood.
    chains, num_samples, warmup_steps, target_accept_prob, max_tree_depth
        As in `pyrolora.guides.NUTS`.
    progress
        Show a bar for each chain.

    Returns
    -------
    dict, Tensor
        Site -> (chains, num_samples, ...), and (chains, num_samples) booleans: which of the steps
        diverged.
    """
    flags = {parameter: parameter.requires_grad for parameter in joint.parameters()}

    def target() -> Any:
        with poutine.scale(scale=1 / beta):
            return joint(batch, kl_weight=beta)

    samples: list[dict[str, Tensor]] = []
    diverging = torch.zeros(chains, num_samples, dtype=torch.bool)
    joint.requires_grad_(False)
    try:
        with evaluating(joint):
            for chain in range(chains):
                kernel = NUTS(
                    target,
                    target_accept_prob=target_accept_prob,
                    max_tree_depth=max_tree_depth,
                    init_strategy=init_to_sample,
                )
                run = MCMC(
                    kernel,
                    num_samples=num_samples,
                    warmup_steps=warmup_steps,
                    disable_progbar=not progress,
                    hook_fn=lambda *_: give_way(),
                )
                with _loggers_kept(), _explained(joint):
                    run.run()
                samples.append(run.get_samples())
                diverging[chain, run.diagnostics()["divergences"]["chain 0"]] = True
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return {
        name: torch.stack([c[name] for c in samples]).detach() for name in samples[0]
    }, diverging


@contextmanager
def _explained(joint: JointModel) -> Iterator[None]:
    """Raise `NonFiniteError` where Pyro finds no start of a chain among 100 draws of the prior."""
    try:
        yield
    except ValueError as error:
        if "cannot find valid initial params" not in str(error):
            raise
        program = joint.program
        numbers = [n for o in (program.options, program.bank.config) for n in changed_numbers(o)]
        raise NonFiniteError(
            "a chain of 'nuts' cannot start: at 100 draws of the prior the density of the "
            f"posterior, or its gradient, is not finite, with {', '.join(numbers)}. Choose a "
            "prior_scale (or sample_scale) and a lora_alpha nearer to the defaults, or look for "
            "extreme inputs"
        ) from error


@contextmanager
def _loggers_kept() -> Iterator[None]:
    """Leave Pyro's logger of chains as it is: each run of chains sets it up anew, for good."""
    logger = logging.getLogger("pyro.infer.mcmc")
    before = logger.handlers, logger.propagate, logger.level
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[0], before[1]
        logger.setLevel(before[2])

"""Markov chains on a joint model, given its parameters."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import init_to_sample
from torch import Tensor

from pyrolora.columns import Batch
from pyrolora.errors import NonFiniteError
from pyrolora.model import JointModel, evaluating
from pyrolora.options import changed_numbers
from pyrolora.processes import processes, shared_out
from pyrolora.seeding import give_way, seed_of_process


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
    seed: int = 0,
) -> tuple[dict[str, Tensor], Tensor]:
    """Draw the latent sites from p(θ) p(y | θ)^{1/β} by Pyro's NUTS, without dropout.

    Processes that take part share the chains out. The first chain is then that of one process, and
    each of the others starts from a seed of its own, where one process draws chain after chain.

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
    seed
        The seed of which those of shared-out chains are made.

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

    def run(numbers: Sequence[int]) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Return the draws of chains, and which of their steps diverged."""
        runs = []
        for number in numbers:
            if number and processes() > 1:
                pyro.set_rng_seed(seed_of_process(seed, number))
            kernel = NUTS(
                target,
                target_accept_prob=target_accept_prob,
                max_tree_depth=max_tree_depth,
                init_strategy=init_to_sample,
            )
            chain = MCMC(
                kernel,
                num_samples=num_samples,
                warmup_steps=warmup_steps,
                disable_progbar=not progress,
                hook_fn=lambda *_: give_way(),
            )
            with _loggers_kept(), _explained(joint):
                chain.run()
            steps = torch.zeros(num_samples, dtype=torch.bool)
            steps[chain.diagnostics()["divergences"]["chain 0"]] = True
            runs.append((chain.get_samples(), steps))
        return runs

    joint.requires_grad_(False)
    try:
        with evaluating(joint):
            found = run(range(chains)) if joint.sharded else shared_out(range(chains), run)
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    names = [*found[0][0]]  # a site at a time, so that no more than one of them is there twice
    draws = {n: torch.stack([one.pop(n) for one, _ in found]).detach() for n in names}
    return draws, torch.stack([steps for _, steps in found])


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

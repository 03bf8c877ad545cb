"""Groups of an ArviZ container: draws, quantities that follow from them, their predictions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.adapters import AnyFactors, FlatFactors
from pyrolora.arviz.containers import CALIBRATED, to_inference_data
from pyrolora.checks import whole_number
from pyrolora.data.labels import class_names_of
from pyrolora.errors import ConfigError
from pyrolora.guides import Guide, Program, full_name, spread
from pyrolora.model import JointModel
from pyrolora.predictive import NumberedDraws
from pyrolora.seeding import seeded
from pyrolora.tasks import Prediction

logger = logging.getLogger(__name__)

DRAWS_AT_ONCE = 50
"""Draws of all entries that are held at once, where only functions of them are kept."""

Variables = dict[str, tuple[Tensor, tuple[str, ...]]]
"""Name -> values (S, ...) and the names of their dimensions after the first."""


@torch.no_grad()
def inference_data(
    joint: JointModel,
    options: Guide,
    read: Callable[..., Prediction] | None,
    numbered: NumberedDraws,
    num_samples: int | None = None,
    *,
    draws: Sequence[int] | None = None,
    log_likelihood: bool = False,
    factors: bool = False,
    seed: int | None = None,
    temperature: float = 1.0,
    held_back: int = 0,
    fit_seed: int = 0,
    other_data: bool = False,
) -> Any:
    """Return draws of a fitted pair as ArviZ's container.

    `Posterior.to_arviz` describes the content. ``read(factors, temperature)`` returns the
    prediction that draws of the factors make for the data; ``temperature`` is the posterior's, and
    so is ``held_back``, the number of training examples that the fit did not learn from;
    ``other_data`` says that the data are known not to be those of the fit, or in another order.
    """
    program = joint.program
    chains = program.chains if draws is None else 1
    num_samples = _count(program, num_samples) if draws is None else len(draws)
    numbers = _numbers(program, num_samples) if draws is None and seed is None else draws
    shape = partial(_by_chain, chains=chains)
    coords: dict[str, Sequence[Any]] = {
        "layer": list(program.bank.specs),
        "block": program.block_names(),
        "draw": range(num_samples // chains),
    }
    pieces, kept, num_examples = [], [], joint.num_examples
    keeps = read is not None and num_samples <= program.bank.draws_at_once
    with seeded(seed):
        joint.align()
        state = torch.get_rng_state()
        for sites in _pieces(numbered, numbers, num_samples):
            drawn = program.factors(sites)
            pieces.append(_variables(program, sites, drawn, factors))
            if keeps:
                kept.append(drawn)
        groups: dict[str, Any] = {
            "posterior": {
                name: (shape(torch.cat([piece[name][0] for piece in pieces])), dims)
                for name, (_, dims) in pieces[0].items()
            }
        }
        stored = program.stored()
        if stored is not None:
            picked = spread(stored, num_samples) if numbers is None else torch.tensor(numbers)
            statistics = program.statistics(picked)
            groups["sample_stats"] = {n: (shape(t), ()) for n, t in statistics.items()}
        if read is not None:
            all_drawn = (
                FlatFactors.cat(kept) if keeps else _again(numbered, numbers, num_samples, state)
            )
            prediction = read(all_drawn, temperature)
            groups |= _data_groups(prediction, shape)
            num_examples, held_back = _counts(prediction, num_examples, held_back, options)
            if prediction.row != "example":
                coords[prediction.row] = prediction.examples.tolist()
            if log_likelihood:  # the log-likelihood of the model has no temperature
                untempered = prediction if temperature == 1 else read(all_drawn, 1.0)
                groups["log_likelihood"] = {"y": (_scores(untempered, shape), (untempered.row,))}
                if temperature != 1 or held_back:  # by which 1 was chosen, and elsewhere another
                    calibrated = {CALIBRATED: (_scores(prediction, shape), (prediction.row,))}
                    groups["sample_stats"] = {**groups.get("sample_stats", {}), **calibrated}
    if numbers is not None:
        coords["draw"] = numbers if chains == 1 else numbers[: num_samples // chains]
    names = class_names_of(joint.base, joint.task)
    if names and joint.task.names_classes:
        probs = groups.get("posterior_predictive", {}).get("probs")
        count = len(names) if probs is None else probs[0].shape[-1]
        coords["class"] = [names.get(i, str(i)) for i in range(count)]
    attrs: dict[str, str | int | float] = {
        "guide": full_name(options),
        "guide_options": str(options),
        "task": joint.task.name,
        "base": type(joint.base).__name__,
        "inference_library": "pyrolora",
        "num_examples": num_examples,
        "temperature": temperature,
        "draws": "counted" if numbers is None else "numbered",
        # NUTS samples the tempered model of its inner guide, which has the weight.
        "kl_weight": getattr(options, "inner", options).beta(joint.num_examples),
    }
    if held_back:
        attrs |= {"held_back": held_back, "fit_seed": fit_seed}
        attrs |= {"other_data": 1} if other_data else {}
    if log_likelihood and attrs["kl_weight"] != 1:
        attrs["leave_one_out"] = _leave_one_out_advice(float(attrs["kl_weight"]))
    return to_inference_data(groups, coords, attrs)


def _counts(prediction: Prediction, learnt: int, held_back: int, options: Guide) -> tuple[int, int]:
    """Return how many examples were learnt and held back, of these terms of the likelihood."""
    of_learnt = prediction.examples_of(learnt)
    if not held_back or of_learnt != learnt:  # the data are those that were learnt
        return of_learnt, 0
    n = prediction.examples_of(learnt + held_back)
    apart = options.number_held_back(n)
    return n - apart, apart


@cache
def _leave_one_out_advice(beta: float) -> str:
    """Return the advice on leave-one-out for β other than 1, and log it once."""
    wrong = "too good" if beta < 1 else "too strict"
    advice = "pyrolora.diagnostics.loo(idata), since az.loo, which takes a KL weight of "
    advice += f"{beta:g} for 1, would be {wrong}"
    logger.warning("leave-one-out of these log-likelihoods: %s", advice)
    return advice


def _count(program: Program, num_samples: int | None) -> int:
    """Check the number of draws over all chains, or return the default."""
    if num_samples is None:
        num_samples = program.stored() or defaults.ARVIZ_DRAWS
    whole_number("num_samples", num_samples, at_least=1)
    if num_samples % program.chains:
        raise ConfigError(
            f"num_samples must be a multiple of the {program.chains} chains, got {num_samples}"
        )
    return num_samples


def _numbers(program: Program, num_samples: int) -> list[int] | None:
    """Return the numbers of the draws to take; None where stored draws are taken repeatedly."""
    stored = program.stored()
    if stored is not None and num_samples > stored:
        return None
    return list(range(num_samples)) if stored is None else spread(stored, num_samples).tolist()


def _pieces(
    numbered: NumberedDraws, numbers: Sequence[int] | None, num_samples: int
) -> Iterator[Mapping[str, Tensor]]:
    """Yield the sites of the draws with these numbers, or of any draws, some at a time."""
    if numbers is None:
        yield from numbered.joint.program.draws(num_samples, DRAWS_AT_ONCE)
        return
    most = min(DRAWS_AT_ONCE, numbered.joint.program.bank.draws_at_once)
    for start in range(0, num_samples, most):
        yield numbered.sites(numbers[start : start + most])


def _again(
    numbered: NumberedDraws, numbers: Sequence[int] | None, num_samples: int, state: Tensor
) -> AnyFactors:
    """Return the factors of the draws of `_pieces`, which began at this state of the generator."""
    if numbers is not None:
        return numbered.factors(numbers)
    torch.set_rng_state(state)
    return numbered.joint.program.drawn(num_samples, DRAWS_AT_ONCE)


def _variables(
    program: Program, sites: Mapping[str, Tensor], drawn: FlatFactors, factors: bool
) -> Variables:
    """Return the variables of the group ``posterior`` for some draws."""
    bank = program.bank
    norms = bank.update_norms(drawn).expand(drawn.draws or 1, -1)
    variables: Variables = {"adapter_norm": (norms, ("layer",)), **program.quantities(sites)}
    if factors and drawn.head is not None:
        variables["head"] = (drawn.head, ("head_entry",))
    if factors:
        size = len(next(iter(sites.values())))
        for name, (A, B) in bank.matrices(drawn).items():
            A, B = (matrix.expand(size, *matrix.shape[-2:]) for matrix in (A, B))
            # Layers of other ranks cannot share the dimension.
            rank = "rank" if A.shape[-2] == bank.layouts["A"].rank else f"rank[{name}]"
            variables[f"A[{name}]"] = (A, (rank, f"in[{name}]"))
            variables[f"B[{name}]"] = (B, (f"out[{name}]", rank))
    return variables


def _data_groups(prediction: Prediction, shape: Callable[[Tensor], np.ndarray]) -> dict[str, Any]:
    """Return the groups of the draws' predictions and of the observed targets."""
    drawn = prediction.predictive_draws()
    groups: dict[str, Any] = {
        "posterior_predictive": {
            name: (shape(draws), dims) for name, (draws, dims) in drawn.items()
        }
    }
    if prediction.targets is not None:
        dims = (prediction.row, *prediction.target_dims)[: prediction.targets.dim()]
        groups["observed_data"] = {"y": (prediction.targets.numpy(), dims)}
    if places := prediction.places():
        groups["constant_data"] = {
            name: (numbers.numpy(), (prediction.row,)) for name, numbers in places.items()
        }
    return groups


def _scores(prediction: Prediction, shape: Callable[[Tensor], np.ndarray]) -> np.ndarray:
    """Return log p(y_i | draw s), (chain, draw, n)."""
    assert prediction.log_likelihood is not None
    return shape(prediction.log_likelihood)


def _by_chain(draws: Tensor, chains: int) -> np.ndarray:
    """Reshape (S, ...) to (chains, S / chains, ...)."""
    return draws.detach().cpu().unflatten(0, (chains, -1)).numpy()

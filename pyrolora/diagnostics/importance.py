"""k̂ of a fitted guide: its distance from the posterior, judged by importance weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyrolora import defaults
from pyrolora.adapters import AnyFactors, FlatFactors, LaterFactors
from pyrolora.checks import whole_number
from pyrolora.data import Prepared
from pyrolora.diagnostics.psis import PSIS, psis_khat, yardstick
from pyrolora.errors import ConfigError, DataError
from pyrolora.guides import Guide, Program, full_name
from pyrolora.model import JointModel, evaluating
from pyrolora.predictive import predict
from pyrolora.seeding import DRAWING, seeded

FEWEST_DRAWS = 25
"""The tail is a fifth of the draws, and its fit needs five."""
DRAWS_AT_ONCE = 50

Values = Mapping[str, Tensor]
"""Site -> (S, ...), shaped as inside a plate of S draws at dimension -2."""


@torch.no_grad()
def khat(
    joint: JointModel,
    options: Guide,
    data: Prepared,
    num_samples: int = defaults.KHAT_DRAWS,
    *,
    seed: int | None = None,
    per_layer: bool = False,
) -> PSIS | dict[str, PSIS]:
    """Return the PSIS of the whole pair, or of each layer; see `Posterior.khat`."""
    whole_number("num_samples", num_samples, at_least=FEWEST_DRAWS)
    if len(data) != joint.num_examples:
        raise DataError(
            f"khat needs the training data, {joint.num_examples} examples, got {len(data)}; "
            "pass the data that the posterior was fitted on"
        )
    _check_drawn(joint.program, options)
    if not joint.program.supports.distinct_prior:
        raise ConfigError(
            f"khat judges a guide by the model's prior, and {full_name(options)!r} has none: its "
            "draws have the same distribution in model and guide; SWAG has one with prior_scale="
        )
    if per_layer and not joint.program.supports.independent_layers:
        raise ConfigError(
            f"per_layer judges a layer by the guide's distribution given the others, and layers of "
            f"{full_name(options)!r} are not independent; leave per_layer out"
        )
    beta = options.beta(joint.num_examples)
    with DRAWING, evaluating(joint):
        joint.align()
        program = joint.program
        with seeded(seed):
            draws = _draws(program, num_samples)
        sites = draws(0, 2)
        _check_width(sites, options)
        free = {name: _free_entries(site) // 2 for name, site in sites.items()}
        used = _in_use(program, sites)
        if not per_layer:
            size = sum(round(free[n] * float(used[n].float().mean())) for n in sites)
            return _psis(joint, data, lambda *run: _values(draws(*run)), num_samples, beta, size)
        centre = {name: _centre(site) for name, site in sites.items()}
        results = {}
        for layer, mask in _masks(program, sites).items():

            def moved(start: int, stop: int, mask: Mapping[str, Tensor] = mask) -> Values:
                drawn = _values(draws(start, stop))
                return {n: torch.where(mask[n], drawn[n], centre[n]) for n in drawn}

            size = sum(round(free[n] * float((mask[n] & used[n]).float().mean())) for n in sites)
            results[layer] = _psis(joint, data, moved, num_samples, beta, size)
        return results


def _draws(program: Program, num_samples: int) -> Callable[[int, int], dict[str, Any]]:
    """Sample the guide; return a function from a run of the draws to its latent sites."""
    replay = program.replay(num_samples) if num_samples > program.bank.draws_at_once else None
    if replay is not None:
        return lambda start, stop: _latent(replay.trace(start, stop))
    sites = _latent(program.traced(num_samples))

    def run(start: int, stop: int) -> dict[str, Any]:
        return {n: {**site, "value": site["value"][start:stop]} for n, site in sites.items()}

    return run


def _values(sites: Mapping[str, Any]) -> Values:
    return {name: site["value"] for name, site in sites.items()}


def _psis(
    joint: JointModel,
    data: Prepared,
    values: Callable[[int, int], Values],
    count: int,
    beta: float,
    size: int,
) -> PSIS:
    """Return the PSIS of log w = log p(θ) + (1/β) Σ_i log p(y_i|θ) − log q(θ)."""
    program, most = joint.program, joint.program.bank.draws_at_once
    step = min(DRAWS_AT_ONCE, most)
    ratios, kept = [], []
    for start in range(0, count, step):
        ratio, drawn = _prior_over_guide(program, values(start, min(start + step, count)))
        ratios.append(ratio)
        if count <= most:
            kept.append(drawn)
    factors: AnyFactors = (
        FlatFactors.cat(kept)
        if kept
        else LaterFactors(
            count, most, lambda start, stop: _prior_over_guide(program, values(start, stop))[1]
        )
    )
    scores = predict(joint, data, factors).log_likelihood
    assert scores is not None
    weights = torch.cat(ratios).cpu() + scores.double().sum(-1) / beta
    return PSIS(psis_khat(weights.numpy()), count, size, yardstick(size, count))


def _prior_over_guide(program: Program, values: Values) -> tuple[Tensor, FlatFactors]:
    """Return log p(θ) − log q(θ), (S,), and the factors of θ."""
    count = len(next(iter(values.values())))
    guide = _given(program, program.guide, values, count)
    model = _given(program, program.model, values, count)
    return _log_density(model) - _log_density(guide), model.nodes["_RETURN"]["value"]


def _given(program: Program, part: Any, values: Values, count: int) -> Trace:
    """Trace ``program.model`` or ``program.guide`` with these values of ``count`` draws."""
    return program.traced(count, poutine.condition(part, data=dict(values)))


def _log_density(trace: Trace) -> Tensor:
    """Return the sum of log p over sites and blocks, (S,), in double precision."""
    trace.compute_log_prob()
    terms = [
        site["log_prob"].double().flatten(1).sum(-1)
        for site in trace.nodes.values()
        if site["type"] == "sample" and not site_is_subsample(site)
    ]
    return torch.stack(terms).sum(0)


def _latent(trace: Trace) -> dict[str, Any]:
    """Return the sites of a trace that are sampled, by name."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not site["is_observed"]
    }


def _free_entries(site: Mapping[str, Any]) -> int:
    """Return how many unconstrained numbers the draws of the site are."""
    return biject_to(site["fn"].support).inverse_shape(site["value"].shape).numel()


def _centre(site: Mapping[str, Any]) -> Tensor:
    """Return the mean of a site under the guide.

    For scales any value will do, here the first draw's, since the mean of the factors does not
    depend on it.
    """
    if _is_blocked(site):
        return site["value"][:1]
    return site["fn"].mean[:1] if site["fn"].event_dim else site["value"]


def _is_blocked(site: Mapping[str, Any]) -> bool:
    """Return whether the site has one element per block, in a plate inside that of the draws."""
    return len(site["cond_indep_stack"]) > 1


def _masks(program: Program, sites: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Return by layer and site booleans that mark the elements of the layer.

    A site without factors or blocks, such as the seed of noise on the weights, belongs to every
    layer.
    """
    bank = program.bank
    size = {b.name: b.rank * b.columns for f in bank.layouts.values() for b in f.blocks}
    names = program.block_names()
    layers = list(bank.specs)
    device = next(iter(sites.values()))["value"].device
    block = torch.tensor([layers.index(n.rpartition(".")[0]) for n in names], device=device)
    # The sites of entries hold the blocks in their order, one site after the other.
    entry = block.repeat_interleave(torch.tensor([size[n] for n in names], device=device))
    owner: dict[str, Tensor] = {}
    for name, site in sites.items():
        if _is_blocked(site):
            owner[name] = block.view(-1, *[1] * site["fn"].event_dim)
        elif site["fn"].event_dim:
            length = site["value"].shape[-1]
            owner[name], entry = entry[:length], entry[length:]
    everywhere = torch.ones((), dtype=torch.bool, device=device)
    return {
        layer: {n: owner[n] == i if n in owner else everywhere for n in sites}
        for i, layer in enumerate(layers)
    }


def _in_use(program: Program, sites: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return by site booleans that mark the entries of active ranks.

    The guide's distribution of the others is their prior, or has no bearing on the factors.
    """
    used = {n: torch.ones((), dtype=torch.bool, device=s["value"].device) for n, s in sites.items()}
    latent = "".join(dict.fromkeys(name.rpartition(".")[2] for name in program.block_names()))
    active = program.bank.entries(latent) if latent else None
    if active is not None:
        for name, site in sites.items():
            if not _is_blocked(site) and site["fn"].event_dim:
                length = site["value"].shape[-1]
                used[name], active = active[:length], active[length:]
    return used


def _check_drawn(program: Program, options: Guide) -> None:
    """Raise `ConfigError` for a guide without a density: members, or stored draws."""
    name = full_name(options)
    if program.members > 1:
        raise ConfigError(
            f"khat weighs draws by the guide's density, and the members of {name!r} are point "
            "masses; compare them with another guide by evaluate(...)"
        )
    if program.stored() is not None:
        raise ConfigError(
            f"khat judges a guide by its density, and {name!r} keeps draws, which have none; for "
            "Markov chains look at R-hat and effective sample sizes, in posterior.summary() and "
            "posterior.history"
        )


def _check_width(sites: Mapping[str, Any], options: Guide) -> None:
    """Raise `ConfigError` for a guide that is a point mass."""
    if any(isinstance(site["fn"], pyro.distributions.Delta) for site in sites.values()):
        raise ConfigError(
            f"khat needs a guide with width, and {full_name(options)!r} is a point; fit with "
            "'montec', 'meanfield', 'lowrank' or 'laplace'"
        )

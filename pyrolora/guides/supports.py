"""Capabilities that a guide states, and the methods that each of them needs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

PostHoc = Literal["trained", "computed"]
Capability = Literal[
    "rank_allocation",
    "prior",
    "post_hoc",
    "closed_scales",
    "stored_draws",
    "linearised",
    "independent_layers",
    "distinct_prior",
    "all_examples",
    "gaussian_head",
]

METHODS: dict[Capability, tuple[str, ...]] = {
    "rank_allocation": ("rank_entries",),
    "prior": ("succeed",),
    "closed_scales": ("settle",),
    "stored_draws": ("stored", "pick"),
}
"""Capability -> the methods of `Program` that it asks for; the other capabilities need none."""


@dataclass(frozen=True, kw_only=True)
class Supports:
    """Capabilities of a guide and its program; to ask for another one raises `ConfigError`.

    Parameters
    ----------
    rank_allocation
        Ranks can move between layers in training; `Program.rank_entries` says which entries of the
        parameters move with them.
    prior
        The posterior of an earlier fit can be the prior, ``fit(..., prior=)``; `Program.succeed`.
    post_hoc
        How a posterior is inferred around means that stay as they are: ``"trained"`` (SVI of the
        scales), ``"computed"`` (without SVI), or None, not at all.
    closed_scales
        Given the curvature, the optimal scales are a closed form; `Program.settle`.
    stored_draws
        The draws are a finite list; `Program.stored` and `Program.pick`.
    linearised
        Predictions are linear in the draws, around the mean adapter.
    independent_layers
        Under the guide the draws of different layers are independent.
    distinct_prior
        The latent sites have another law in the model than in the guide.
    all_examples
        Inference sums over all examples at once, so that a part of them, as of a stream, does not
        do.
    gaussian_head
        The last layer of the task head can have a Gaussian law, drawn beside each draw of the
        adapters: ``head="gaussian"``.
    """

    rank_allocation: bool = False
    prior: bool = False
    post_hoc: PostHoc | None = None
    closed_scales: bool = False
    stored_draws: bool = False
    linearised: bool = False
    independent_layers: bool = False
    distinct_prior: bool = False
    all_examples: bool = False
    gaussian_head: bool = False


assert {field.name for field in fields(Supports)} == {*get_args(Capability)}

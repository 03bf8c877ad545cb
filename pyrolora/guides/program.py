"""The latent part of a Pyro model/guide pair."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pyrolora import defaults
from pyrolora.adapters import AdapterBank, FlatFactors
from pyrolora.errors import ConfigError
from pyrolora.guides.engines import Curvature
from pyrolora.guides.options import Guide, Variational
from pyrolora.guides.plates import spread, without_plate
from pyrolora.parameters import ParamModule
from pyrolora.seeding import DRAWING

Sites = Mapping[str, Tensor]
"""Site name -> value, or -> draws with one leading dimension."""

Quantities = Mapping[str, tuple[Tensor, tuple[str, ...]]]
"""Name -> (S, ...) and the names of the dimensions after the first."""


class Program(ParamModule, ABC):
    """The latent part of a Pyro model/guide pair: the sites of the adapters and their parameters.

    ``model`` and ``guide`` run once a call of the joint model, before the network, whatever the
    number of layers. Inside an outer plate at dimension -2 they give draws: all values get one
    leading dimension S, and so do the factors.

    Parameters
    ----------
    bank
        The adapter means, shared by model and guide.
    options
        The guide's.

    Attributes
    ----------
    progress
        0..1: how far the training is; 1 outside of it.
    draws_per_batch
        Into how many groups with a draw of their own a training batch falls, at most.
    members
        How many copies of the task heads draws choose from.
    chains
        Of how many chains the stored draws are.
    linearised
        Whether predictions are linear in the draws, around the mean adapter.
    layers_independent
        Whether the guide's draws of one layer say nothing of another.
    has_prior
        Whether the model's law of the latent sites is another than the guide's.
    previous
        The program of an earlier posterior, whose guide is the prior here; None: the options' own.
    """

    supports: ClassVar[Mapping[str, constraints.Constraint]] = {}
    """Site -> what its values can be, where that is not every number."""

    options: Any
    previous: Any
    prior_loc: Tensor | None
    row_sizes: Tensor | None
    progress: float = 1.0
    draws_per_batch: int = 1
    members: int = 1
    chains: int = 1
    linearised: bool = False
    layers_independent: bool = True
    has_prior: bool = True

    def __init__(self, bank: AdapterBank, options: Guide) -> None:
        super().__init__()
        self.bank = bank
        self.options = options
        self.register_module("previous", None)
        self.register_buffer("prior_loc", None)
        self.register_buffer("row_sizes", None)
        if isinstance(options, Variational):
            self.draws_per_batch = options.draws_per_batch

    def keep_start(self, latent: str, prior_mean: str) -> None:
        """Keep the means of the latent factors as they are for those of the prior; where the bank
        has an origin, that is the one."""
        kept = prior_mean == "start" and self.bank.origin is None
        A, B = (self.bank.get_parameter(f"{factor}_loc").detach() for factor in "AB")
        means = FlatFactors(A, B)
        value = self.bank.latent_part(latent, means).clone() if kept else None
        self.register_buffer("prior_loc", value)

    def sizes(self) -> Tensor | None:
        """(L, r): the root mean square of each row of the latent means, where scales are multiples
        of it; after an earlier posterior that of its means."""
        if getattr(self.options, "units", None) != "row":
            return None
        if self.row_sizes is not None:
            return self.row_sizes
        means = self.bank.latent_part(self.options.latent, self.bank.means())
        return self.bank.layout(self.options.latent).row_sizes(means)

    def centre(self, site: str) -> Tensor | None:
        """The prior's mean of the factors of a site, flat; None: zero."""
        if self.bank.origin is not None:
            return self.bank.latent_part(site, self.bank.origin)
        if self.prior_loc is None or site == self.options.latent:
            return self.prior_loc
        first = self.bank.layouts["A"].total
        return self.prior_loc[:first] if site == "A" else self.prior_loc[first:]

    @torch.no_grad()
    def recentre(self) -> None:
        """Have the prior, where it is around the start, around the means as they are: given ones
        came."""
        if self.prior_loc is not None:
            means = self.bank.latent_part(self.options.latent, self.bank.means())
            self.prior_loc.copy_(means.detach())

    @abstractmethod
    def model(self, kl_weight: float = 1.0) -> FlatFactors:
        """Sample the prior and return the factors."""

    @abstractmethod
    def guide(self, kl_weight: float = 1.0) -> None:
        """Sample the variational posterior: the same sites in the same order."""

    @abstractmethod
    def factors(self, sites: Sites) -> FlatFactors:
        """The factors that the values of the sites determine."""

    @abstractmethod
    def quantities(self, sites: Sites) -> Quantities:
        """Low-dimensional functions of draws that are worth looking at."""

    def mean(self) -> FlatFactors:
        """The mean adapter."""
        return self.bank.means()

    def block_names(self) -> list[str]:
        """Labels of the dimension ``block`` in `quantities`, if it is used."""
        return []

    def scale_parameters(self) -> list[str]:
        """Names of the parameters that are scales of the posterior, not means."""
        return [name for name, _ in self.named_parameters(recurse=False)]

    @property
    def settles(self) -> bool:
        """Whether `settle` finds the scales; an earlier posterior has no such options."""
        return self.previous is None and self.options.settles

    def hold_scales(self) -> None:
        """Make constants of the scales that `settle` finds: the optimiser leaves them alone."""
        if self.settles:
            for name in self.scale_parameters():
                self.get_parameter(name).requires_grad_(False)

    def settle(self, curvature: Curvature, beta: float) -> None:
        """Put the scales of the guide where the objective has its optimum, given the means."""
        raise NotImplementedError(f"{type(self).__name__} has no closed optimum")

    def groups(self, batch_size: int) -> int:
        """Into how many equal groups, each with a draw of its own, a training batch falls."""
        most = min(self.draws_per_batch, batch_size) if self.training else 1
        return next(count for count in range(most, 0, -1) if batch_size % count == 0)

    def side_by_side(self) -> int:
        """How many members are trained on the same batch."""
        return 1

    def of_ranks(self, rows: Tensor) -> dict[str, Tensor]:
        """Own parameter -> booleans that broadcast to it: its entries that belong to the ranks of
        ``rows``, (L, r_max)."""
        return {}

    @torch.no_grad()
    def renew(self, rows: Tensor) -> dict[str, Tensor]:
        """Have what belongs to the ranks of ``rows``, (L, r_max), as it is at a start: others came
        in their place.

        Returns
        -------
        dict
            Own parameter -> booleans of its shape: the entries that are new.
        """
        fresh, found = self.options.build(self.bank), {}
        for name, entries in self.of_ranks(rows.to(self.bank.mask().device)).items():
            parameter, start = self.get_parameter(name), fresh.get_parameter(name)
            found[name] = entries.expand_as(parameter)
            parameter.copy_(torch.where(entries, start.to(parameter), parameter))
        if self.prior_loc is not None:
            latent = self.options.latent
            means = self.bank.latent_part(latent, self.bank.means())
            new = self.bank.spread(latent, rows.to(means.device))
            self.prior_loc.copy_(torch.where(new, means, self.prior_loc))
        return found

    @torch.no_grad()
    def succeed(self, previous: Any) -> None:
        """Take the guide of ``previous``, a program of the same kind, for the prior, and start from
        it: what it had as its means and scales. What has no prior, a factor that is not latent,
        becomes a constant."""
        for name, parameter in previous.named_parameters(recurse=False):
            self.get_parameter(name).copy_(parameter)
        for factor in "AB":
            latent = factor in self.options.latent
            self.bank.get_parameter(f"{factor}_loc").requires_grad_(latent)
        for name in self.scale_parameters():
            self.get_parameter(name).requires_grad_(True)
        self.previous = copy.deepcopy(previous).requires_grad_(False)
        self.previous.previous = None
        sizes = previous.sizes()
        for program in (self, self.previous):  # whose own means may have moved from there
            program.register_buffer("row_sizes", None if sizes is None else sizes.detach().clone())

    def await_prior(self, options: Guide) -> None:
        """`succeed` a program of these options whose tensors are yet to be loaded."""
        bank = AdapterBank(list(self.bank.specs.values()), self.bank.config)
        self.succeed(options.build(bank))

    def after_step(self, step: int, steps: int) -> None:
        """Called after each of the ``steps`` steps of the optimiser, counted from 1."""

    def usual_draws(self, otherwise: int = defaults.NUM_SAMPLES) -> int:
        """How many draws are taken unless it is told: of an ensemble, every member once."""
        return self.members if self.members > 1 else otherwise

    def stored(self) -> int | None:
        """How many draws there are, where they are a list; None where they are drawn anew."""
        return None

    def pick(self, index: Tensor) -> dict[str, Tensor]:
        """Site -> the stored draws of these numbers; of programs whose draws are `stored`."""
        raise NotImplementedError(f"{type(self).__name__} draws anew")

    def sample_stored(self, guide: str) -> None:
        """Sample one of the stored draws, whose number is the auxiliary site ``draw``; ``guide`` is
        whose program this is."""
        stored = self.stored()
        assert stored is not None
        device = self.bank.get_parameter("A_loc").device
        law = dist.Categorical(torch.ones(stored, device=device))
        number = pyro.sample("draw", law, infer={"is_auxiliary": True})
        if number.dim():
            raise ConfigError(
                f"the stored draws of {guide!r} come one at a time, not in a plate; use "
                "posterior.sample(n), or Predictive(..., parallel=False)"
            )
        for name, value in self.pick(number).items():
            pyro.sample(name, dist.Delta(value, event_dim=value.dim()))

    def statistics(self, index: Tensor) -> dict[str, Tensor]:
        """What the sampler says of the stored draws of these numbers, by ArviZ's names."""
        return {}

    def draw(self, num_samples: int) -> dict[str, Tensor]:
        """Site -> (num_samples, *event): independent draws from the guide, or stored ones, evenly
        spaced; each several times, one after the other, where there are fewer."""
        return next(self.draws(num_samples, num_samples))

    @torch.no_grad()
    def draws(self, num_samples: int, at_once: int) -> Iterator[dict[str, Tensor]]:
        """`draw` in pieces of at most ``at_once`` draws."""
        stored = self.stored()
        if stored is not None:
            yield from map(self.pick, spread(stored, num_samples).split(at_once))
            return
        for start in range(0, num_samples, at_once):
            yield self._sampled(min(at_once, num_samples - start))

    def _sampled(self, num_samples: int) -> dict[str, Tensor]:
        with (
            DRAWING,  # first: a plate is on the stack from its making on
            poutine.block(),
            poutine.trace() as trace,
            pyro.plate("draws", num_samples, dim=-2),
        ):
            self.guide()
        return {
            name: without_plate(site["value"], site["fn"].event_dim, len(site["cond_indep_stack"]))
            for name, site in trace.trace.nodes.items()
            if site["type"] == "sample" and not site_is_subsample(site)
        }

"""The latent part of a Pyro model/guide pair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, NoReturn

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pyrolora import defaults
from pyrolora.adapters import AdapterBank, AnyFactors, FlatFactors, LaterFactors
from pyrolora.errors import ConfigError
from pyrolora.guides.engines import Curvature
from pyrolora.guides.options import Guide
from pyrolora.guides.plates import spread, without_plate
from pyrolora.guides.replay import CannotReplayError, Replay
from pyrolora.guides.supports import METHODS, Capability, Supports
from pyrolora.parameters import ParamModule
from pyrolora.seeding import DRAWING

Sites = Mapping[str, Tensor]
"""Site name -> value, or -> draws with one leading dimension."""

SHARED_LAW = "shared_law"
"""Marks, in ``infer`` of a site, that the guide's law is the model's and has no parameters."""

Quantities = Mapping[str, tuple[Tensor, tuple[str, ...]]]
"""Name -> (S, ...) and the names of the dimensions after the first."""


class Program(ParamModule, ABC):
    """The latent part of a Pyro model/guide pair: the sites of the adapters and their parameters.

    ``model`` and ``guide`` run once per call of the joint model, before the network, whatever the
    number of layers. Inside an outer plate at dimension -2 they give draws: all values get one
    leading dimension S, and so do the factors.

    Which optional methods a program defines follows from the capabilities that its guide states
    (`Guide.supports`): a program that lacks one cannot be built, and the others raise.

    Parameters
    ----------
    bank
        The adapter means, shared by model and guide.
    options
        The guide's options.

    Attributes
    ----------
    progress
        How far the training is, from 0 to 1; 1 outside of it.
    draws_per_batch
        The most groups, each with its own draw, into which a training batch is split.
    members
        Number of copies of the task heads that draws choose from.
    chains
        Number of chains that the stored draws come from.
    previous
        The program of an earlier posterior, whose guide is the prior here; None: the prior is that
        of the options.

    Raises
    ------
    ConfigError
        When a method is missing that a stated capability needs.
    """

    site_supports: ClassVar[Mapping[str, constraints.Constraint]] = {}
    """Site -> its support, where that is not the real numbers."""

    options: Any
    previous: Any
    progress: float = 1.0
    draws_per_batch: int = 1
    members: int = 1
    chains: int = 1

    def __init__(self, bank: AdapterBank, options: Guide) -> None:
        super().__init__()
        self.bank = bank
        self.options = options
        self.register_module("previous", None)
        self.draws_per_batch = getattr(options, "draws_per_batch", 1)
        self._check_methods()

    def _check_methods(self) -> None:
        for capability, methods in METHODS.items():
            if not getattr(self.supports, capability):
                continue
            missing = [m for m in methods if getattr(type(self), m) is getattr(Program, m)]
            if missing:
                raise ConfigError(
                    f"guide {self.options.name!r} states that it supports {capability!r}, and its "
                    f"program {type(self).__name__} has no {' and no '.join(missing)}; define "
                    f"{', '.join(missing)}, or leave {capability} out of Supports(...)"
                )

    # What is inferred ---------------------------------------------------------------------------

    @abstractmethod
    def model(self, kl_weight: float = 1.0) -> FlatFactors:
        """Sample the prior and return the factors."""

    @abstractmethod
    def guide(self, kl_weight: float = 1.0) -> None:
        """Sample the variational posterior: the same sites in the same order."""

    @abstractmethod
    def factors(self, sites: Sites) -> FlatFactors:
        """Return the factors that the values of the sites determine."""

    @abstractmethod
    def quantities(self, sites: Sites) -> Quantities:
        """Return low-dimensional functions of draws that are worth looking at."""

    def mean(self) -> FlatFactors:
        """Return the mean adapter."""
        return self.bank.means()

    def variances(self) -> FlatFactors | None:
        """Return the variance of every entry of A and B; None where only draws tell it."""
        return None

    def block_names(self) -> list[str]:
        """Return the labels of the dimension ``block`` in `quantities`, if it is used."""
        return []

    # Capabilities -------------------------------------------------------------------------------

    @property
    def supports(self) -> Supports:
        """The capabilities that the guide states."""
        supports: Supports = self.options.supports
        return supports

    def _refuse(self, capability: Capability) -> NoReturn:
        raise ConfigError(
            f"guide {self.options.name!r} does not support {capability!r}; choose a guide whose "
            f"Supports(...) states {capability}"
        )

    # Scales -------------------------------------------------------------------------------------

    def scale_parameters(self) -> list[str]:
        """Return the names of the parameters that are scales of the posterior, not means."""
        return [name for name, _ in self.named_parameters(recurse=False)]

    @property
    def settles(self) -> bool:
        """Whether `settle` sets the scales; around an earlier posterior they are trained."""
        return self.previous is None and self.options.settles

    @property
    def settles_at_first(self) -> bool:
        """Whether `settle` sets the scales before some steps of the training, which train them."""
        return self.previous is None and self.options.settles_at_first

    def hold_scales(self) -> None:
        """Make constants of the scales that `settle` sets: the optimiser leaves them alone."""
        if self.settles:
            for name in self.scale_parameters():
                self.get_parameter(name).requires_grad_(False)

    def settle(self, curvature: Curvature, beta: float) -> None:
        """Set the scales of the guide to the optimum of the objective, given the means."""
        self._refuse("closed_scales")

    # Training -----------------------------------------------------------------------------------

    def groups(self, batch_size: int) -> int:
        """Return the number of equal groups, each with its own draw, in a training batch."""
        most = min(self.draws_per_batch, batch_size) if self.training else 1
        return next(count for count in range(most, 0, -1) if batch_size % count == 0)

    @property
    def several_heads(self) -> bool:
        """Whether draws have task heads of their own."""
        return self.members > 1

    def side_by_side(self) -> int:
        """Return the number of members that are trained on the same batch."""
        return 1

    def after_step(self, step: int, steps: int) -> None:
        """React to a step of the optimiser, the ``step``-th of ``steps``, counted from 1."""

    # Ranks that move ----------------------------------------------------------------------------

    def rank_entries(self, rows: Tensor) -> dict[str, Tensor]:
        """Return which entries of the parameters belong to the ranks in ``rows``.

        Parameters
        ----------
        rows
            (L, r_max) booleans, layers in the order of the bank.

        Returns
        -------
        dict
            Parameter name -> booleans that broadcast to it; parameters that belong to no rank are
            left out.
        """
        self._refuse("rank_allocation")

    @torch.no_grad()
    def renew(self, rows: Tensor) -> dict[str, Tensor]:
        """Reset the parameters of the ranks in ``rows``, (L, r_max); new ranks took these slots.

        Returns
        -------
        dict
            Parameter name -> booleans of its shape: the entries that were reset.
        """
        fresh, renewed = self.options.build(self.bank), {}
        for name, entries in self.rank_entries(rows.to(self.bank.mask().device)).items():
            parameter, start = self.get_parameter(name), fresh.get_parameter(name)
            renewed[name] = entries.expand_as(parameter)
            parameter.copy_(torch.where(entries, start.to(parameter), parameter))
        return renewed

    def reserve(self) -> None:
        """Make room for the tensors that are inferred after training, such as stored draws."""

    # Earlier fits -------------------------------------------------------------------------------

    def adopt(self, other: Program) -> None:
        """Take the means of ``other``."""
        self.bank.load_state_dict(other.bank.state_dict())

    def recentre(self) -> None:
        """Move a prior around the start of the means to the means as they are now."""

    def succeed(self, previous: Program | Guide) -> None:
        """Take the guide of ``previous`` for the prior, and start from its means and scales.

        Parameters
        ----------
        previous
            A program of the same guide; or its options alone, when its tensors are loaded later.
        """
        self._refuse("prior")

    # Draws --------------------------------------------------------------------------------------

    def stored(self) -> int | None:
        """Return the number of stored draws; None where draws are made anew."""
        return None

    def pick(self, index: Tensor) -> dict[str, Tensor]:
        """Return site -> the stored draws with the numbers in ``index``."""
        self._refuse("stored_draws")

    def statistics(self, index: Tensor) -> dict[str, Tensor]:
        """Return the sampler's statistics of the stored draws in ``index``, by ArviZ's names."""
        return {}

    def sample_stored(self) -> None:
        """Sample one of the stored draws, whose number is the auxiliary site ``draw``."""
        stored = self.stored()
        assert stored is not None
        device = self.bank.get_parameter("A_loc").device
        law = dist.Categorical(torch.ones(stored, device=device))
        number = pyro.sample("draw", law, infer={"is_auxiliary": True})
        if number.dim():
            raise ConfigError(
                f"the stored draws of {self.options.name!r} come one at a time, not in a plate; "
                "use posterior.sample(n), or Predictive(..., parallel=False)"
            )
        for name, value in self.pick(number).items():
            pyro.sample(name, dist.Delta(value, event_dim=value.dim()))

    def usual_draws(self, otherwise: int = defaults.NUM_SAMPLES) -> int:
        """Return the default number of draws: for an ensemble, every member once."""
        return self.members if self.members > 1 else otherwise

    @torch.no_grad()
    def draw(self, num_samples: int) -> dict[str, Tensor]:
        """Return site -> (num_samples, *event): draws from the guide.

        They are independent; or stored ones, evenly spaced, each repeated where there are fewer.
        """
        stored = self.stored()
        if stored is not None:
            return self.pick(spread(stored, num_samples))
        return site_values(self.traced(num_samples))

    @torch.no_grad()
    def draws(self, num_samples: int, at_once: int) -> Iterator[dict[str, Tensor]]:
        """Yield draws, at most ``at_once`` at a time, and at most `AdapterBank.draws_at_once`.

        The latter does not change them.
        """
        stored, most = self.stored(), self.bank.draws_at_once
        if stored is not None:
            pieces = spread(stored, num_samples).split(min(at_once, most))
            yield from map(self.pick, pieces)
            return
        for start in range(0, num_samples, at_once):
            count = min(at_once, num_samples - start)
            replay = self.replay(count) if count > most else None
            if replay is None:
                yield site_values(self.traced(count))
                continue
            for first in range(0, count, most):
                yield site_values(replay.trace(first, min(first + most, count)))

    @torch.no_grad()
    def drawn(self, num_samples: int, at_once: int | None = None) -> AnyFactors:
        """Return the factors of the draws of `draw`, made later where they take much memory.

        With ``at_once`` they are those of `draws`. Members of an ensemble are there anyway.
        """
        most, stored = self.bank.draws_at_once, self.stored()
        if stored is not None and num_samples > most and self.members == 1:
            index = spread(stored, num_samples)
            return LaterFactors(
                num_samples, most, lambda start, stop: self.factors(self.pick(index[start:stop]))
            )
        before = torch.get_rng_state()
        later = self._later(num_samples, at_once or num_samples) if num_samples > most else None
        if later is not None:
            return later
        torch.set_rng_state(before)
        parts = self.draws(num_samples, at_once) if at_once else [self.draw(num_samples)]
        return FlatFactors.cat([*map(self.factors, parts)])

    def _later(self, num_samples: int, at_once: int) -> LaterFactors | None:
        """Return draws that are made later; None where they cannot be, or are one point."""
        most = self.bank.draws_at_once
        replays: list[Replay] = []
        for start in range(0, num_samples, at_once):
            replay = self.replay(min(at_once, num_samples - start))
            if replay is None:
                return None
            replays.append(replay)

        def make(start: int, stop: int) -> FlatFactors:
            parts = []
            for number, replay in enumerate(replays):
                first = max(start - number * at_once, 0)
                last = min(stop - number * at_once, replay.draws)
                if first < last:
                    parts.append(self.factors(site_values(replay.trace(first, last))))
            return FlatFactors.cat(parts) if len(parts) > 1 else parts[0]

        if len(make(0, 2).distinct()[1]) < 2:
            return None
        return LaterFactors(num_samples, most, make)

    def replay(self, num_samples: int, part: Callable[[], Any] | None = None) -> Replay | None:
        """Sample draws of which some can be made at a time; None where the guide's cannot.

        They are the guide's, or those of ``part``, such as `model`.
        """
        if num_samples < 2:
            return None
        try:
            return Replay(partial(self.traced, part=part), num_samples)
        except CannotReplayError:
            return None

    def traced(self, num_samples: int, part: Callable[[], Any] | None = None) -> Trace:
        """Trace the guide, or another part, on draws, in a plate at dimension -2."""
        with (
            torch.no_grad(),
            DRAWING,  # first: a plate joins Pyro's stack when it is made
            poutine.block(),
            pyro.plate("draws", num_samples, dim=-2),
        ):
            return poutine.trace(part or self.guide).get_trace()


def picked(stored: Tensor, index: Tensor) -> Tensor:
    """Return the stored draws with these numbers; zeros before there are any."""
    if len(stored):
        return stored[index]
    return stored.new_zeros(*index.shape, *stored.shape[1:])


def site_values(trace: Trace) -> dict[str, Tensor]:
    """Return site -> draws with one leading dimension, of a trace inside the plate of draws."""
    return {
        name: without_plate(site["value"], site["fn"].event_dim, len(site["cond_indep_stack"]))
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }

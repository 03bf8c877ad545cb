"""Draws of a posterior by their numbers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.adapters import AnyFactors, FlatFactors, LaterFactors
from pyrolora.checks import whole_number
from pyrolora.errors import ConfigError
from pyrolora.model import JointModel
from pyrolora.seeding import DRAWING, seed_of_draw, seeded


class NumberedDraws:
    """The draws 0, 1, 2, ... of a posterior, each the same function wherever its number stands.

    Draw k is the k-th stored draw of ``"ensemble"`` (with the member's task head) and ``"nuts"``
    (chain after chain); other guides sample it from a seed that is made of the fit's seed and k.
    It depends on nothing else: not on the other draws that are taken, on the caller's generators,
    on batches, or on the device, since it is sampled on the CPU. (The noise on weights of
    ``Flat(at_prediction=True)`` has the number's seed, too, but is made where the weights are.)
    Draws are sampled one by one, so that many cost more than as many of one seed.

    Parameters
    ----------
    joint
        The joint model.
    seed
        The seed of the fit.
    """

    def __init__(self, joint: JointModel, seed: int) -> None:
        whole_number("the posterior's settings['seed']", seed, at_least=0)
        self.joint = joint
        self.seed = seed

    def check(self, draws: Any, name: str = "draws") -> list[int]:
        """Validate a list of the numbers of draws.

        Raises
        ------
        ConfigError
            Unless they are whole numbers, at least one, of draws that exist, each once.
        """
        if isinstance(draws, Tensor | np.ndarray):
            draws = draws.tolist()
        if isinstance(draws, str | bytes | Mapping | Set) or not isinstance(draws, Iterable):
            raise ConfigError(
                f"{name} must be a list of the numbers of draws, such as [0, 1, 2], got {draws!r}"
            )
        numbers = list(draws)
        if not numbers:
            raise ConfigError(f"{name} names no draw; give at least one number, such as [0]")
        for place, number in enumerate(numbers):
            self.check_one(number, f"{name}[{place}]")
        repeated = [int(number) for number, times in Counter(numbers).items() if times > 1]
        if repeated:
            raise ConfigError(f"{name} has {repeated} more than once; name each draw once")
        return [int(number) for number in numbers]

    def check_one(self, number: Any, name: str = "draw") -> None:
        """Raise `ConfigError` unless ``number`` is that of a draw."""
        whole_number(name, number, at_least=0, at_most=defaults.MAX_SEED)
        stored = self.joint.program.stored()
        if stored is not None and number >= stored:
            raise ConfigError(
                f"there are {stored} draws, numbered from 0, got {name}={int(number)}"
            )

    @torch.no_grad()
    def sites(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Return site -> (len(numbers), ...), the values of these draws in this order."""
        program = self.joint.program
        stored = program.stored() is not None
        device = program.bank.get_parameter("A_loc").device
        with DRAWING:
            if not stored and device.type != "cpu":  # a GPU has another stream
                program = copy.deepcopy(program).cpu()
            drawn = []
            for number in numbers:
                with seeded(seed_of_draw(self.seed, number)):
                    one = torch.tensor([number])
                    drawn.append(program.pick(one) if stored else program.draw(1))
        return {name: torch.cat([draw[name] for draw in drawn]).to(device) for name in drawn[0]}

    @torch.no_grad()
    def factors(self, numbers: Sequence[int]) -> AnyFactors:
        """Return the factors of these draws, (S, total), with the member that each is of.

        They are made later where they take much memory.
        """
        most = self.joint.program.bank.draws_at_once
        if len(numbers) > most:
            return LaterFactors(
                len(numbers), most, lambda start, stop: self._made(numbers[start:stop])
            )
        return self._made(numbers)

    @torch.no_grad()
    def _made(self, numbers: Sequence[int]) -> FlatFactors:
        with DRAWING:
            self.joint.align()
            return self.joint.program.factors(self.sites(numbers))

    @torch.no_grad()
    def exportable(self, draw: str | int) -> FlatFactors:
        """Return the factors of the mean adapter, or of one draw, as an adapter can hold them.

        Raises
        ------
        ConfigError
            For what is neither ``"mean"`` nor the number of a draw, and for draws that predict
            otherwise than an adapter with their factors would.
        """
        program = self.joint.program
        if draw == "mean":
            return program.mean()
        if isinstance(draw, str):
            raise ConfigError(f"draw must be 'mean' or the number of a draw, got {draw!r}")
        self.check_one(draw)
        if self.joint.linearises:
            raise ConfigError(
                "the predictions of this posterior are linear in its draws, and the network with a "
                "draw in it gives others; use draw='mean', or fit with "
                "Laplace(curvature='kronecker', linearised=False)"
            )
        factors = program.factors(self.sites([draw]))[0]
        if factors.seeds is not None:
            raise ConfigError(
                "a draw of Flat(at_prediction=True) has noise on the weights, which no adapter "
                "holds; use draw='mean', or at_prediction=False"
            )
        return factors


def alone(**beside: Any) -> None:
    """Raise `ConfigError` for an option ``beside`` ``draws`` that has a value."""
    others = [f"{name}={value!r}" for name, value in beside.items() if value is not None]
    if others:
        raise ConfigError(
            f"draws= names the draws, and {' and '.join(others)} would take others; pass one of "
            "them"
        )

"""Draws made some at a time are those that are made at once, and so are the numbers after them."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from memory import LiveBytes
from torch import Tensor

from pyrolora import AdapterConfig, defaults, guides
from pyrolora.adapters import AdapterBank, LaterFactors, LayerSpec
from pyrolora.guides import Dropout, Flat, Guide, Laplace, LowRank, MeanField, MonteCLoRA
from pyrolora.guides.program import Program, site_values
from pyrolora.guides.replay import CannotReplayError, Replay

OPTIONS: dict[str, Guide] = {
    **{name: guides.as_guide(name) for name in guides.available() if name != "full"},
    "montec as in the paper": MonteCLoRA.paper(),
    "montec, hierarchical": MonteCLoRA(component_prior="hierarchical", covariance="full"),
    "mean field on both": MeanField(latent="AB"),
    "low rank on both": LowRank(latent="AB"),
    "laplace on B": Laplace(latent="B"),
    "dropped ranks": Dropout(unit="rank"),
    "flat at prediction": Flat(inner=MeanField(latent="AB"), at_prediction=True),
}
# Odd sizes: no draw begins or ends where torch's blocks of 16 normal numbers do.
ODD = [LayerSpec("a", 7, 9, 3, 1.0), LayerSpec("b", 11, 5, 3, 2.0), LayerSpec("c", 7, 9, 2, 1.0)]


def program_of(options: Guide, specs: list[LayerSpec] = ODD) -> Program:
    torch.manual_seed(0)
    program = options.build(AdapterBank(specs, AdapterConfig(r=3)))
    program.reserve()
    program.bank.get_parameter("B_loc").data.normal_()
    return program


def bytes_of(program: Program) -> int:
    """The bytes of one draw."""
    return sum(parameter.nbytes for parameter in program.bank.parameters())


def close(found: Tensor, expected: Tensor) -> None:
    """The same numbers, up to the rounding of products, which take rows together."""
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in OPTIONS if n not in ("ensemble", "nuts")])
@pytest.mark.parametrize("count", [2, 5])
def test_runs_of_draws_are_those_of_all_draws_at_once(name: str, count: int) -> None:
    program = program_of(OPTIONS[name])
    torch.manual_seed(1)
    whole, after = program.draw(count), torch.get_rng_state()
    torch.manual_seed(1)
    replay = Replay(program.traced, count)
    assert torch.equal(torch.get_rng_state(), after)
    for start, stop in [(0, count), (1, count), (0, 1), (count - 1, count), (0, count - 1)]:
        for site, values in site_values(replay.trace(start, stop)).items():
            close(values, whole[site][start:stop])
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("name", OPTIONS)
def test_factors_that_are_made_later_are_those_of_all_draws(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of(OPTIONS[name])
    torch.manual_seed(1)
    whole, after = program.drawn(5), torch.get_rng_state()
    monkeypatch.setattr(defaults, "DRAWN_BYTES", 1)
    torch.manual_seed(1)
    later = program.drawn(5)
    torch.manual_seed(2)
    assert later.draws == whole.draws
    for number in range(5):
        for factor in ("A", "B"):
            close(getattr(later[number], factor), getattr(whole[number], factor))
    point = name in ("map", "ensemble", "flat")
    assert isinstance(later, LaterFactors) is not point
    torch.manual_seed(1)
    program.drawn(5)
    assert torch.equal(torch.get_rng_state(), after)


def test_draws_in_blocks_stay_those_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(MeanField(latent="AB"))
    torch.manual_seed(1)
    blocks = [program.draw(3), program.draw(3), program.draw(1)]
    whole = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    monkeypatch.setattr(defaults, "DRAWN_BYTES", 2 * bytes_of(program))
    torch.manual_seed(1)
    pieces = [*program.draws(7, 3)]
    assert [len(piece["A"]) for piece in pieces] == [2, 1, 2, 1, 1]
    for name, values in whole.items():
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), values)
    torch.manual_seed(1)
    later = program.drawn(6, 3)
    assert torch.equal(later[1:5].B, whole["B"][1:5])


def test_making_some_draws_takes_the_memory_of_some() -> None:
    program = program_of(MeanField(latent="AB"), [LayerSpec("a", 4096, 4096, 16, 1.0)])
    one = bytes_of(program)
    with LiveBytes() as live:
        replay = Replay(program.traced, 64)
    assert live.peak < 7 * one  # two draws three times, and what their law is made of
    with LiveBytes() as live:
        replay.trace(40, 42)
    assert live.peak < 7 * one
    with LiveBytes() as live:
        program.draw(64)
    assert live.peak > 64 * one


def test_guides_that_cannot_be_cut_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Chained(type(program_of(MeanField()))):  # type: ignore[misc]
        """A guide whose second site is a gamma with the first for its shape."""

        def guide(self, kl_weight: float = 1.0) -> None:
            rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
            pyro.sample("width", dist.Gamma(rate, 1.0))
            super().guide(kl_weight)

    program = program_of(MeanField())
    program.__class__ = Chained
    with pytest.raises(CannotReplayError):
        Replay(program.traced, 4)
    torch.manual_seed(1)
    whole = program.factors(program.draw(4))
    monkeypatch.setattr(defaults, "DRAWN_BYTES", 1)
    torch.manual_seed(1)
    assert torch.equal(program.drawn(4).A, whole.A)

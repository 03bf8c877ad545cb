"""Laplace with the full curvature, through `fit`; its mathematics is tested in the dual form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear import layer
from problems import bert_choice, llama, mlp, questions, texts, tokenizer
from torch import Tensor

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError, DataError
from pyrolora.guides import MAP, Flat, Laplace
from pyrolora.inference import dual
from pyrolora.posterior import Posterior


def data(n: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels that the inputs tell with some noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, (x[:, 0] + 0.7 * torch.randn(n, generator=generator) > 0).long()


def classifier(guide: Any, epochs: int = 60, adapter: Any = None, **options: Any) -> Posterior:
    return pyrolora.fit(
        mlp(outputs=2),
        data(),
        guide=guide,
        task="classification",
        adapter=AdapterConfig(r=2, **(adapter or {})),
        epochs=epochs,
        learning_rate=0.05,
        **options,
    )


def test_draws_of_a_fit_are_those_of_the_exact_posterior():
    """The draws for a linear layer with constant B, whose law of A is known."""
    problem = layer(MAP())
    posterior = problem.fit(Laplace(curvature="full", latent="A", prior_scale=0.6, num_draws=4000))
    exact = problem.posterior("A", problem.prior("A", 0.6))
    draws = posterior.sample(4000)["A"].double()
    sd = exact.covariance.diagonal().sqrt()
    assert ((draws.mean(0) - exact.mean).abs() <= 5 * sd / 4000**0.5).all()
    tolerance = 5 * (2 / 4000) ** 0.5 * sd[:, None] * sd[None, :]
    assert ((draws.T.cov() - exact.covariance).abs() <= tolerance).all()


def test_it_mends_the_overconfidence_of_lora():
    held_out = data(400, seed=1)
    plain = classifier("map")
    full = pyrolora.fit(plain, data(), guide=Laplace(curvature="full"))
    assert full.history[-1]["prior_precision"] > 0
    assert full.history[-1]["log_evidence"] < 0
    point, spread = (p.evaluate(held_out, seed=0)["nll"] for p in (plain, full))
    assert spread < point - 0.1


def test_the_prior_is_around_the_network_without_adapters():
    program = classifier(Laplace(curvature="full", num_draws=2), epochs=2).model.program
    bank = program.bank
    assert torch.equal(program.prior("A").mean, bank.get_parameter("A_loc"))
    assert not program.prior("B").mean.any()
    assert program.prior("B").variance == pytest.approx(1 / float(program.precision))
    alone = classifier(Laplace(curvature="full", num_draws=2, latent="A"), epochs=2).model.program
    assert not alone.prior("A").mean.any(), "with B a constant, A is what the function depends on"


def test_the_point_estimate_has_the_same_prior():
    """A narrow prior around A's means lets A move, and one around zero does not."""
    norms = {}
    for latent in ("AB", "A"):
        guide = Laplace(curvature="full", num_draws=2, latent=latent, prior_scale=0.01)
        norms[latent] = classifier(guide).bank.get_parameter("A_loc").detach().norm()
    assert norms["AB"] > 5 * norms["A"]


def test_around_flat_lora_and_where_ranks_move_it_serves_too():
    full = Laplace(curvature="full", num_draws=3)
    held_out = data(400, seed=1)
    flat = classifier(Flat(inner=full), epochs=20)
    assert flat.model.program.stored() == 3
    options = {"rank_allocation": "alora"}
    moved = classifier(full, epochs=20, adapter=options, eval_data=data(20, seed=9), batch_size=4)
    for posterior in (flat, moved):
        assert posterior.evaluate(held_out, seed=0)["nll"] < 0.6


def test_the_draws_are_a_list_and_the_same_seed_gives_them_again():
    first, again = (classifier(Laplace(curvature="full", num_draws=3), epochs=2) for _ in "12")
    draws = first.sample(6)["B"]
    assert first.model.program.stored() == 3
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(draws, again.sample(6)["B"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "dense"}, "curvature must be one of"),
        ({"num_draws": 5}, "num_draws is how many draws curvature='full' keeps"),
        ({"curvature": "full", "num_draws": 0}, "num_draws"),
        ({"curvature": "full", "linearised": False}, "mode of the linear model"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Laplace(**options)


def test_what_is_too_large_is_refused_before_any_step(steps, monkeypatch):
    monkeypatch.setattr(dual, "MOST_ROWS", 39)
    with pytest.raises(DataError, match="40 x 1 here, and at most 39"):
        classifier(Laplace(curvature="full"))
    with pytest.raises(ConfigError, match="'text-generation' has one for each token"):
        pyrolora.fit(llama(), texts(6), guide=Laplace(curvature="full"), tokenizer=tokenizer())
    monkeypatch.setattr(dual, "MOST_ROWS", 3 * 24 - 1)  # questions of two choices come first
    options: dict[str, Any] = {"guide": Laplace(curvature="full"), "tokenizer": tokenizer()}
    with pytest.raises(DataError, match="24 x 3 here, and at most 71"):
        pyrolora.fit(bert_choice(), questions(24), batch_size=4, **options)
    assert steps == []


def test_combinations_that_make_no_sense_are_refused():
    full = Laplace(curvature="full", num_draws=2)
    posterior = classifier(full, epochs=1)
    with pytest.raises(ConfigError, match="cannot be the prior of 'laplace'"):
        pyrolora.fit(posterior.base, data(), guide=full, prior=posterior)
    with pytest.raises(ConfigError, match="linear in its draws"):
        posterior.merge(draw=1)
    with pytest.raises(ConfigError, match="takes no noise on the weights"):
        classifier(Flat(inner=full, at_prediction=True))
    with pytest.raises(ConfigError, match="'snr' judges ranks by the width"):
        classifier(full, adapter={"rank_allocation": "snr"})

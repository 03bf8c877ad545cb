"""One posterior in several threads: each gets the draws of its seed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import bert, llama, reviews, tokenizer

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.guides import MonteCLoRA

GUIDE = MonteCLoRA(sample_scale=2.0, init_covariance=1.0)
OPTIONS = {"epochs": 1, "seed": 0, "adapter": AdapterConfig(r=2), "tokenizer": tokenizer()}
SEEDS = [0, 1] * 20


@pytest.fixture(scope="module")
def posterior():
    return pyrolora.fit(bert(initializer_range=0.3), reviews(8), GUIDE, **OPTIONS)


def draws(posterior, seed):
    return posterior.sample(4, seed=seed)["noise"]


def probabilities(posterior, seed):
    return posterior.predict(reviews(4), 3, seed=seed).draws


@pytest.mark.parametrize("use", [draws, probabilities])
def test_threads_get_the_draws_of_their_seeds(posterior, use):
    expected = [use(posterior, seed) for seed in (0, 1)]
    assert not torch.allclose(*expected)
    state = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: use(posterior, seed), SEEDS))
    assert torch.equal(torch.get_rng_state(), state)
    for seed, own in zip(SEEDS, found, strict=True):
        torch.testing.assert_close(own, expected[seed])


def test_threads_draw_without_seeds_beside_others_with_seeds(posterior):
    expected = draws(posterior, 0)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: draws(posterior, seed), [None, None, 0] * 200))
    assert all(torch.equal(own, expected) for own in found[2::3])
    assert not torch.equal(found[0], found[1])


def test_threads_write_what_their_seeds_write():
    posterior = pyrolora.fit(llama(initializer_range=0.4), reviews(8), GUIDE, **OPTIONS)

    def written(seed):
        found = posterior.generate(["the film"], 2, seed=seed, do_sample=True, max_new_tokens=5)
        return found.sequences.tolist()

    expected = [written(seed) for seed in (0, 1)]
    assert expected[0] != expected[1]
    seeds = [None, 0, None, 1] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(written, seeds))
    assert found[1::2] == [expected[seed] for seed in seeds[1::2]]

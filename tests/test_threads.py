"""Several threads: each gets the draws of its seed, and a fit beside them its own."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import bert, llama, reviews, tokenizer
from transformers import TrainerCallback

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.guides import MonteCLoRA
from pyrolora.seeding import DRAWING, Turns

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
    texts = reviews(8).remove_columns("label")
    posterior = pyrolora.fit(llama(initializer_range=0.4), texts, GUIDE, **OPTIONS)

    def written(seed):
        found = posterior.generate(["the film"], 2, seed=seed, do_sample=True, max_new_tokens=5)
        return found.sequences.tolist()

    expected = [written(seed) for seed in (0, 1)]
    assert expected[0] != expected[1]
    seeds = [None, 0, None, 1] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(written, seeds))
    assert found[1::2] == [expected[seed] for seed in seeds[1::2]]


def states(posterior):
    return posterior.model.own_state()


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(other[name], value), name


FIT = {**OPTIONS, "epochs": 3, "batch_size": 2}


def test_a_fit_beside_predictions_on_its_network_is_the_fit_alone_and_so_are_they(posterior):
    """Both on one network with dropout: its mode, Pyro's handlers and torch's generators are
    shared, and the training draws masks, noise and the order of the data."""

    def fitted(network):
        found = pyrolora.fit(network, reviews(24), GUIDE, **FIT)
        return states(found), found.history

    network = bert(initializer_range=0.3, hidden_dropout_prob=0.3)
    served = pyrolora.fit(network, reviews(8), GUIDE, **OPTIONS)
    alone, history = fitted(network)
    expected = [probabilities(served, seed) for seed in (0, 1)]
    seeds = [0, None, 1, None] * 13
    with ThreadPoolExecutor(4) as pool:
        fit = pool.submit(fitted, network)
        found = list(pool.map(lambda seed: probabilities(served, seed), seeds))
        beside, other = fit.result()
    assert_equal_states(alone, beside)
    assert [entry.get("elbo") for entry in other] == [entry.get("elbo") for entry in history]
    assert all(
        torch.equal(own, expected[seed])
        for seed, own in zip(seeds, found, strict=True)
        if seed is not None
    )
    assert not torch.equal(found[1], found[3])


def test_draws_without_a_seed_are_those_of_the_process_beside_a_fit(posterior):
    """The generators are the process's as they were before the fit, not those of the fit."""
    begun, drawn = threading.Event(), threading.Event()

    class Wait(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            begun.set()
            while not DRAWING.awaited() and not drawn.is_set():
                time.sleep(0.001)

    network = bert()
    torch.manual_seed(7)
    expected = draws(posterior, None)
    torch.manual_seed(7)
    with ThreadPoolExecutor(1) as pool:
        fit = pool.submit(pyrolora.fit, network, reviews(8), GUIDE, callbacks=Wait(), **FIT)
        begun.wait(60)
        found = draws(posterior, None)
        drawn.set()
        fit.result()
    assert torch.equal(found, expected)


def test_a_second_fit_waits_for_the_first():
    networks = [bert(), bert()]  # made here: what threads draw by torch itself, all of them feel

    def fitted(seed):
        return states(pyrolora.fit(networks[seed], reviews(8), GUIDE, **{**FIT, "seed": seed}))

    alone = [fitted(seed) for seed in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        beside = list(pool.map(fitted, (0, 1)))
    for one, other in zip(alone, beside, strict=True):
        assert_equal_states(one, other)


def test_loading_beside_a_fit_changes_no_number_of_it(tmp_path):
    network = bert(hidden_dropout_prob=0.3)
    pyrolora.fit(network, reviews(8), GUIDE, **OPTIONS).save(tmp_path)

    def fitted():
        return states(pyrolora.fit(network, reviews(24), GUIDE, **FIT))

    alone = fitted()
    with ThreadPoolExecutor(1) as pool:
        fit = pool.submit(fitted)
        while not fit.done():
            pyrolora.load(tmp_path, network).detach()
        assert_equal_states(alone, fit.result())


def test_threads_have_their_turns_in_the_order_in_which_they_asked():
    turns, order = Turns(), []

    def take(number, shared):
        with turns.shared() if shared else turns:
            order.append(number)

    threads = []
    with turns, turns, turns.shared():  # one thread may have it several times
        for number in range(6):
            threads.append(threading.Thread(target=take, args=(number, number % 2)))
            threads[-1].start()
            while len(turns._queue) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    assert order == [*range(6)]
    assert not turns.awaited()


def test_a_turn_is_shared_with_others_that_share_it_and_with_nobody_else():
    turns, inside = Turns(), threading.Barrier(3, timeout=10)
    had = threading.Event()

    def share():
        with turns.shared():
            inside.wait()  # passes when all three are here at once
            assert not had.is_set()

    def alone():
        with turns:
            had.set()

    sharers = [threading.Thread(target=share) for _ in range(2)]
    for thread in sharers:
        thread.start()
    with turns.shared():
        other = threading.Thread(target=alone)
        while turns._sharing.total() < 3:
            time.sleep(0.001)
        other.start()
        inside.wait()
        assert not had.wait(0.02)
    assert had.wait(10)
    for thread in (*sharers, other):
        thread.join(10)


def test_what_is_released_goes_to_those_who_wait_and_comes_back():
    turns, seen = Turns(), []

    def take():
        with turns:
            seen.append("other")

    with turns, turns:
        other = threading.Thread(target=take)
        other.start()
        while not turns.awaited():
            time.sleep(0.001)
        with turns.released():
            pass
        seen.append("mine")
        assert turns.mine()
    assert not turns.mine()
    other.join(10)
    assert seen == ["other", "mine"]


@pytest.mark.parametrize("times", [1, 2])
def test_an_interruption_while_it_is_released_leaves_it_free(times, monkeypatch):
    turns, interruptions = Turns(), [KeyboardInterrupt()] * times
    wait = turns._await

    def interrupted(free):
        if interruptions:
            raise interruptions.pop()
        wait(free)

    def run():
        with turns, turns:
            monkeypatch.setattr(turns, "_await", interrupted)
            with turns.released():
                pass

    with pytest.raises(KeyboardInterrupt):
        run()
    for _ in range(2):
        with turns:
            assert turns.mine()
        assert not turns.mine()

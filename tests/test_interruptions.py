"""An exception or Ctrl-C at any call leaves the network, and what is the caller's, as it was.

But for those that come while another one is cleaned up after. The lock of the generators is let go
wherever they come.
"""

from __future__ import annotations

import inspect
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from problems import bert, llama, reviews, texts, tokenizer
from surroundings import changed, fingerprint, surroundings

import pyrolora
from pyrolora import AdapterConfig, guides
from pyrolora.seeding import DRAWING, Turns

PACKAGE = os.path.dirname(pyrolora.__file__)
SHORT = {"chains": 1, "num_samples": 4, "warmup_steps": 2, "max_tree_depth": 2}
GUIDES: dict[str, Any] = {
    **{name: name for name in guides.available() if name not in ("flat", "nuts")},
    "nuts": guides.NUTS(**SHORT),
    "montec, trained": guides.MonteCLoRA(scale_updates="gradient"),
    "flat+montec": "flat+montec",
}
WORDS = tokenizer()


class Interruption(KeyboardInterrupt):
    """Ctrl-C, at a call that is chosen."""


class Fault(Exception):
    """An error that nobody expects, at a call that is chosen."""


def cleans(frame: Any) -> bool:
    """Whether a call is part of the end of a ``with`` block."""
    while frame is not None and frame.f_code.co_name != "__exit__":
        frame = frame.f_back
    return frame is not None


def stopped(work: Callable[[], Any], at: int, error: type[BaseException]) -> tuple[Any, int]:
    """Run ``work`` and raise ``error`` at this call of a function of the package; count calls."""
    calls = 0

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal calls
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        # Python swallows what is raised in a generator that it closes.
        if not code.co_flags & inspect.CO_GENERATOR and not cleans(frame):
            calls += 1
            if calls == at:
                sys.setprofile(None)
                raise error(f"in {frame.f_code.co_qualname}")

    sys.setprofile(count)
    try:
        return work(), calls
    finally:
        sys.setprofile(None)


def check(work: Callable[[], Any], network: Any, points: int) -> None:
    """Stop ``work`` at calls spread over it: it leaves no trace, and works as before after it."""
    expected = work()  # the first time takes more calls: a shared pass is checked
    _, calls = stopped(work, 0, Fault)
    places = sorted(random.Random(0).sample(range(1, int(0.95 * calls)), points))
    before, around = fingerprint(network), surroundings()
    for i, place in enumerate(places):
        error = (Interruption, Fault)[i % 2]
        try:
            stopped(work, place, error)
            words = "nothing"
        except (Interruption, Fault, pyrolora.PyroLoraError) as caught:
            words = str(caught)
        assert words != "nothing", f"call {place} of {calls} was swallowed"
        assert not changed(before, fingerprint(network)), words
        assert not changed(around, surroundings()), words
        assert not DRAWING.mine(), words
    again = work()
    assert expected.keys() == again.keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in again.items())


def fitted(network: Any, guide: Any) -> dict[str, torch.Tensor]:
    """The tensors of a posterior that is taken off its network again."""
    adapter = {} if guide == "full" else {"adapter": AdapterConfig(r=2)}
    posterior = pyrolora.fit(
        network,
        reviews(8),
        guide,
        eval_data=reviews(4),
        epochs=2,
        batch_size=4,
        seed=0,
        tokenizer=WORDS,
        **adapter,
    )
    posterior.detach()
    network.train()
    return posterior.model.own_state()


@pytest.mark.filterwarnings("ignore:the noise of 'tfb'")
@pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")
@pytest.mark.parametrize(
    ("guide", "points"),
    [
        ("montec", 3),
        ("laplace", 2),
        *(pytest.param(name, 30, marks=pytest.mark.slow) for name in GUIDES),
    ],
)
def test_a_fit_that_is_stopped_leaves_no_trace(guide: str, points: int) -> None:
    network = bert(hidden_dropout_prob=0.1, initializer_range=0.3)
    network.train()
    network.get_input_embeddings().requires_grad_(False)
    check(lambda: fitted(network, GUIDES[guide]), network, points)


@pytest.fixture(scope="module")
def classifier() -> pyrolora.Posterior:
    network = bert(initializer_range=0.3, hidden_dropout_prob=0.1)
    options = {"epochs": 1, "seed": 0, "adapter": AdapterConfig(r=2), "tokenizer": WORDS}
    return pyrolora.fit(network, reviews(8), "montec", **options)


@pytest.fixture(scope="module")
def writer() -> pyrolora.Posterior:
    options = {"epochs": 1, "seed": 0, "adapter": AdapterConfig(r=2), "tokenizer": WORDS}
    return pyrolora.fit(llama(initializer_range=0.3), texts(8), "montec", **options)


def predicted(posterior: Any) -> dict[str, torch.Tensor]:
    prediction = posterior.predict(reviews(4), 3, seed=0)
    return {"draws": prediction.draws, **posterior.sample(2, seed=0)}


def written(posterior: Any) -> dict[str, torch.Tensor]:
    options = {"do_sample": True, "max_new_tokens": 3}
    return {"ids": posterior.generate(["the film"], 2, seed=0, **options).sequences}


POINTS = [6, pytest.param(80, marks=pytest.mark.slow)]


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize(("use", "whose"), [(predicted, "classifier"), (written, "writer")])
def test_a_prediction_that_is_stopped_leaves_no_trace(use, whose, points, request) -> None:
    posterior = request.getfixturevalue(whose)
    posterior.base.train()
    check(lambda: use(posterior), posterior.base, points)


@pytest.mark.parametrize("points", POINTS)
def test_loading_that_is_stopped_leaves_no_trace(classifier, points, tmp_path) -> None:
    classifier.save(tmp_path)
    network = bert(initializer_range=0.3, hidden_dropout_prob=0.1)

    def loaded() -> dict[str, torch.Tensor]:
        posterior = pyrolora.load(tmp_path, network)
        posterior.detach()
        return posterior.model.own_state()

    check(loaded, network, points)


@pytest.fixture
def double() -> Iterator[None]:
    """Torch's default dtype is float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


LOCKED: dict[str, Callable[[Turns], Any]] = {
    "alone": lambda turns: turns,
    "shared": lambda turns: turns.shared(),
}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("way", LOCKED)
def test_ctrl_c_lets_the_lock_go(way: str) -> None:
    """It comes where a function begins and where one of C's ends.

    But for the beginning of `__exit__`, before which nothing can be done.
    """
    turns = Turns()
    codes = {f.__code__ for f in vars(Turns).values() if hasattr(f, "__code__")}
    codes |= {Turns.shared.__wrapped__.__code__, Turns.released.__wrapped__.__code__}  # type: ignore[attr-defined]

    def used() -> None:
        with LOCKED[way](turns):
            if way == "alone":
                with turns, turns.released():
                    pass

    def interrupted(at: int) -> bool:
        events = 0

        def profile(frame: Any, event: str, _: Any) -> None:
            nonlocal events
            begins = event == "call" and frame.f_code is not Turns.__exit__.__code__
            if (begins or event == "c_return") and frame.f_code in codes:
                events += 1
                if events == at:
                    sys.setprofile(None)
                    raise Interruption

        sys.setprofile(profile)
        try:
            used()
        except Interruption:
            return True
        finally:
            sys.setprofile(None)
        return False

    places = 0
    while interrupted(places + 1):
        places += 1
        assert (turns._owner, turns._depth, turns.awaited()) == (None, 0, False), places
        assert not turns._sharing, places
        assert torch.get_default_dtype() == torch.float64, places
        taken = threading.Thread(target=used)
        taken.start()
        taken.join(5)
        assert not taken.is_alive(), places
    assert places > 9

"""Posteriors in other processes: forked ones, also in the middle of a fit, and spawned ones."""

from __future__ import annotations

import multiprocessing
import pickle
import threading

import pytest
import torch
from problems import arguments, bert, reviews, tokenizer
from transformers import TrainerCallback

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.guides import MonteCLoRA
from pyrolora.seeding import DRAWING

GUIDE = MonteCLoRA(sample_scale=2.0, init_covariance=1.0)
OPTIONS = {"seed": 0, "adapter": AdapterConfig(r=2), "tokenizer": tokenizer()}
# Python warns of forks beside threads, which is what is tried here.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def posterior():
    return pyrolora.fit(bert(initializer_range=0.3), reviews(8), GUIDE, epochs=1, **OPTIONS)


def predicted(posterior):
    return posterior.predict(reviews(4), 3, seed=0).draws


def answer(posterior, pipe):
    torch.set_num_threads(1)
    free = not DRAWING.mine() and not DRAWING.awaited()
    pipe.send((predicted(posterior).numpy(), free, str(torch.get_default_dtype())))
    pipe.close()


def answer_of(posterior, method):
    """Predict in another process; fail where it hangs."""
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(posterior, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(120), "the process does not answer"
        draws, free, dtype = ours.recv()
    finally:
        process.kill()
        process.join()
    assert free
    assert dtype == "torch.float32"
    return torch.from_numpy(draws)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_process_predicts_what_its_parent_does(posterior, method):
    assert torch.equal(answer_of(posterior, method), predicted(posterior))


def test_a_pickled_posterior_is_another_one(posterior):
    again = pickle.loads(pickle.dumps(posterior))
    assert torch.equal(predicted(again), predicted(posterior))
    again.detach()
    assert posterior.model.attachment.attached


def test_a_process_forked_in_the_middle_of_a_fit_predicts(posterior):
    """The thread that fits holds the turn, and is not there in the new process."""
    expected, inside, asked = predicted(posterior), threading.Event(), threading.Event()

    class Wait(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                inside.set()
                asked.wait(120)

    other = bert()
    options = {"epochs": 2, "batch_size": 4, "callbacks": Wait(), **OPTIONS}
    thread = threading.Thread(target=pyrolora.fit, args=(other, reviews(8), GUIDE), kwargs=options)
    thread.start()
    try:
        assert inside.wait(120)
        found = answer_of(posterior, "fork")
    finally:
        asked.set()
        thread.join(120)
    assert torch.equal(found, expected)
    assert torch.equal(predicted(posterior), expected)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_that_load_data_change_no_number_of_a_fit(method, tmp_path):
    def fitted(**options):
        training = arguments(tmp_path, max_steps=2, **options)
        options = {name: value for name, value in OPTIONS.items() if name != "seed"}
        return pyrolora.fit(bert(), reviews(8), GUIDE, training=training, **options)

    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    try:
        with_workers = fitted(dataloader_num_workers=1).model.own_state()
    finally:
        multiprocessing.set_start_method(before, force=True)
    for name, tensor in fitted().model.own_state().items():
        assert torch.equal(with_workers[name], tensor), name

"""The state of the process that is the caller's is as before after every public call."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from problems import arguments, bert, llama, reviews, texts, tokenizer
from surroundings import undisturbed

import pyrolora
from pyrolora import AdapterConfig, guides
from pyrolora.errors import PyroLoraError
from pyrolora.seeding import seeded

SHORT = {"chains": 1, "num_samples": 4, "warmup_steps": 2, "max_tree_depth": 2}
OPTIONS = {"epochs": 1, "seed": 3, "batch_size": 4, "tokenizer": tokenizer()}
ADAPTER = AdapterConfig(r=2)
DATA = reviews(8)
GUIDES: dict[str, Any] = {
    "montec": "montec",
    "ensemble": guides.Ensemble(members=2),
    "laplace": "laplace",
    "nuts": guides.NUTS(**SHORT),
    "full": "full",
}


def left_alone(call: Callable[[], Any]) -> Any:
    """Return what ``call`` does; the generators stand where no seed of the library puts them."""
    random.seed(11)
    np.random.seed(12)
    torch.manual_seed(13)
    with undisturbed():
        return call()


@pytest.fixture(scope="module")
def posterior() -> pyrolora.Posterior:
    network = bert(initializer_range=0.3)
    return pyrolora.fit(network, DATA, "montec", adapter=ADAPTER, **OPTIONS)


@pytest.mark.parametrize("seed", [0, 3, 2**64 - 1])
def test_a_seed_gives_the_numbers_of_torchs(seed: int) -> None:
    with seeded(seed):
        found = torch.randn(5)
    torch.manual_seed(seed)
    assert torch.equal(found, torch.randn(5))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="whose generators are seeded, too")
def test_a_seed_does_not_write_down_the_callers_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch does for devices that are used later; it takes most of the time of a seed."""
    monkeypatch.setattr("traceback.format_stack", None)
    with seeded(3):
        torch.randn(5)


@pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")
@pytest.mark.parametrize("guide", GUIDES)
def test_a_fit_leaves_it_alone(guide: str, tmp_path: Any) -> None:
    adapter = {} if guide == "full" else {"adapter": ADAPTER}
    options = {**OPTIONS, **adapter, "eval_data": reviews(4), "output_dir": tmp_path}
    left_alone(lambda: pyrolora.fit(bert_of(0), DATA, GUIDES[guide], **options))


def bert_of(seed: int) -> Any:
    """A network that is made without a look at the process's generator."""
    with torch.random.fork_rng():
        return bert(seed=seed)


def test_a_fit_by_the_trainers_arguments_and_one_that_fails_leave_it_alone(tmp_path: Any) -> None:
    words = {"tokenizer": tokenizer(), "adapter": ADAPTER}
    training = arguments(tmp_path, max_steps=2, bf16=True)
    left_alone(lambda: pyrolora.fit(bert_of(0), DATA, "montec", training=training, **words))

    def refused() -> None:
        broken = bert_of(0)
        with torch.no_grad():
            broken.classifier.weight.fill_(torch.nan)
        with pytest.raises(PyroLoraError, match=r"NaN.*'heads\.classifier"):
            pyrolora.fit(broken, DATA, "montec", adapter=ADAPTER, **OPTIONS)

    left_alone(refused)


def test_a_fit_does_not_depend_on_the_callers_generators() -> None:
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found = pyrolora.fit(bert_of(0), DATA, "montec", adapter=ADAPTER, **OPTIONS)
        states.append(found.model.own_state())
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


USES: dict[str, Callable[[Any, Any], Any]] = {
    "predict": lambda p, folder: p.predict(DATA, 2, seed=1),
    "predict by numbers": lambda p, folder: p.predict(DATA, draws=[0, 3]),
    "predict with the mean": lambda p, folder: p.predict(DATA, 0),
    "sample": lambda p, folder: p.sample(2, seed=1),
    "factors": lambda p, folder: p.factors(),
    "evaluate": lambda p, folder: p.evaluate(DATA, 2, seed=1, outside=texts(4)),
    "log_likelihood": lambda p, folder: p.log_likelihood(DATA, 2, seed=1),
    "calibrate": lambda p, folder: p.calibrate(DATA, 2, seed=1),
    "to_arviz": lambda p, folder: p.to_arviz(4, data=DATA, log_likelihood=True, seed=1),
    "summary": lambda p, folder: p.summary(8, seed=1),
    "khat": lambda p, folder: p.khat(DATA, 25, seed=1),
    "report": lambda p, folder: p.report(folder / "page.html", DATA, num_samples=2, seed=1),
    "to_peft": lambda p, folder: p.to_peft(folder / "peft", [0, 1]),
    "merge": lambda p, folder: p.merge(0),
    "compare": lambda p, folder: pyrolora.compare({"it": p}, DATA, 2, seed=1),
    "a prediction that is refused": lambda p, folder: refused(p),
}


def refused(posterior: Any) -> None:
    with pytest.raises(PyroLoraError):
        posterior.predict([{"text": None}], 2, seed=1)


@pytest.mark.filterwarnings("ignore:the temperature .* is the end of what was looked at")
@pytest.mark.parametrize("use", USES)
def test_a_use_of_a_posterior_leaves_it_alone(use: str, posterior: Any, tmp_path: Any) -> None:
    left_alone(lambda: USES[use](posterior, tmp_path))
    posterior.temperature = 1.0


def test_reading_and_writing_leave_it_alone(posterior: Any, tmp_path: Any) -> None:
    left_alone(lambda: posterior.save(tmp_path / "saved"))
    network = bert_of(0)
    network.load_state_dict(posterior.base.state_dict())
    loaded = left_alone(lambda: pyrolora.load(tmp_path / "saved", network))
    loaded.to_peft(tmp_path / "peft")
    left_alone(loaded.detach)
    left_alone(lambda: pyrolora.from_peft(tmp_path / "peft", network))


def test_generation_leaves_it_alone() -> None:
    writer = pyrolora.fit(llama(), texts(8), "montec", adapter=ADAPTER, **OPTIONS)
    options = {"do_sample": True, "max_new_tokens": 3}
    left_alone(lambda: writer.generate(["the film"], 2, seed=1, **options))


def test_plots_leave_it_alone_but_for_their_figure(posterior: Any) -> None:
    plt.close("all")
    prediction = posterior.predict(DATA, 2, seed=1)
    figure, axes = plt.subplots()
    left_alone(lambda: pyrolora.plots.risk_coverage_curve(prediction, ax=axes))
    left_alone(lambda: pyrolora.plots.elbo_curve(posterior.history, ax=axes))
    plt.close(figure)

"""Torch's default dtype is the caller's: no number of a fit or of a prediction depends on it."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from problems import bert, tokens
from torch import nn

import pyrolora
from pyrolora.guides import NUTS
from pyrolora.seeding import DRAWING

ADAPTER = pyrolora.AdapterConfig(r=2)
CLASSES = tokens(16)
X = torch.tensor(CLASSES["input_ids"][:])
TARGETS = torch.rand(16, generator=torch.Generator().manual_seed(0)) * 5
ROWS = [{"input_ids": ids.tolist(), "labels": float(y)} for ids, y in zip(X, TARGETS, strict=True)]
DTYPES = [torch.bfloat16, torch.float16, torch.float64]


@contextmanager
def default(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype, "the caller's default was changed"
    finally:
        torch.set_default_dtype(torch.float32)


def numbers(network, data, guide, folder, again):
    posterior = pyrolora.fit(network, data, guide, epochs=1, batch_size=8, adapter=ADAPTER)
    state = posterior.model.own_state()
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float32}
    posterior.save(folder)
    loaded = pyrolora.load(folder, again)
    found = [
        *state.values(),
        *loaded.model.own_state().values(),
        posterior.predict(data, 3, seed=1).draws,
        loaded.predict(data, 3, seed=1).log_predictive,
        *posterior.sample(2, seed=0).values(),
    ]
    return found, posterior.evaluate(data, 3, seed=0), posterior


CASES = [
    *(
        (guide, 2, CLASSES)
        for guide in ("montec", "meanfield", "laplace", "dropout", "flat+lowrank")
    ),
    *((guide, 1, (X, TARGETS)) for guide in ("montec", "map", "ensemble")),
    (NUTS(num_samples=4, warmup_steps=2, chains=1), 1, ROWS),
]


@pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")
@pytest.mark.parametrize(("guide", "outputs", "data"), CASES)
def test_numbers_are_those_under_float32(guide, outputs, data, tmp_path):
    plain = bert(outputs)
    expected, scores, _ = numbers(copy.deepcopy(plain), data, guide, tmp_path, copy.deepcopy(plain))
    for dtype in DTYPES[:1] if guide != "montec" else DTYPES:
        copies = copy.deepcopy(plain), copy.deepcopy(plain)
        with default(dtype):
            found, own, _ = numbers(copies[0], data, guide, tmp_path, copies[1])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert own == pytest.approx(scores, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("data", [(X, TARGETS), (X.tolist(), TARGETS.tolist()), ROWS])
def test_targets_of_a_regression_are_not_rounded(data, tmp_path):
    network = bert(1)
    with default(torch.bfloat16):
        _, _, posterior = numbers(network, data, "map", tmp_path, copy.deepcopy(network))
        prediction = posterior.predict(data, 0)
    assert torch.equal(prediction.targets, TARGETS)
    law = torch.distributions.Normal(
        posterior.predict(data, 0).mean, posterior.task.param("noise_scale").detach()
    )
    mean = posterior.evaluate(data, 0)["nll"]
    assert mean == pytest.approx(float(-law.log_prob(TARGETS).mean()), rel=1e-6)


class Marked(nn.Module):
    """A network that makes a tensor without saying of which dtype, as under the caller's."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.seen = set()

    def forward(self, inputs):
        zero = torch.zeros(())
        self.seen.add(zero.dtype)
        return self.last(self.first(inputs).tanh() + zero)


def test_the_network_sees_the_callers_default():
    """It was built under it; what is fitted around it is float32 all the same."""
    with default(torch.bfloat16):
        network = Marked()
        data = (torch.randn(8, 4), torch.arange(8) % 3)
        posterior = pyrolora.fit(
            network, data, "montec", task="classification", epochs=1, adapter=ADAPTER
        )
        posterior.predict(data, 2, seed=0)
    assert network.seen == {torch.bfloat16}
    state = posterior.model.own_state()
    assert {t.dtype for t in state.values()} == {torch.float32}


def test_the_default_is_float32_for_one_thread_alone_and_the_callers_after():
    with default(torch.float64):
        with DRAWING, DRAWING:
            assert torch.get_default_dtype() == torch.float32
            with DRAWING.callers_dtype():
                assert torch.get_default_dtype() == torch.float64
            with DRAWING.released():
                assert torch.get_default_dtype() == torch.float64
            assert torch.get_default_dtype() == torch.float32
        with DRAWING.shared():
            assert torch.get_default_dtype() == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_first_prediction_checks_its_rows_whatever_the_default(dtype):
    posterior = pyrolora.fit(bert(), tokens(8), "montec", adapter=ADAPTER, epochs=1)
    with default(dtype):
        found = posterior.predict(tokens(4), 2, seed=0).draws
    torch.testing.assert_close(posterior.predict(tokens(4), 2, seed=0).draws, found)

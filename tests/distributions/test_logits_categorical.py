"""`LogitsCategorical`: Pyro's `Categorical`, in less memory."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from memory import LiveBytes
from pyro.infer import Predictive

from pyrolora.distributions import LogitsCategorical

SHAPE, WORDS = (3, 4), 6


def laws(*batch):
    logits = 2 * torch.randn(*(batch or SHAPE), WORDS, dtype=torch.float64)
    return LogitsCategorical(logits), dist.Categorical(logits=logits)


@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (5, 3, 4), (5, 1, 4)])
def test_densities_are_those_of_categorical_for_values_of_every_shape(shape):
    ours, theirs = laws()
    value = torch.randint(WORDS, shape)
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value))
    wide = [law.expand((2, *SHAPE)) for law in (ours, theirs)]
    assert wide[0].batch_shape == (2, *SHAPE)
    if len(shape) < 3:
        torch.testing.assert_close(*(law.log_prob(value) for law in wide))


def test_everything_else_is_that_of_categorical():
    ours, theirs = laws()
    for name in ("logits", "probs", "batch_shape", "event_shape", "param_shape"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert torch.allclose(one, other) if isinstance(one, torch.Tensor) else one == other
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.enumerate_support(), theirs.enumerate_support())
    mask = torch.rand(SHAPE) < 0.5
    value = torch.randint(WORDS, SHAPE)
    torch.testing.assert_close(
        *(law.mask(mask).to_event(1).log_prob(value) for law in (ours, theirs))
    )
    drawn = []
    for law in (ours, theirs):
        torch.manual_seed(0)
        drawn.append(law.sample((7,)))
    assert torch.equal(*drawn)


def test_gradients_are_those_of_categorical():
    logits = torch.randn(*SHAPE, WORDS, dtype=torch.float64, requires_grad=True)
    value, weights = torch.randint(WORDS, SHAPE), torch.randn(SHAPE, dtype=torch.float64)
    laws = (LogitsCategorical(logits), dist.Categorical(logits=logits))
    sums = [(weights * law.log_prob(value)).sum() for law in laws]
    torch.testing.assert_close(
        *(torch.autograd.grad(s, logits, retain_graph=True)[0] for s in sums)
    )
    torch.autograd.gradgradcheck(
        lambda logits: LogitsCategorical(logits).log_prob(value), (logits,), atol=1e-6
    )


def test_rows_that_are_normalised_in_turn_give_the_numbers_of_all_at_once(monkeypatch):
    logits = torch.randn(3, 5, WORDS, requires_grad=True)
    value, weights = torch.randint(WORDS, (3, 5)), torch.randn(3, 5)
    plain = logits.log_softmax(-1).gather(-1, value[..., None]).squeeze(-1)
    for most in (1, 4 * WORDS, 1000):
        monkeypatch.setattr("pyrolora.defaults.LOGITS_CPU", most)
        found = LogitsCategorical(logits).log_prob(value)
        assert torch.equal(found, plain)
        grads = [
            torch.autograd.grad((weights * p).sum(), logits, retain_graph=True)[0]
            for p in (found, plain)
        ]
        assert torch.equal(*grads)


def test_it_is_a_site_of_predictive():
    logits = torch.randn(*SHAPE, WORDS)

    def model():
        with pyro.plate("data", 3):
            pyro.sample("y", LogitsCategorical(logits).to_event(1))

    assert Predictive(model, num_samples=5)()["y"].shape == (5, *SHAPE)


def test_a_value_outside_of_the_vocabulary_is_refused():
    law = LogitsCategorical(torch.randn(WORDS), validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        law.log_prob(torch.tensor(WORDS))


def test_a_gradient_takes_no_other_tensor_of_the_logits_size(monkeypatch):
    monkeypatch.setattr("pyrolora.defaults.LOGITS_CPU", 1024)
    logits = torch.randn(64, 512, requires_grad=True)
    value = torch.randint(512, (64,))
    peaks = []
    for kind in (LogitsCategorical, dist.Categorical):
        with LiveBytes(logits) as live:
            kind(logits=logits, validate_args=False).log_prob(value).sum().backward()
        peaks.append(live.peak / (4 * logits.numel()))
        logits.grad = None
    assert peaks[0] < 1.2
    assert peaks[1] > 3.2

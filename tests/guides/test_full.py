"""Full fine-tuning: equal to the Trainer's, on a copy."""

from __future__ import annotations

import copy

import pyro
import pytest
import torch
from problems import arguments, batch_of, bert, gpt2, texts, tokenizer, tokens
from pyro.infer import SVI, Trace_ELBO
from transformers import Trainer

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError, NonFiniteError
from pyrolora.guides import Flat, Full

SETTINGS = {"weight_decay": 0.1, "warmup_steps": 2}


def test_full_equals_the_trainer(tmp_path):
    """The same weights after six steps, those of a frozen embedding left alone."""
    network, data = bert(initializer_range=0.3), tokens(40)
    network.bert.embeddings.requires_grad_(False)
    before, other = copy.deepcopy(network.state_dict()), copy.deepcopy(network)
    posterior = pyrolora.fit(
        network, data, guide="full", training=arguments(tmp_path / "ours", **SETTINGS)
    )
    Trainer(
        model=other, args=arguments(tmp_path / "theirs", **SETTINGS), train_dataset=data
    ).train()
    found = posterior.base.state_dict()
    for name, expected in other.state_dict().items():
        if name.endswith("key.bias"):  # shifts all scores alike: its gradient is rounding error
            continue
        torch.testing.assert_close(found[name], expected, atol=5e-5, rtol=1e-4)
    moved = {n for n, t in before.items() if not torch.equal(t, found[n])}
    assert any(name.startswith("bert.encoder") for name in moved)
    assert not any(name.startswith("bert.embeddings") for name in moved)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [p.requires_grad for p in posterior.base.parameters()] == [
        p.requires_grad for p in network.parameters()
    ]


class Normalised(torch.nn.Module):
    """A network with batch normalisation, whose output turns to NaN in a training pass."""

    def __init__(self, calls: int = 10**6) -> None:
        super().__init__()
        self.first, self.norm = torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6)
        self.last, self.left = torch.nn.Linear(6, 3), calls

    def forward(self, inputs):
        self.left -= self.training
        broken = self.training and self.left < 0
        return self.last(self.norm(self.first(inputs * torch.nan if broken else inputs)))

    def statistics(self):
        return {name: buffer.clone() for name, buffer in self.norm.named_buffers()}


POINTS = (torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3)


def fit_points(network, guide, **options):
    return pyrolora.fit(
        network, POINTS, guide=guide, task="classification", epochs=3, batch_size=8, **options
    )


def test_running_statistics_move_with_the_weights_that_they_belong_to(tmp_path):
    """In full fine-tuning those of the copy move; those of a network that gets adapters stay.

    A loaded posterior then predicts as the fitted one does.
    """
    network = Normalised()
    before = network.statistics()
    full = fit_points(network, "full")
    assert full.base.statistics()["num_batches_tracked"] == 12
    posterior = fit_points(network, "map", adapter=AdapterConfig(r=2), output_dir=tmp_path)
    for name, value in network.statistics().items():
        assert torch.equal(value, before[name])
    found = posterior.predict(POINTS[0], 1).probs
    posterior.detach()
    loaded = pyrolora.load(tmp_path, network).predict(POINTS[0], 1).probs
    torch.testing.assert_close(loaded, found)


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
@pytest.mark.parametrize("steps", [1, 3])
def test_a_failed_fit_keeps_the_running_statistics_of_the_last_good_step(steps):
    with pytest.raises(NonFiniteError) as caught:
        fit_points(Normalised(calls=steps), "full")
    found = caught.value.posterior.base.statistics()
    assert found["num_batches_tracked"] == steps
    assert all(value.isfinite().all() for value in found.values())


def test_tied_weights_stay_tied_and_come_back_from_a_folder(tmp_path):
    network = gpt2()
    posterior = pyrolora.fit(
        network, texts(12), guide=Full(), tokenizer=tokenizer(), epochs=2, learning_rate=1e-2
    )
    assert posterior.base.lm_head.weight is posterior.base.transformer.wte.weight
    posterior.save(tmp_path)
    loaded = pyrolora.load(tmp_path, network)
    assert loaded.base is not network
    assert loaded.base.lm_head.weight is loaded.base.transformer.wte.weight
    expected = posterior.log_likelihood(texts(5, 1), 0)
    assert torch.equal(loaded.log_likelihood(texts(5, 1), 0), expected)
    merged = posterior.merge()
    assert torch.equal(merged.lm_head.weight, posterior.base.lm_head.weight)
    assert merged is not posterior.base


def test_a_network_with_adapters_is_copied_without_them():
    """Beside another posterior of the network, which is not disturbed."""
    network = bert()
    adapted = pyrolora.fit(network, tokens(12), guide="map", adapter=AdapterConfig(r=2), epochs=1)
    before = adapted.predict(tokens(5), 0).probs
    full = pyrolora.fit(network, tokens(12), guide="full", epochs=1, learning_rate=1e-2)
    assert list(full.base.state_dict()) == list(network.state_dict())
    assert all(p.requires_grad for p in full.base.parameters())
    assert torch.equal(adapted.predict(tokens(5), 0).probs, before)


def test_all_draws_are_one_function():
    posterior = pyrolora.fit(bert(), tokens(12), guide="full", epochs=1)
    draws = posterior.predict(tokens(5), 3).draws
    assert torch.equal(draws[0], draws[2])
    assert repr(posterior).startswith("Posterior(guide='full'")


def test_what_needs_adapters_is_refused(tmp_path):
    network = bert()
    with pytest.raises(ConfigError, match="adapter"):
        pyrolora.fit(network, tokens(12), guide="full", adapter=AdapterConfig(r=2))
    with pytest.raises(ConfigError, match="trains adapters"):
        Flat(inner=Full())
    posterior = pyrolora.fit(network, tokens(12), guide="full", epochs=1)
    with pytest.raises(ConfigError, match="merge"):
        posterior.to_peft(tmp_path)
    with pytest.raises(ConfigError, match="no adapter"):
        pyrolora.fit(posterior, tokens(12), guide="laplace")
    with pytest.raises(ConfigError, match="khat"):
        posterior.khat(tokens(12))
    network.requires_grad_(False)
    with pytest.raises(ConfigError, match="requires_grad_"):
        pyrolora.fit(network, tokens(12), guide="full")


def test_a_page_of_a_posterior_without_adapters(tmp_path):
    posterior = pyrolora.fit(bert(), tokens(12), guide="full", epochs=1)
    page = posterior.report(tmp_path / "page.html", tokens(8)).read_text()
    trained = sum(p.numel() for p in posterior.base.parameters())
    assert f"{trained:,}" in page


def test_the_pair_trains_the_weights_by_pyros_own_svi():
    posterior = pyrolora.fit(bert(initializer_range=0.3), tokens(16), guide="full", epochs=1)
    svi = SVI(posterior.model, posterior.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(batch_of(tokens(16))) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]

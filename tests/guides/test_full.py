"""Full fine-tuning: equal to the Trainer's, on a copy."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import bert, gpt2, reviews, tokenizer, tokens
from transformers import Trainer, TrainingArguments

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError
from pyrolora.guides import Flat, Full


def arguments(path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        warmup_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=3,
    )


def test_full_equals_the_trainer(tmp_path):
    """The same weights after six steps, those of a frozen embedding left alone."""
    network, data = bert(initializer_range=0.3), tokens(40)
    network.bert.embeddings.requires_grad_(False)
    before, other = copy.deepcopy(network.state_dict()), copy.deepcopy(network)
    posterior = pyrolora.fit(network, data, guide="full", training=arguments(tmp_path / "ours"))
    Trainer(model=other, args=arguments(tmp_path / "theirs"), train_dataset=data).train()
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


def test_tied_weights_stay_tied_and_come_back_from_a_folder(tmp_path):
    network = gpt2()
    posterior = pyrolora.fit(
        network, reviews(12), guide=Full(), tokenizer=tokenizer(), epochs=2, learning_rate=1e-2
    )
    assert posterior.base.lm_head.weight is posterior.base.transformer.wte.weight
    posterior.save(tmp_path)
    loaded = pyrolora.load(tmp_path, network)
    assert loaded.base is not network
    assert loaded.base.lm_head.weight is loaded.base.transformer.wte.weight
    expected = posterior.log_likelihood(reviews(5, 1), 0)
    assert torch.equal(loaded.log_likelihood(reviews(5, 1), 0), expected)
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

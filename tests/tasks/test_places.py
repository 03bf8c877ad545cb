"""Logits where labels are: the same numbers as with the logits of all tokens, in less memory."""

from __future__ import annotations

import dataclasses

import datasets
import peft
import pytest
import torch
from memory import LiveBytes
from problems import absolute, arguments, llama, tokenizer
from transformers import LlamaForCausalLM, Trainer

import pyrolora
from pyrolora.columns import LABELS, PLACES
from pyrolora.tasks.causal_lm import CausalCollator

TARGETS = ["q_proj", "v_proj", "lm_head"]


def completions(lengths=((5, 2), (6, 3), (4, 1), (7, 3), (5, 3), (6, 1))):
    """Rows of tokens with labels for the last ones alone."""
    made = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 16, (p + c,), generator=made).tolist() for p, c in lengths]
    return datasets.Dataset.from_list(
        [
            {"input_ids": row, LABELS: [-100] * p + row[p:]}
            for row, (p, _) in zip(ids, lengths, strict=True)
        ]
    )


def everything(folder, guide, **options):
    """A fit, and all that it says, in one dictionary."""
    network, data = llama(initializer_range=0.3), completions()
    fit = pyrolora.fit(
        network,
        data,
        guide,
        tokenizer=tokenizer(),
        adapter=pyrolora.AdapterConfig(r=2, target_modules=TARGETS),
        training=arguments(folder, **options),
        eval_data=data,
    )
    read = fit.predict(data, num_samples=3, seed=1)
    lines = [{"question": "the film", "choices": ["is good", "was bad", "fine"], "label": 1}]
    chosen = fit.predict(datasets.Dataset.from_list(lines), num_samples=3, seed=1)
    written = fit.generate(["the film is", "a"], num_samples=2, max_new_tokens=3, seed=1)
    numbers = {f"posterior {n}": t for n, t in fit.model.program.state_dict().items()}
    for name, part in (("read", read), ("chosen", chosen), ("written", written)):
        numbers |= {
            f"{name} {field.name}": value
            for field in dataclasses.fields(part)
            if isinstance(value := getattr(part, field.name), torch.Tensor)
        }
    numbers["evaluated"] = torch.tensor(fit.evaluate(data, num_samples=3, seed=1)["nll"])
    return numbers


@pytest.fixture
def all_logits(monkeypatch):
    """Switches to the logits of all tokens."""

    def switch():
        monkeypatch.setattr(CausalCollator, "places_read", lambda self, batch: None)

    return switch


@pytest.mark.parametrize("draws", [None, 2])
def test_a_fit_and_all_that_it_says_are_those_with_every_logit(draws, all_logits, tmp_path):
    guide = "map" if draws is None else absolute(pyrolora.guides.MonteCLoRA, draws_per_batch=draws)
    few = everything(tmp_path, guide)
    all_logits()
    every = everything(tmp_path, guide)
    assert few.keys() == every.keys()
    for name, value in every.items():
        torch.testing.assert_close(few[name], value, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)


class Deaf(LlamaForCausalLM):
    """A network that takes the argument, and gives all logits."""

    def forward(self, input_ids, attention_mask=None, logits_to_keep=0):
        return super().forward(input_ids, attention_mask)


def test_the_network_computes_the_logits_before_a_label_of_any_row(all_logits, tmp_path):
    network, data = llama(initializer_range=0.3), completions()
    batch = CausalCollator(network, tokenizer())([data[0], data[2]])
    assert batch["input_ids"].shape == (2, 7)
    assert batch[PLACES].tolist() == [[3, 4, 5]] * 2
    found = []
    for kind in (LlamaForCausalLM, Deaf, None):
        if kind is None:
            all_logits()
        else:
            network.__class__ = kind
        args = arguments(tmp_path, max_steps=1)
        options = {"tokenizer": tokenizer(), "task": "text-generation", "training": args}
        fit = pyrolora.fit(network, data, "map", **options)
        shapes = []
        handle = network.lm_head.register_forward_hook(lambda *a, s=shapes: s.append(a[2].shape))
        found.append(fit.predict(data))
        handle.remove()
        rows = sum(shape[0] * shape[1] for shape in shapes)
        assert rows == (6 * 6 if kind is LlamaForCausalLM else 6 * 10)
    for name in ("log_likelihood", "entropy", "targets", "num_tokens"):
        for other in found[1:]:
            torch.testing.assert_close(
                getattr(found[0], name), getattr(other, name), equal_nan=True
            )


WORDS_OF_A_DECODER = 4096


@pytest.fixture
def few_at_once(monkeypatch):
    monkeypatch.setattr("pyrolora.defaults.LOGITS_CPU", 2 * WORDS_OF_A_DECODER)


def wide():
    return llama(vocab_size=WORDS_OF_A_DECODER)


def peak_of(network, run):
    """The most bytes at once, in copies of the logits of four texts of 32 tokens each."""
    with LiveBytes(*network.parameters()) as live:
        made = run()
    return live.peak / (4 * 4 * 32 * WORDS_OF_A_DECODER), made


def test_memory_is_below_that_of_peft_and_trainer(tmp_path, few_at_once):
    lengths = [(24, 8), (28, 4), (26, 6), (24, 8)]
    data, args = completions(lengths), arguments(tmp_path, max_steps=2, logging_strategy="no")
    network = wide()
    options = {"tokenizer": tokenizer(), "training": args}
    ours, fit = peak_of(network, lambda: pyrolora.fit(network, data, "map", **options))
    other = wide()
    model = peft.get_peft_model(other, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    theirs, _ = peak_of(other, Trainer(model=model, args=args, train_dataset=data).train)
    assert theirs > 3
    assert ours < 1.6  # of all logits of two texts, when the first pass is checked
    several, _ = peak_of(network, lambda: fit.predict(data, num_samples=0))
    assert several < 1


def test_whole_texts_need_no_more_than_their_logits_and_the_gradient(tmp_path, few_at_once):
    data = completions([(1, 31)] * 4)
    args = arguments(tmp_path, max_steps=2, logging_strategy="no")
    network = wide()
    options = {"tokenizer": tokenizer(), "training": args}
    ours, fit = peak_of(network, lambda: pyrolora.fit(network, data, "map", **options))
    assert ours < 2.4
    read, _ = peak_of(network, lambda: fit.evaluate(data, num_samples=0))
    assert read < 2.4  # logits, and the probabilities of the mixture

"""Copies of the logits of a language model, the largest tensors of all: counted in bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory import LiveBytes
from problems import llama

from pyrolora import AdapterConfig, defaults
from pyrolora.adapters import attach
from pyrolora.guides import MeanField
from pyrolora.inference import Objective, kfac
from pyrolora.model import JointModel, build
from pyrolora.predictive import draw_factors
from pyrolora.predictive.predict import passes
from pyrolora.tasks import task_for

VOCABULARY, LENGTH = 8_000, 32
LOGITS = 4 * 2 * (LENGTH - 1) * VOCABULARY


@pytest.fixture(scope="module")
def model() -> tuple[JointModel, dict[str, torch.Tensor]]:
    network = llama(vocab_size=VOCABULARY, tie_word_embeddings=True)
    config, task = AdapterConfig(r=2), task_for(network)
    joint = build(network, attach(network, config), config, MeanField(), task, 8)
    ids = torch.randint(VOCABULARY, (2, LENGTH))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch = dict(task.collator(network, None).with_places(batch))
    joint.together(batch)
    return joint, batch


def train(joint: JointModel, batch: Any) -> None:
    joint.train()
    Objective(joint, 2)(batch, 1.0).backward()
    joint.eval()


@torch.no_grad()
def predict(joint: JointModel, batch: Any, temperature: float = 1.0) -> None:
    outputs = passes(joint, batch, draw_factors(joint, 3, 1), rows=2)
    joint.task.prediction.reduce(joint.task.at(temperature), outputs, batch)


@torch.no_grad()
def score(joint: JointModel, batch: Any) -> None:
    joint.task.log_prob(joint.network(batch, joint.program.mean()), batch)


@pytest.mark.parametrize(
    ("action", "copies"),
    [
        (score, 1),  # the network's own
        (train, 2),  # and its gradient
        (predict, 2),  # and the sum of the draws' probabilities
        (lambda joint, batch: predict(joint, batch, 2.0), 3),  # and those at the temperature
        (lambda joint, batch: kfac(joint, [batch]), 3),  # and a gradient, drawn and spread
    ],
    ids=["score", "train", "predict", "predict at a temperature", "curvature"],
)
def test_logits_are_copied_no_more_often_than_needed(
    model: Any,
    action: Callable[[JointModel, Any], None],
    copies: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joint, batch = model
    monkeypatch.setattr(defaults, "LOGITS_CPU", 2**14)  # normalised at a time
    with LiveBytes(*joint.parameters(), *joint.base.buffers()) as live:
        action(joint, batch)
    assert live.peak < (copies + 0.5) * LOGITS

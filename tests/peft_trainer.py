"""LoRA as PEFT and transformers' Trainer fit it, with transformers' own loss."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import pyrolora
from pyrolora import AdapterConfig

TARGETS = ["query", "value"]


class Start(TrainerCallback):
    """Notes the factors before the first step."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        bank = model.joint.program.bank
        matrices = bank.matrices(bank.means())
        self.factors = {
            n: (A.detach().clone(), B.detach().clone()) for n, (A, B) in matrices.items()
        }


def lora_layers(model: nn.Module, factors: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return PEFT's layers by their names in the network, set to these A and B if there are any."""
    layers: dict[str, Any] = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    if factors is not None:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.lora_A["default"].weight.copy_(factors[name][0])
                layer.lora_B["default"].weight.copy_(factors[name][1])
    return layers


def check_map(
    network: nn.Module,
    data: Any,
    examples: Any,
    collate: Any,
    *,
    kind: str,
    head: str,
    ours: TrainingArguments,
    theirs: TrainingArguments,
    **options: Any,
) -> None:
    """Compare a `map` fit to ``data`` with PEFT and the Trainer, from the same start.

    ``examples`` and their ``collate`` give the Trainer the same data; ``kind`` is PEFT's task, and
    ``head`` the module that is trained as a whole.
    """
    start, other = Start(), copy.deepcopy(network)
    posterior = pyrolora.fit(
        network,
        data,
        "map",
        adapter=AdapterConfig(r=2, lora_alpha=4, target_modules=TARGETS),
        training=ours,
        callbacks=[start],
        **options,
    )
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=TARGETS, task_type=kind, modules_to_save=[head]
    )
    model = peft.get_peft_model(other, config)
    layers = lora_layers(model, start.factors)
    Trainer(model=model, args=theirs, train_dataset=examples, data_collator=collate).train()
    moved = 0.0
    for name, (A, B) in posterior.factors().items():
        _close(A, layers[name].lora_A["default"].weight)
        _close(B, layers[name].lora_B["default"].weight)
        moved = max(moved, float((B - start.factors[name][1]).detach().abs().max()))
    assert moved > 1e-2, "nothing was trained"
    trained: Mapping[str, Tensor] = (
        getattr(model.base_model.model, head).modules_to_save["default"].state_dict()
    )
    own = posterior.model.named_heads()[head][0].state_dict()
    for key, value in trained.items():
        _close(own[key], value)


def _close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs.detach(), atol=2e-6, rtol=1e-4)

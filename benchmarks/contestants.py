"""What is compared: the frozen network, PEFT's LoRA and MonteCLoRA, and pyrolora's guides, each
ready for training steps on the same network."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from common import RESULTS, positive
from networks import Case, case, twin
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrolora.adapters import attach
from pyrolora.columns import Batch
from pyrolora.guides import MAP, Dropout, Flat, Guide, LowRank, MeanField, MonteCLoRA
from pyrolora.inference import Objective
from pyrolora.model import build
from pyrolora.tasks import task_for

NUM_EXAMPLES = 10_000  # n of the pretended data set; it scales the loss and costs nothing
LEARNING_RATE = 1e-3
BASE, LORA, PEFT_MONTEC = "base", "PEFT LoRA", "PEFT MonteCLoRA"
GUIDES: dict[str, Guide] = {
    "map": MAP(),
    "montec": MonteCLoRA(),
    "montec hierarchical": MonteCLoRA(component_prior="hierarchical"),
    "meanfield": MeanField(),
    "lowrank": LowRank(),
    "dropout": Dropout(),
    "flat": Flat(),
    "flat+montec": Flat(inner=MonteCLoRA()),
}


@dataclass(frozen=True)
class Contestant:
    """A module in training mode, its loss on a batch, and its optimiser."""

    module: nn.Module
    loss: Callable[[Batch], Tensor]
    optimizer: torch.optim.Optimizer

    def step(self, batch: Batch) -> None:
        """Forward, backward, optimiser step, zero_grad."""
        self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def transformer(module: nn.Module) -> PreTrainedModel:
    """Return transformers' network in the module of a contestant."""
    return next(part for part in module.modules() if isinstance(part, PreTrainedModel))


Maker = Callable[[Case, nn.Module], Contestant]


def _contestant(module: nn.Module, loss: Callable[[Batch], Tensor]) -> Contestant:
    """With the Trainer's default optimiser over what the module trains."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    fused = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    return Contestant(module.train(), loss, fused)


def base(case: Case, network: nn.Module) -> Contestant:
    """The frozen network, of a classifier with its trained head. The embeddings' output takes a
    gradient, so that the backward pass runs through the whole network, as it does for adapters."""
    model = twin(network).requires_grad_(False)
    model.enable_input_require_grads()
    if not case.shape.causal:
        model.classifier.requires_grad_(True)
    else:  # no head, and an optimiser needs something
        model.register_parameter("idle", nn.Parameter(torch.zeros(1, device=model.device)))
    return _contestant(model, lambda batch: model(**batch).loss)


def peft_lora(case: Case, network: nn.Module) -> Contestant:
    """LoRA by PEFT."""
    model = _peft_model(case, network)
    return _contestant(model, lambda batch: model(**batch).loss)


def peft_monteclora(case: Case, network: nn.Module) -> Contestant:
    """MonteCLoRA by PEFT, with 4 components like ours; its loss is that of PEFT's own
    ``MontecloraTrainerMixin``. Its random numbers come from a buffer of 150 steps; filling it
    again is no part of these steps unless there are more than 150 of them."""
    if not hasattr(peft, "MontecloraConfig"):
        raise SystemExit(
            f"PEFT {peft.__version__} has no MontecloraConfig; upgrade PEFT or leave this "
            "contestant out with --contestants"
        )
    model = _peft_model(case, network, monteclora_config=peft.MontecloraConfig(num_samples=4))
    return _contestant(
        model, lambda batch: model(**batch).loss + model.base_model._get_monteclora_loss()
    )


def _peft_model(case: Case, network: nn.Module, **options: Any) -> Any:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM" if case.shape.causal else "SEQ_CLS",
        r=case.rank,
        lora_alpha=2 * case.rank,
        target_modules=case.targets,
        **options,
    )
    # Without the last, PEFT computes the adapters of a bfloat16 network in float32.
    return peft.get_peft_model(twin(network), config, autocast_adapter_dtype=False)


def pyrolora_guide(guide: Guide) -> Maker:
    """pyrolora's objective, as its Trainer builds it."""

    def make(case: Case, network: nn.Module) -> Contestant:
        model = twin(network)
        task, config = task_for(model), case.adapter
        joint = build(model, attach(model, config), config, guide, task, NUM_EXAMPLES)
        objective = Objective(joint.to(model.device), NUM_EXAMPLES)
        beta, collate = guide.beta(NUM_EXAMPLES), task.collator(model, None)
        return _contestant(objective, lambda batch: objective(collate.with_places(batch), beta))

    return make


CONTESTANTS: dict[str, Maker] = {
    BASE: base,
    LORA: peft_lora,
    PEFT_MONTEC: peft_monteclora,
    **{f"pyrolora {name}": pyrolora_guide(guide) for name, guide in GUIDES.items()},
}


def check_same_start(contestants: dict[str, Contestant], batch: Batch, shape: Any) -> None:
    """At the start every adapter is zero: without dropout and KL, PEFT's LoRA and `map` are the
    bare network; and they train as many numbers."""
    losses, sizes = {}, {}
    for name in (BASE, LORA, "pyrolora map"):
        if name in contestants:
            contestants[name].module.eval()
            loss = float(contestants[name].loss(batch).detach())
            if shape.causal and name == "pyrolora map":  # a sum over tokens: here over n
                loss /= shape.length - 1
            losses[name] = loss
            contestants[name].module.train()
            groups = contestants[name].optimizer.param_groups
            sizes[name] = sum(p.numel() for group in groups for p in group["params"])
    sizes.pop(BASE, None)
    spread = max(losses.values(), default=0) - min(losses.values(), default=0)
    if spread > (1e-2 if shape.large else 1e-4) or len(set(sizes.values())) > 1:
        raise SystemExit(f"the contestants are not the same: losses {losses}, trained {sizes}")


def argument_parser(description: str | None, example: str) -> argparse.ArgumentParser:
    """What the scripts that compare them by case have in common."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"Example: {example}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--cases",
        type=case,
        nargs="+",
        metavar="CASE",
        help="networks and which layers get adapters, see networks.py; left out: all that the "
        "device is for",
    )
    parser.add_argument("--rank", type=positive, default=8, help="rank r; lora_alpha is 2 r")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto: the accelerator")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=list(CONTESTANTS),
        default=list(CONTESTANTS),
        metavar="NAME",
        help=f"who takes part; quote the names: {', '.join(map(repr, CONTESTANTS))}",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser

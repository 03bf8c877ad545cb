"""What one training step costs: pyrolora's guides beside PEFT and the bare network.

Every contestant trains its own copy of one network on the same batches with the same optimiser.
They take turns step by step in one process, in an order that rotates every round, so that a slow
moment of the machine hits all of them.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import torch
from common import (
    RESULTS,
    describe_network,
    existing_folder,
    hardware,
    model_folder,
    pick_device,
    positive,
    quiet_loading,
    save_json,
    show,
    tag,
    versions,
)
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, BertConfig, set_seed

from pyrolora import AdapterConfig
from pyrolora.adapters import AdapterBank, attach
from pyrolora.guides import MAP, Flat, Guide, MeanField, MonteCLoRA, Program
from pyrolora.inference.elbo import NamedELBO
from pyrolora.inference.trainer import Objective
from pyrolora.likelihoods import likelihood_for
from pyrolora.loading import build
from pyrolora.model import JointGuide
from pyrolora.parameters import param_statement
from pyrolora.types import Batch

NUM_EXAMPLES = 10_000  # n of the pretended data set; it scales the loss and costs nothing
LEARNING_RATE = 1e-3
SEED = 0
REFERENCES = ("PEFT LoRA", "base")
GUIDES: dict[str, Guide] = {
    "map": MAP(),
    "montec": MonteCLoRA(),
    "montec hierarchical": MonteCLoRA(component_prior="hierarchical"),
    "meanfield": MeanField(),
    "flat": Flat(),
    "flat+montec": Flat(inner=MonteCLoRA()),
}
# all-MiniLM-L6-v2, with random weights.
MINILM = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 30522,
}


# Contestants ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What all contestants have in common."""

    network: nn.Module
    targets: list[str]
    rank: int


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


def contestant(module: nn.Module, loss: Callable[[Batch], Tensor]) -> Contestant:
    """With the Trainer's default optimiser over what the module trains."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    fused = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    return Contestant(module.train(), loss, fused)


def base(setting: Setting) -> Contestant:
    """The frozen network with its trained head. The embeddings' output takes a gradient, so that
    the backward pass runs through the whole network, as it does for adapters."""
    network: Any = copy.deepcopy(setting.network).requires_grad_(False)
    network.classifier.requires_grad_(True)
    network.enable_input_require_grads()
    return contestant(network, lambda batch: network(**batch).loss)


def peft_lora(setting: Setting) -> Contestant:
    """LoRA by PEFT."""
    model = _peft_model(setting)
    return contestant(model, lambda batch: model(**batch).loss)


def peft_monteclora(setting: Setting) -> Contestant:
    """MonteCLoRA by PEFT, with 4 components like ours; its loss is that of PEFT's own
    ``MontecloraTrainerMixin``. Its random numbers come from a buffer of 150 steps; filling it
    again is no part of these steps unless there are more than 150 of them."""
    if not hasattr(peft, "MontecloraConfig"):
        raise SystemExit(
            f"PEFT {peft.__version__} has no MontecloraConfig; upgrade PEFT or leave this "
            "contestant out with --contestants"
        )
    model = _peft_model(setting, monteclora_config=peft.MontecloraConfig(num_samples=4))
    return contestant(
        model, lambda batch: model(**batch).loss + model.base_model._get_monteclora_loss()
    )


def _peft_model(setting: Setting, **options: Any) -> Any:
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=setting.rank,
        lora_alpha=2 * setting.rank,
        target_modules=setting.targets,
        **options,
    )
    return peft.get_peft_model(copy.deepcopy(setting.network), config)


def pyrolora_guide(guide: Guide) -> Callable[[Setting], Contestant]:
    """pyrolora's objective, as its Trainer builds it."""

    def make(setting: Setting) -> Contestant:
        network = copy.deepcopy(setting.network)
        config = adapter_config(setting)
        likelihood = likelihood_for(network)
        joint = build(network, attach(network, config), config, guide, likelihood, NUM_EXAMPLES)
        objective = Objective(joint, NUM_EXAMPLES)
        beta = guide.beta(NUM_EXAMPLES)
        return contestant(objective, lambda batch: objective(batch, beta))

    return make


def adapter_config(setting: Setting) -> AdapterConfig:
    return AdapterConfig(
        r=setting.rank, lora_alpha=2 * setting.rank, target_modules=setting.targets
    )


CONTESTANTS: dict[str, Callable[[Setting], Contestant]] = {
    "base": base,
    "PEFT LoRA": peft_lora,
    "PEFT MonteCLoRA": peft_monteclora,
    **{f"pyrolora {name}": pyrolora_guide(guide) for name, guide in GUIDES.items()},
}


# Measurement ------------------------------------------------------------------------------------


def milliseconds(action: Callable[[], object], device: torch.device) -> float:
    """How long ``action`` takes, until the device has done its work."""
    start = time.perf_counter()
    action()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def take_turns(
    actions: dict[str, Callable[[], object]],
    steps: int,
    warmup: int,
    device: torch.device,
    label: str,
) -> dict[str, list[float]]:
    """Milliseconds of each action, in turns; round k starts with action k."""
    names = list(actions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for step in tqdm(range(warmup + steps), desc=label):
        first = step % len(names)
        for name in names[first:] + names[:first]:
            spent = milliseconds(actions[name], device)
            if step >= warmup:
                times[name].append(spent)
    return times


def summary(times: dict[str, list[float]]) -> pd.DataFrame:
    """One row a contestant: median and quartiles, and the ratios of medians."""
    rows = []
    for name, values in times.items():
        low, median, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        rows.append({"contestant": name, "median_ms": median, "q25_ms": low, "q75_ms": high})
    frame = pd.DataFrame(rows)
    medians = frame.set_index("contestant")["median_ms"]
    for reference in REFERENCES:
        if reference in medians:
            frame[f"to {reference}"] = frame["median_ms"] / medians[reference]
    return frame


def check_same_start(contestants: dict[str, Contestant], batch: Batch) -> None:
    """At the start every adapter is zero: without dropout and KL all are the bare network."""
    losses = {}
    for name in ("base", "PEFT LoRA", "pyrolora map"):
        if name in contestants:
            contestants[name].module.eval()
            losses[name] = float(contestants[name].loss(batch).detach())
            contestants[name].module.train()
    if losses and max(losses.values()) - min(losses.values()) > 1e-4:
        raise SystemExit(f"the contestants do not compute the same function: {losses}")


# Pyro's own share -------------------------------------------------------------------------------


class BeforeNetwork(nn.Module):
    """The joint model up to the point where the network would be called."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.head = nn.Linear(1, 1)
        self.reached: list[Tensor] = []

    def forward(self, batch: Batch | None, kl_weight: float) -> None:
        factors = self.program.model(kl_weight)
        for name, parameter in self.head.named_parameters():
            param_statement(f"heads.{name}", parameter)
        layers = self.program.bank.layer_factors(factors, torch.float32)
        self.reached = [t for layer in layers.values() for t in (layer.A, layer.sB)]


def pyro_actions(program: Program, beta: float) -> dict[str, Callable[[], object]]:
    """Sites, KL and factors of one step, without and with their backward pass."""
    model = BeforeNetwork(program)
    elbo = NamedELBO()(model, JointGuide(program))

    def forward() -> Tensor:
        return elbo(None, kl_weight=beta)

    forward()
    ones = [torch.ones_like(t) for t in model.reached]

    def both() -> None:
        loss = forward()
        outputs, gradients = model.reached, ones
        if loss.requires_grad:
            outputs, gradients = [loss, *outputs], [torch.ones_like(loss), *gradients]
        torch.autograd.backward(outputs, gradients)
        model.zero_grad()

    return {"forward": forward, "forward and backward": both}


def pyro_share(
    setting: Setting, layers: list[int], steps: int, warmup: int, device: torch.device
) -> list[dict[str, Any]]:
    """Milliseconds of everything in a step but the network, for networks of several depths."""
    rows: list[dict[str, Any]] = []
    for depth in layers:
        config = copy.deepcopy(setting.network.config)
        config.num_hidden_layers = depth
        with torch.device("meta"):  # the shapes are all that is needed
            network = AutoModelForSequenceClassification.from_config(config)
        specs = attach(network, adapter_config(setting)).specs
        actions = {}
        for name, guide in GUIDES.items():
            program = guide.build(AdapterBank(specs, adapter_config(setting))).to(device)
            for part, action in pyro_actions(program, guide.beta(NUM_EXAMPLES)).items():
                actions[f"{name}/{part}"] = action
        times = take_turns(actions, steps, warmup, device, f"Pyro alone, {depth} layers")
        for name in GUIDES:
            row: dict[str, Any] = {"guide": name, "layers": depth, "adapters": len(specs)}
            for part in ("forward", "forward and backward"):
                row[f"{part}_ms"] = torch.tensor(times[f"{name}/{part}"]).median().item()
            rows.append(row)
    return rows


# The job ----------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: python benchmarks/step_time.py --batch 32 --length 128",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        type=model_folder,
        help="folder of a transformers model that classifies by a module 'classifier'; left out: "
        "a BERT of the shape of all-MiniLM-L6-v2 with random weights (the time is the same)",
    )
    parser.add_argument("--batch", type=positive, default=16, help="examples in a batch")
    parser.add_argument("--length", type=positive, default=64, help="tokens of an example")
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["query", "key", "value"],
        help="names of the linear layers that get an adapter",
    )
    parser.add_argument("--rank", type=positive, default=8, help="rank r; lora_alpha is 2 r")
    parser.add_argument("--steps", type=positive, default=40, help="timed steps of each contestant")
    parser.add_argument("--warmup", type=int, default=5, help="steps before, not timed")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto: the accelerator")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=list(CONTESTANTS),
        default=list(CONTESTANTS),
        metavar="NAME",
        help=f"who takes part; quote the names: {', '.join(map(repr, CONTESTANTS))}",
    )
    parser.add_argument(
        "--pyro-layers",
        type=positive,
        nargs="*",
        default=[6, 24],
        help="depths of the network at which Pyro's own share is measured",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser.parse_args(argv)


def load_network(model: Path | None, device: torch.device) -> nn.Module:
    set_seed(SEED)
    if model is None:
        config = BertConfig(**MINILM, num_labels=2)
        network = AutoModelForSequenceClassification.from_config(config)
    else:
        with quiet_loading():
            network = AutoModelForSequenceClassification.from_pretrained(
                existing_folder(str(model)), num_labels=2, dtype=torch.float32
            )
    if not isinstance(getattr(network, "classifier", None), nn.Module):
        raise SystemExit(f"{type(network).__name__} has no module 'classifier'")
    return network.to(device)


def batches(count: int, args: argparse.Namespace, network: nn.Module, device: torch.device) -> Any:
    """Batches of random tokens, all of full length."""
    random = torch.Generator().manual_seed(SEED)
    vocabulary: int = network.config.vocab_size
    shape = (count, args.batch, args.length)
    ids = torch.randint(vocabulary // 10, vocabulary, shape, generator=random)
    labels = torch.randint(2, shape[:2], generator=random)
    return [
        {
            "input_ids": x.to(device),
            "attention_mask": torch.ones_like(x, device=device),
            "labels": y.to(device),
        }
        for x, y in zip(ids, labels, strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = pick_device(args.device)
    network = load_network(args.model, device)
    limit = getattr(network.config, "max_position_embeddings", args.length)
    if args.length > limit:
        raise SystemExit(f"--length {args.length}: this network takes {limit} tokens at most")
    setting = Setting(network, args.targets, args.rank)
    contestants = {name: CONTESTANTS[name](setting) for name in args.contestants}
    data = batches(args.warmup + args.steps, args, network, device)
    check_same_start(contestants, data[0])

    counts = dict.fromkeys(contestants, 0)

    def next_step(name: str) -> None:
        contestants[name].step(data[counts[name]])
        counts[name] += 1

    actions = {name: lambda name=name: next_step(name) for name in contestants}
    times = take_turns(actions, args.steps, args.warmup, device, "training steps")
    steps = summary(times)
    show(steps)
    share = pyro_share(setting, args.pyro_layers, args.steps, args.warmup, device)
    print("Everything in a step but the network: sites, KL and factors, in milliseconds")
    show(pd.DataFrame(share))
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "model")}
    save_json(
        args.out / f"step_time-{tag(device)}.json",
        {
            "arguments": {**settings, "random_weights": args.model is None},
            "network": describe_network(network),
            "versions": versions(),
            "hardware": hardware(),
            "steps": steps.to_dict("records"),
            "pyro": share,
            "milliseconds": times,
        },
    )


if __name__ == "__main__":
    main()

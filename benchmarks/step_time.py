"""What one training step costs: pyrolora's guides beside PEFT and the bare network.

Every contestant trains one network, with the same frozen weights, on the same batches with the same
optimiser. They take turns step by step in one process, in an order that rotates every round, so
that a slow moment of the machine hits all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from common import (
    describe_network,
    markdown,
    pick_device,
    positive,
    provenance,
    save_json,
    show,
    tag,
    take_turns,
    time_table,
    with_earlier,
)
from contestants import (
    BASE,
    CONTESTANTS,
    GUIDES,
    LORA,
    NUM_EXAMPLES,
    argument_parser,
    check_same_start,
    transformer,
)
from networks import Case, adapted_layers, case_names, narrowed, title
from torch import Tensor, nn

from pyrolora.adapters import AdapterBank
from pyrolora.columns import Batch
from pyrolora.guides import Program
from pyrolora.inference.elbo import NamedELBO
from pyrolora.model import JointGuide
from pyrolora.parameters import param_statement

LEAST = 4  # timed steps, however long they take
# Of the networks whose sites, KL and factors are timed alone. With a narrow network there is next
# to nothing to compute, and what remains is the price of the program itself.
DEPTHS = (6, 24)
PYRO_ROUNDS = 50
NARROW = {"hidden_size": 24, "intermediate_size": 24}


# Whole steps ------------------------------------------------------------------------------------


def steps_of(case: Case, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The times of every contestant's steps on one network."""
    network = case.shape.network(device)
    data = case.shape.batches(args.warmup + 1 + args.steps, device)
    contestants = {name: CONTESTANTS[name](case, network) for name in args.contestants}
    if args.compile is not None:
        compiled = {f"{name}, compiled": CONTESTANTS[name](case, network) for name in contestants}
        for contestant in compiled.values():
            transformer(contestant.module).compile(backend=args.compile)
        contestants |= compiled
    check_same_start(contestants, data[0], case.shape)
    counts = dict.fromkeys(contestants, 0)

    def next_step(name: str) -> None:
        contestants[name].step(data[counts[name]])
        counts[name] += 1

    actions = {name: lambda name=name: next_step(name) for name in contestants}
    first = take_turns(actions, 1, args.warmup, device, f"{case.name}, first steps")
    round_s = sum(sum(values) for values in first.values()) / 1e3
    rounds = min(args.steps, max(LEAST, int(60 * args.minutes / round_s)))
    times = take_turns(actions, rounds, 0, device, case.name)
    steps = time_table(times, (LORA, BASE))
    if args.compile is not None:
        ratios = [to_plain(times, name) for name in steps["contestant"]]
        steps["to the same, plain"] = ratios
    return {
        **case.describe(),
        "adapters": len(adapted_layers(case)),
        "network": describe_network(network),
        "steps": steps.to_dict("records"),
        "milliseconds": times,
    }


def narrow(case_name: str, blocks: int) -> str:
    """Return the case of the same kind and adapters with a narrow network."""
    shape, slash, targets = case_name.partition("/")
    return narrowed(shape, blocks) + slash + targets


def to_plain(times: dict[str, list[float]], name: str) -> float:
    """Return the median over rounds of a contestant's time to that of its plain network."""
    plain = times[name.removesuffix(", compiled")]
    return (torch.tensor(times[name]) / torch.tensor(plain)).median().item()


# Pyro's own share -------------------------------------------------------------------------------


class Network(torch.autograd.Function):
    """In place of a network: takes all factors, and sends ``gradients`` back."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *factors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=factors[0].device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


class BeforeNetwork(nn.Module):
    """The joint model up to the point where the network would be called."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.head = nn.Linear(1, 1)
        self.reached: Tensor
        self.gradients: list[Tensor] = []

    def forward(self, batch: Batch | None, kl_weight: float) -> None:
        factors = self.program.model(kl_weight)
        for name, parameter in self.head.named_parameters():
            param_statement(f"heads.{name}", parameter)
        layers = self.program.bank.layer_factors(factors, torch.float32)
        matrices = [matrix for own in layers.values() for matrix in (own.A, own.sB)]
        self.gradients = self.gradients or [torch.ones_like(matrix) for matrix in matrices]
        self.reached = Network.apply(self.gradients, *matrices)


def pyro_action(program: Program, beta: float) -> Callable[[], object]:
    """Sites, KL and factors of one step, with their backward pass."""
    model = BeforeNetwork(program)
    elbo = NamedELBO()(model, JointGuide(program))

    def action() -> None:
        (elbo(None, kl_weight=beta) + model.reached).backward()
        program.zero_grad()

    return action


def pyro_share(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Milliseconds of everything in a step but the network, for networks of several depths, of
    their own width and narrow."""
    case = Case("minilm", args.rank)
    actions, rows = {}, []
    for width, changes in {"full": {}, "narrow": NARROW}.items():
        for depth in DEPTHS:
            specs = adapted_layers(case, num_hidden_layers=depth, **changes)
            for name, guide in GUIDES.items():
                program = guide.build(AdapterBank(specs, case.adapter)).to(device)
                entries = program.bank.layouts["A"].total
                rows.append({"guide": name, "adapters": len(specs), "entries_of_A": entries})
                key = f"{name}, {width}, {depth} layers"
                actions[key] = pyro_action(program, guide.beta(NUM_EXAMPLES))
    times = take_turns(actions, PYRO_ROUNDS, args.warmup, device, "Pyro alone")
    for row, values in zip(rows, times.values(), strict=True):
        row["ms"] = torch.tensor(values).median().item()
    return rows


# The job ----------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(
        __doc__, "python benchmarks/step_time.py --cases roberta-base minilm/all-linear"
    )
    parser.add_argument("--steps", type=positive, default=30, help="timed steps of each contestant")
    parser.add_argument(
        "--minutes", type=float, default=5, help="fewer steps of a case that would take longer"
    )
    parser.add_argument("--warmup", type=int, default=1, help="steps before, not timed")
    parser.add_argument(
        "--compile",
        metavar="BACKEND",
        help="every contestant takes part once more, compiled by this backend, such as inductor",
    )
    parser.add_argument(
        "--narrow",
        type=positive,
        metavar="BLOCKS",
        help="networks of the cases' kinds, but narrow and of so many blocks: the host's time",
    )
    return parser.parse_args(argv)


def table(runs: list[dict[str, Any]], share: list[dict[str, Any]]) -> str:
    """The results in Markdown: milliseconds and ratios to PEFT LoRA by case; Pyro's share."""
    parts = ["# A training step\n"]
    for run in runs:
        parts.append(f"## {title(run)}, {run['adapters']} adapters\n")
        parts.append(markdown(pd.DataFrame(run["steps"])))
    parts.append("## Everything in a step but the network\n")
    parts.append(markdown(pd.DataFrame(share)))
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = pick_device(args.device)
    share = pyro_share(args, device)
    show(pd.DataFrame(share))
    name = f"step_time-{tag(device)}{'' if args.compile is None else f'-{args.compile}'}"
    cases = args.cases or case_names(device)
    if args.narrow is not None:
        cases = [narrow(name, args.narrow) for name in cases]
    for case_name in cases:
        run = steps_of(Case(case_name, args.rank), args, device)
        show(pd.DataFrame(run["steps"]))
        runs = with_earlier(args.out / f"{name}.json", [run])
        save_json(  # after each case: nothing is lost if a later one fails
            args.out / f"{name}.json",
            {
                **provenance(args),
                "pyro": share,
                "runs": runs,
            },
        )
        (args.out / f"{name}.md").write_text(table(runs, share))


if __name__ == "__main__":
    main()

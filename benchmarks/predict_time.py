"""What an ensemble of draws costs at prediction, against as many passes of the plain network.

A few short texts, 16 draws of MonteCLoRA: the draws ride in one pass where they fit. In turns:
`Posterior.predict`, everything counted from the lists of tokens to the probabilities; the same
draws one pass each; and the plain network, called as often on a batch that is ready.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from common import (
    RESULTS,
    markdown,
    pick_device,
    positive,
    provenance,
    save_json,
    show,
    tag,
    take_turns,
    time_table,
)
from contestants import NUM_EXAMPLES
from networks import Case, case, twin

from pyrolora import Posterior
from pyrolora.adapters import attach
from pyrolora.guides import MonteCLoRA
from pyrolora.model import build, evaluating
from pyrolora.predictive import draw_factors
from pyrolora.tasks import task_for

CASES = ["minilm", "minilm/all-linear", "roberta-base", "roberta-base/all-linear"]


def times_of(case: Case, args: argparse.Namespace, device: torch.device) -> pd.DataFrame:
    network = case.shape.network(device).eval()
    model, guide = twin(network).eval(), MonteCLoRA()
    attachment = attach(model, case.adapter)
    joint = build(model, attachment, case.adapter, guide, task_for(model), NUM_EXAMPLES)
    joint.to(device)
    posterior = Posterior(joint, guide)
    vocabulary = network.config.vocab_size
    ids = torch.randint(vocabulary // 10, vocabulary, (args.batch, args.length))
    rows = [{"input_ids": row, "attention_mask": [1] * args.length} for row in ids.tolist()]
    batch = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids, device=device)}
    factors = draw_factors(joint, args.draws, seed=0)

    def predict() -> None:
        posterior.predict(rows, args.draws)

    @torch.no_grad()
    def one_by_one() -> None:
        with evaluating(joint):
            for draw in range(args.draws):
                joint.network(batch, factors[draw])

    @torch.no_grad()
    def plain() -> None:
        for _ in range(args.draws):
            network(**batch)

    actions = {"plain network": plain, "predict": predict, "one pass a draw": one_by_one}
    times = take_turns(actions, args.rounds, 2, device, case.name)
    frame = time_table(times, ("plain network",))
    frame.insert(1, "case", case.name)
    return frame


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--cases", type=case, nargs="+", metavar="CASE", default=CASES, help="see networks.py"
    )
    parser.add_argument("--rank", type=positive, default=8, help="rank r; lora_alpha is 2 r")
    parser.add_argument("--draws", type=positive, default=16)
    parser.add_argument("--batch", type=positive, default=8, help="texts")
    parser.add_argument("--length", type=positive, default=16, help="tokens of a text")
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto: the accelerator")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = pick_device(args.device)
    frames: list[pd.DataFrame] = []
    for name in args.cases:
        frames.append(times_of(Case(name, args.rank), args, device))
        show(frames[-1])
    whole = pd.concat(frames, ignore_index=True)
    payload = {**provenance(args), "times": whole.to_dict("records")}
    save_json(args.out / f"predict_time-{tag(device)}.json", payload)
    title = f"# {args.draws} draws for {args.batch} texts of {args.length} tokens\n\n"
    (args.out / f"predict_time-{tag(device)}.md").write_text(title + markdown(whole))


if __name__ == "__main__":
    main()

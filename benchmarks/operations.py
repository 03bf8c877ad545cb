"""How many kernels a training step starts: pyrolora's guides beside PEFT and the bare network.

On a GPU each kernel costs the host some ten microseconds to start, whatever its size: with adapters
on many small layers, their number is the price. They are counted on the CPU, for a decoder of many
narrow layers, as operators of torch that compute (views and allocations do not).
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import RESULTS, markdown, positive, provenance, save_json, show
from contestants import BASE, CONTESTANTS, LORA
from networks import Case, narrowed
from torch.utils._python_dispatch import TorchDispatchMode

FREE = (
    "empty",
    "new_empty",
    "detach",
    "alias",
    "_unsafe_view",
    "set_",
    "resize_",
    "lift_fresh",
    "promote_types",
)


class Kernels(TorchDispatchMode):
    """Counts the operators that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(FREE):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count(contestant: Any, batches: list[Any]) -> Counter[str]:
    """The kernels of a step, after one in which everything that is made once was made."""
    contestant.step(batches[0])
    with Kernels() as kernels:
        contestant.step(batches[1])
    return kernels.counts


def table(layers: int, rank: int, names: list[str]) -> pd.DataFrame:
    """Kernels by contestant, for adapters on query, key and value and on all linear layers."""
    name = narrowed("llama-12", layers)
    rows = []
    for case in (Case(name, rank), Case(f"{name}/all-linear", rank)):
        network = case.shape.network("cpu")
        batches = case.shape.batches(2, torch.device("cpu"))
        for name in names:
            found = count(CONTESTANTS[name](case, network), batches)
            rows.append(
                {
                    "adapters on": "all linear layers" if "/" in case.name else "query, key, value",
                    "contestant": name,
                    "kernels": found.total(),
                    "most": ", ".join(f"{n} {k}" for n, k in found.most_common(4)),
                }
            )
    frame = pd.DataFrame(rows)
    lora = frame[frame.contestant == LORA].set_index("adapters on")["kernels"]
    if len(lora):
        frame.insert(3, f"to {LORA}", frame["kernels"] / frame["adapters on"].map(lora))
    return frame


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", type=positive, default=32, help="blocks of the decoder")
    parser.add_argument("--rank", type=positive, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=list(CONTESTANTS),
        metavar="NAME",
        default=[BASE, LORA, *(f"pyrolora {n}" for n in ("map", "montec", "meanfield", "flat"))],
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.manual_seed(0)
    frame = table(args.layers, args.rank, args.contestants)
    show(frame)
    payload = {**provenance(args), "kernels": frame.to_dict("records")}
    save_json(args.out / "operations.json", payload)
    title = f"# Kernels of a training step, {args.layers} blocks\n\n"
    (args.out / "operations.md").write_text(title + markdown(frame))


if __name__ == "__main__":
    main()

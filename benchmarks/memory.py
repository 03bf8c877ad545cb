"""How much memory a training step takes: pyrolora's guides beside PEFT and the bare network.

Each contestant makes two steps alone; the peak of the second, when the optimiser has its state,
counts everything that is alive: the network's weights, the adapters, their optimiser, activations
and gradients.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pandas as pd
import torch
from common import (
    describe_network,
    markdown,
    pick_device,
    provenance,
    save_json,
    show,
    tag,
    with_earlier,
)
from contestants import CONTESTANTS, LORA, argument_parser
from networks import Case, case_names, title
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

STEPS = 2
OURS = "pyrolora map"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make while it is on, and their peak.
    Scratch memory inside of a kernel is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf.untyped_storage())
        return result

    def add(self, storage: Any) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.release, storage.nbytes())

    def release(self, size: int) -> None:
        self.now -= size


def weight_bytes(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


def peak_of(name: str, case: Case, network: Any, device: torch.device) -> int:
    """Bytes at the peak of the last step, the network's weights among them."""
    data = case.shape.batches(STEPS, device)
    if device.type == "cpu":
        with LiveBytes() as live:
            contestant = CONTESTANTS[name](case, network)
            for batch in data:
                live.peak = live.now
                contestant.step(batch)
        return live.peak + weight_bytes(network)
    contestant = CONTESTANTS[name](case, network)
    for batch in data:
        torch.accelerator.reset_peak_memory_stats(device)
        contestant.step(batch)
    return int(torch.accelerator.max_memory_allocated(device))


def peaks(case: Case, names: list[str], device: torch.device) -> dict[str, Any]:
    network = case.shape.network(device)
    rows: list[dict[str, Any]] = []
    for name in tqdm(names, desc=case.name):
        found = peak_of(name, case, network, device)
        gc.collect()
        rows.append({"contestant": name, "peak_mb": found / 1e6})
    frame = pd.DataFrame(rows).set_index("contestant")
    for reference in (LORA, OURS):
        if reference in frame.index:
            frame[f"to {reference}"] = frame["peak_mb"] / frame["peak_mb"][reference]
    return {
        **case.describe(),
        "network": describe_network(network),
        "weights_mb": weight_bytes(network) / 1e6,
        "peaks": frame.reset_index().to_dict("records"),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    parts = ["# The peak of memory in a training step\n"]
    for run in runs:
        parts.append(f"## {title(run)}, weights {run['weights_mb']:.0f} MB\n")
        parts.append(markdown(pd.DataFrame(run["peaks"])))
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    example = "python benchmarks/memory.py --cases minilm roberta-base/all-linear"
    args = argument_parser(__doc__, example).parse_args(argv)
    device = pick_device(args.device)
    name = f"memory-{tag(device)}"
    for case_name in args.cases or case_names(device):
        run = peaks(Case(case_name, args.rank), args.contestants, device)
        show(pd.DataFrame(run["peaks"]), digits=3)
        runs = with_earlier(args.out / f"{name}.json", [run])
        save_json(
            args.out / f"{name}.json",
            {
                **provenance(args),
                "runs": runs,
            },
        )
        (args.out / f"{name}.md").write_text(table(runs))


if __name__ == "__main__":
    main()

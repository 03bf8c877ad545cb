"""The demo's task over several seeds: LoRA and its posterior, and what pretraining is worth.

Each row is one fit, as `pyrolora demo` makes it: `map` and `montec` on the embedded encoder, and
`map` on the same network with random weights. Means and standard deviations over seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from common import (
    RESULTS,
    describe_network,
    hardware,
    markdown,
    positive,
    quiet_loading,
    save_json,
    versions,
)
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, set_seed

from pyrolora import defaults, zoo
from pyrolora.demo import run_guide, sentences

CONTESTANTS = (("map", "pretrained"), ("montec", "pretrained"), ("map", "random"))
Row = dict[str, Any]


def random_weights(folder: Path) -> Path:
    """The embedded encoder as it was before its pretraining: same shape, same tokenizer."""
    set_seed(0)
    network = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(zoo.folder("encoder")))
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(zoo.folder("encoder")).save_pretrained(folder)
    return folder


def table(rows: list[Row]) -> pd.DataFrame:
    """Means over seeds, and in brackets the standard deviation."""
    frame = pd.DataFrame(rows).drop(columns=["seed"])
    groups = frame.groupby(["guide", "weights"], sort=False)
    text = {}
    for name in frame.columns.drop(["guide", "weights"]):
        mean, spread = groups[name].mean(), groups[name].std(ddof=1)
        text[name] = [
            "" if pd.isna(m) else f"{m:.3f} ({s:.3f})" for m, s in zip(mean, spread, strict=True)
        ]
    return pd.DataFrame(text, index=groups.size().index).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=defaults.DEMO_EPOCHS)
    parser.add_argument("--learning-rate", type=float, default=defaults.DEMO_LEARNING_RATE)
    parser.add_argument("--train", type=positive, default=defaults.DEMO_TRAIN)
    parser.add_argument("--name", default="demo_task", help="of the files that are written")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    data = sentences(train=args.train)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, quiet_loading():
        models = {"pretrained": zoo.folder("encoder"), "random": random_weights(Path(folder))}
        for seed in args.seeds:
            for guide, weights in CONTESTANTS:
                one = run_guide(
                    guide,
                    data,
                    model=models[weights],
                    epochs=args.epochs,
                    learning_rate=args.learning_rate,
                    seed=seed,
                )
                scores = {
                    name: value
                    for name, value in one.scores.items()
                    if not name.endswith("seconds")
                }
                rows.append({"seed": seed, "guide": guide, "weights": weights, **scores})
                print(rows[-1], flush=True)
        network = AutoModelForMaskedLM.from_pretrained(models["pretrained"])
    text = markdown(table(rows))
    print(text)
    sizes = {split: len(part) for split, part in data.items()}
    save_json(
        args.output / f"{args.name}.json",
        {
            "rows": rows,
            "data": sizes,
            "epochs": args.epochs,
            "learning_rate": args.learning_rate,
            "num_samples": defaults.DEMO_SAMPLES,
            "network": describe_network(network),
            "versions": versions(),
            "hardware": hardware(),
        },
    )
    (args.output / f"{args.name}.md").write_text(text)


if __name__ == "__main__":
    main()

"""What a whole fit costs, from the start of Python to the saved adapter; and what an import costs.

The demo's sentences on the embedded encoder, or on the model of ``--model``: PEFT's LoRA with
transformers' Trainer against `pyrolora.fit`, the same targets, rank, steps, batches and optimiser,
each in a process of its own. They take turns; every process counts from its start to its end.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TARGETS = ["query", "key", "value"]
RANK = 8
LORA = "PEFT LoRA + Trainer"
IMPORTS = {
    "torch, pyro": "import torch, pyro",
    "torch, pyro, pyrolora": "import torch, pyro, pyrolora",
    "transformers' Trainer": "import torch, pyro\nfrom transformers import Trainer",
    "pyrolora.fit": "import torch, pyro\nfrom pyrolora import fit",
}


# What runs in a process of its own ----------------------------------------------------------------


def fit_peft(folder: str, data: Any, args: Any, out: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        set_seed,
    )

    set_seed(args.seed)
    classes = data.features["label"].num_classes
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
    config = LoraConfig(
        task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, lora_dropout=0.0
    )
    model = get_peft_model(network, config)
    tokens = data.map(
        lambda rows: tokenizer(rows["text"], truncation=True),
        batched=True,
        remove_columns=["text"],
    )
    collate = DataCollatorWithPadding(tokenizer)
    Trainer(model, args, train_dataset=tokens, data_collator=collate).train()
    model.save_pretrained(out)


def fit_pyrolora(guide: str, folder: str, data: Any, args: Any, out: str) -> None:
    import pyrolora

    adapter = pyrolora.AdapterConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    pyrolora.fit(folder, data, guide, adapter=adapter, training=args).save(out)


FITS = {
    LORA: fit_peft,
    "pyrolora map": lambda *given: fit_pyrolora("map", *given),
    "pyrolora montec": lambda *given: fit_pyrolora("montec", *given),
}


def work(name: str, folder: str, data: str, steps: int, batch: int) -> None:
    """One fit."""
    import datasets
    from transformers import TrainingArguments

    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(
            output_dir=out,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=1e-3,
            logging_steps=0.05,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
            dataloader_pin_memory=False,
        )
        FITS[name](folder, datasets.load_from_disk(data), args, f"{out}/adapter")


# The parent -------------------------------------------------------------------------------------


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="folder of a transformers encoder; left out: the embedded")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--work", nargs=3, metavar=("NAME", "FOLDER", "DATA"), help="one fit")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.work:
        work(*args.work, steps=args.steps, batch=args.batch)
        return
    import pandas as pd
    from common import hardware, markdown, pick_device, save_json, show, tag, versions
    from tqdm.auto import tqdm

    from pyrolora import zoo
    from pyrolora.demo import sentences

    folder = str(args.model or zoo.folder("encoder"))
    with tempfile.TemporaryDirectory() as scratch:
        sentences(train=120, test=1)["train"].save_to_disk(scratch)
        options = ["--steps", str(args.steps), "--batch", str(args.batch)]
        commands = {
            name: [sys.executable, __file__, *options, "--work", name, folder, scratch]
            for name in FITS
        }
        commands |= {f"import {n}": [sys.executable, "-c", code] for n, code in IMPORTS.items()}
        times: dict[str, list[float]] = {name: [] for name in commands}
        for turn in tqdm(range(args.rounds), desc="rounds"):
            names = list(commands)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[name].append(seconds(commands[name]))
    rows = [
        {
            "what": name,
            "least_s": min(values),
            "median_s": statistics.median(values),
            "most_s": max(values),
            f"to {LORA}": statistics.median(
                value / other for value, other in zip(values, times[LORA], strict=True)
            )
            if name in FITS
            else float("nan"),
        }
        for name, values in times.items()
    ]
    frame = pd.DataFrame(rows)
    show(frame)
    name = f"fit_time-{tag(pick_device('auto'))}"
    payload = {
        "arguments": {"steps": args.steps, "batch": args.batch, "rounds": args.rounds},
        "versions": versions(),
        "hardware": hardware(),
        "seconds": times,
    }
    save_json(args.out / f"{name}.json", payload)
    title = f"# A fit of {args.steps} steps, and an import, each a process\n\n"
    (args.out / f"{name}.md").write_text(title + markdown(frame).replace("nan", ""))


if __name__ == "__main__":
    main()

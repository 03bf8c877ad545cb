"""Everything that a GPU can tell about pyrolora, in one run of a few minutes.

Its parts run in this order, and each is saved as it ends, so that a run which is cut off has lost
the last one alone; a part that fails is recorded with its error, and the next one runs.

- conformance: every guide fits, predicts, saves and loads on the device, in float32 and bfloat16;
- agreement: one setting of the factors, and a fit without noise, on the CPU and on the device;
- steps: time, peak memory and waits of a training step, plain, with gradient checkpointing, and
  compiled, for the bare network, PEFT and pyrolora's guides;
- predict: 16 draws against 16 passes of the plain network;
- generate: a decoder writes with several draws, with one, and plain.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import predict_time
import torch
from common import (
    RESULTS,
    pick_device,
    positive,
    provenance,
    save_json,
    short_training,
    show,
    tag,
    take_turns,
    time_table,
)
from contestants import (
    BASE,
    CONTESTANTS,
    LORA,
    NUM_EXAMPLES,
    PEFT_MONTEC,
    Contestant,
    transformer,
)
from networks import Case, case, twin
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    set_seed,
)

import pyrolora
from pyrolora import AdapterConfig, guides
from pyrolora.adapters import attach
from pyrolora.guides import NUTS, SWAG, Ensemble, MonteCLoRA
from pyrolora.model import JointModel, build, evaluating
from pyrolora.predictive import draw_factors
from pyrolora.tasks import task_for

Row = dict[str, Any]
GUIDES: dict[str, guides.Guide] = {
    **{name: guides.as_guide(name) for name in guides.available()},
    "nuts": NUTS(num_samples=4, warmup_steps=2, max_tree_depth=2),
    "swag": SWAG(snapshots=2, rank=2),
    "ensemble": Ensemble(members=2),
    "members side by side": Ensemble(members=2, side_by_side=True),
    "scales by curvature": MonteCLoRA(scale_updates="curvature"),
}
STEPPING = [
    BASE,
    LORA,
    PEFT_MONTEC,
    *(f"pyrolora {name}" for name in ("map", "montec", "meanfield", "flat")),
]
MODES = ("plain", "checkpointing", "compiled")
GPU_CASES = ["roberta-base", "smollm2", "llama-7b", "llama-7b/all-linear"]
CPU_CASES = ["minilm"]
AFTER_STEPS = 0.2  # the share of the time that is kept for the parts after the steps
SHORTEST = 20.0  # seconds that a part of the steps needs at least: with less left it does not begin


@dataclass
class Run:
    """What the parts share."""

    args: argparse.Namespace
    device: torch.device
    end: float

    def left(self, for_others: float = 0.0) -> float:
        """Return the seconds that are left, without a share of the whole ``for_others``."""
        return self.end - time.monotonic() - for_others * 60 * self.args.minutes

    @property
    def cases(self) -> list[Case]:
        names = self.args.cases or (CPU_CASES if self.device.type == "cpu" else GPU_CASES)
        return [Case(name, self.args.rank) for name in names]


# Small networks: right or wrong -----------------------------------------------------------------


def classifier() -> BertForSequenceClassification:
    """A small classifier with random weights, without dropout."""
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60}
    config = BertConfig(**sizes, num_attention_heads=2, hidden_dropout_prob=0.0)
    config.attention_probs_dropout_prob = 0.0
    return BertForSequenceClassification(config).eval()


def examples(count: int) -> datasets.Dataset:
    """Tokens with a label that depends on the first of them."""
    ids = torch.randint(4, 60, (count, 8), generator=torch.Generator().manual_seed(count))
    labels = (ids[:, 0] > 30).long()
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    return datasets.Dataset.from_dict({**rows, "labels": labels.tolist()})


def fitted(guide: guides.Guide, device: torch.device, **options: Any) -> pyrolora.Posterior:
    """A short fit on the device."""
    with tempfile.TemporaryDirectory() as folder:
        args = short_training(
            folder,
            device,
            max_steps=6,
            per_device_train_batch_size=8,
            logging_steps=6,
            seed=1,
            **options,
        )
        adapter = AdapterConfig(r=2) if guide.adapts else None
        return pyrolora.fit(classifier(), examples(32), guide, training=args, adapter=adapter)


def conformance(run: Run) -> Iterator[Row]:
    """Fit, predict, save and load every guide; with the error where it does not."""
    test = examples(12)
    for dtype in ("float32", "bfloat16"):
        for name, guide in GUIDES.items():
            start = time.monotonic()
            row: Row = {"guide": name, "dtype": dtype}
            try:
                posterior = fitted(guide, run.device, bf16=dtype == "bfloat16")
                state = posterior.model.own_state()
                apart = [n for n, t in state.items() if t.device.type != run.device.type]
                broken = [n for n, t in state.items() if not t.isfinite().all()]
                assert not apart, f"not on the device: {apart}"
                assert not broken, f"not finite: {broken}"
                nll = posterior.evaluate(test, 3, seed=0)["nll"]
                with tempfile.TemporaryDirectory() as folder:
                    posterior.save(Path(folder) / "saved")
                    again = pyrolora.load(Path(folder) / "saved", classifier().to(run.device))
                row["nll"], row["nll_loaded"] = nll, again.evaluate(test, 3, seed=0)["nll"]
                assert abs(nll - row["nll_loaded"]) < 1e-3, "the loaded posterior predicts another"
                row["outcome"] = "ok"
            except Exception as error:
                row["outcome"] = f"{type(error).__name__}: {error}"
            yield {**row, "seconds": time.monotonic() - start}


def agreement(run: Run) -> Iterator[Row]:
    """The largest difference of outputs between the CPU and the device, per guide."""
    cpu, batch = torch.device("cpu"), dict(examples(12).with_format("torch")[:12])
    del batch["labels"]
    for name, guide in GUIDES.items():
        try:
            joint = fitted(guide, cpu).model.eval()
        except Exception as error:
            yield {"guide": name, "outcome": f"{type(error).__name__}: {error}"}
            continue
        factors = draw_factors(joint, 2, seed=0)
        outputs = []
        for device in (cpu, run.device):
            joint.to(device)
            moved = {key: value.to(device) for key, value in batch.items()}
            with evaluating(joint), torch.no_grad():
                outputs.append(joint.network(moved, on(device, factors)).cpu())
        difference = float((outputs[0] - outputs[1]).abs().max())
        scale = float(outputs[0].abs().max())
        outcome = "ok" if difference <= 1e-4 * max(scale, 1) else "differs"
        yield {"guide": name, "difference": difference, "largest": scale, "outcome": outcome}
    losses = [loss_after_a_fit(device) for device in (cpu, run.device)]
    same = abs(losses[0] - losses[1]) <= 1e-3 * abs(losses[0])
    yield {
        "guide": "map, after six steps",
        "difference": abs(losses[0] - losses[1]),
        "largest": losses[0],
        "outcome": "ok" if same else "differs",
    }


def on(device: torch.device, factors: Any) -> Any:
    """The factors on the device; numbers of members and seeds of noise stay on the host."""
    return type(factors)(
        **{**vars(factors), "A": factors.A.to(device), "B": factors.B.to(device)},
    )


def loss_after_a_fit(device: torch.device) -> float:
    """The NLL of a fit without noise, whose steps are the same on every device."""
    return fitted(guides.as_guide("map"), device).evaluate(examples(12), seed=0)["nll"]


# Networks of known shapes: time and memory ------------------------------------------------------


def steps(run: Run) -> Iterator[Row]:
    """Milliseconds, peak of memory and waits of a step, for each case and mode in turns."""
    for one in run.cases:
        network = one.shape.network(run.device)
        for mode in MODES:
            if run.left(AFTER_STEPS) < SHORTEST:
                yield {"case": one.name, "mode": mode, "outcome": "no time was left"}
                continue
            try:
                yield from in_mode(run, one, network, mode)
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"
                yield {"case": one.name, "mode": mode, "outcome": outcome}
        del network
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def in_mode(run: Run, one: Case, network: Any, mode: str) -> Iterator[Row]:
    names = [n for n in STEPPING if mode == "plain" or n != PEFT_MONTEC]  # it cannot recompute
    made = {name: changed(CONTESTANTS[name](one, network), mode) for name in names}
    batch = one.shape.batches(1, run.device)[0]
    actions = {name: lambda c=c: c.step(batch) for name, c in made.items()}
    start = time.monotonic()
    take_turns(actions, 1, 1 if mode == "plain" else 2, run.device, f"{one.name}, {mode}")
    each = (time.monotonic() - start) / 2
    rounds = min(run.args.steps, max(2, int(min(run.left(AFTER_STEPS) / 4, 30) / max(each, 1e-3))))
    times = take_turns(actions, rounds, 0, run.device, f"{one.name}, {mode}")
    for row in time_table(times, (LORA, BASE)).to_dict("records"):
        contestant = made[row["contestant"]]
        yield {
            **one.describe(),
            "mode": mode,
            **row,
            "waits": waits(contestant, batch, run.device),
            "peak_mb": peak(contestant, batch, run.device),
            "outcome": "ok",
        }


def changed(contestant: Contestant, mode: str) -> Contestant:
    """The contestant, with its network recomputed in the backward pass, or compiled."""
    module = contestant.module
    if mode == "checkpointing":
        joint = [part for part in module.modules() if isinstance(part, JointModel)]
        network: Any = joint[0] if joint else transformer(module)
        network.gradient_checkpointing_enable({"use_reentrant": False})
    elif mode == "compiled":
        transformer(module).compile()
    return contestant


def waits(contestant: Contestant, batch: Any, device: torch.device) -> int | None:
    """How often a step waits for a CUDA device; None on others."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            contestant.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def peak(contestant: Contestant, batch: Any, device: torch.device) -> float | None:
    """The peak of memory in a step, MB, beside what lives; None where the device does not tell."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    contestant.step(batch)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def predict(run: Run) -> Iterator[Row]:
    """16 draws for a batch against 16 passes of the plain network."""
    options = ["--draws", "16", "--rounds", "5"]
    for one in run.cases:
        if not one.shape.causal:
            args = predict_time.parse([*options, "--rank", str(run.args.rank)])
            yield from predict_time.times_of(one, args, run.device).to_dict("records")


@torch.no_grad()
def generate(run: Run) -> Iterator[Row]:
    """Seconds and tokens per second of texts: plain, with one draw, with several."""
    for one in (c for c in run.cases if c.shape.causal and not c.name.endswith("all-linear")):
        if run.left() < SHORTEST:
            yield {"case": one.name, "outcome": "no time was left"}
            continue
        network = one.shape.network(run.device).eval()
        model, guide = twin(network), MonteCLoRA()
        attachment = attach(model, one.adapter)
        joint = build(model, attachment, one.adapter, guide, task_for(model), NUM_EXAMPLES)
        posterior = pyrolora.Posterior(joint.to(run.device), guide)
        prompt = one.shape.batches(1, run.device)[0]["input_ids"][:, :16]
        new = run.args.tokens
        mask = torch.ones_like(prompt)
        fixed: Row = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}

        def plain(network=network, prompt=prompt, mask=mask, fixed=fixed) -> None:
            network.generate(prompt, attention_mask=mask, use_cache=True, **fixed)

        def drawn(count: int, posterior=posterior, prompt=prompt, fixed=fixed) -> None:
            posterior.generate(prompt.tolist(), count, seed=0, **fixed)

        actions: dict[str, Callable[[], object]] = {
            "plain": plain,
            "1 draw": lambda: drawn(1),
            "8 draws": lambda: drawn(8),
        }
        for name, values in take_turns(actions, 2, 1, run.device, one.name).items():
            seconds = min(values) / 1e3
            texts = len(prompt) * (8 if name == "8 draws" else 1)
            rate = texts * new / seconds
            yield {"case": one.name, "how": name, "seconds": seconds, "tokens_per_second": rate}


# The job ----------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Run], Iterator[Row]]] = {
    "conformance": conformance,
    "agreement": agreement,
    "steps": steps,
    "predict": predict,
    "generate": generate,
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: python benchmarks/gpu.py --minutes 8 --out results",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=8, help="for all parts; default 8")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--cases", type=case, nargs="+", help="networks, see networks.py")
    parser.add_argument("--rank", type=positive, default=8, help="rank r; lora_alpha is 2 r")
    parser.add_argument("--steps", type=positive, default=10, help="timed steps, at most")
    parser.add_argument("--tokens", type=positive, default=32, help="tokens of a text")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto: the accelerator")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the parts; the exit status is 1 if one failed or a number was wrong."""
    args = parse(argv)
    device = pick_device(args.device)
    run = Run(args, device, time.monotonic() + 60 * args.minutes)
    wrong = False
    for name in args.parts:
        start, rows = time.monotonic(), []
        failure = None if run.left() > 0 else "no time was left"
        try:
            for row in PARTS[name](run) if failure is None else ():
                rows.append(row)
        except Exception:
            failure = traceback.format_exc()
        path = args.out / f"gpu-{name}-{tag(device)}.json"
        seconds = time.monotonic() - start
        payload = {**provenance(args), "seconds": seconds, "failure": failure, "rows": rows}
        save_json(path, payload)
        if rows:
            show(pd.DataFrame(rows), digits=3)
        if failure:
            print(f"{name}: {failure}")
        unwanted = [r for r in rows if r.get("outcome", "ok") not in ("ok", "no time was left")]
        wrong |= failure is not None or bool(unwanted)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())

"""Fit every guide with extreme numbers, and count how each fit ends.

    python benchmarks/extremes.py
    python benchmarks/extremes.py --only "NaN" --guides montec,laplace
    python benchmarks/extremes.py --every 13        # a thirteenth of it, of all guides and extremes

A fit may end in two ways: every tensor of the posterior and every prediction is finite; or an error
of ours states what was wrong, and leaves the network as it was, or a posterior of the last good
state that predicts finite numbers. Two others are failures, are printed, and make the exit status
1: an error that is not ours (``raw``), and numbers that are not finite, or a changed network,
without a word (``silent``).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from fuzz import quiet, tokenizer
from torch import nn

import pyrolora
from pyrolora import AdapterConfig, Posterior, guides
from pyrolora.checks import literals
from pyrolora.errors import NonFiniteError, PyroLoraError
from pyrolora.guides import Guide

FINITE, STATED, RAW, SILENT = "finite", "stated error", "raw", "silent"
OUTCOMES = (FINITE, STATED, RAW, SILENT)
SHORT_CHAINS = {"chains": 1, "num_samples": 4, "warmup_steps": 2, "max_tree_depth": 2}
GUIDES: dict[str, Guide] = {
    **{name: guides.as_guide(name) for name in guides.available() if name not in ("flat", "nuts")},
    "nuts": guides.NUTS(**SHORT_CHAINS),
    "nuts on montec": guides.NUTS(inner=guides.MonteCLoRA(), **SHORT_CHAINS),
    "montec, all latent": guides.MonteCLoRA(
        component_prior="hierarchical",
        covariance="full",
        latent="AB",
        learn_sample_scale=True,
        kl_weight=1.0,
        prior_mean="zero",
    ),
    "montec by curvature": guides.MonteCLoRA(scale_updates="curvature"),
    "meanfield by curvature": guides.MeanField(scale_updates="curvature", latent="AB"),
    "full laplace": guides.Laplace(curvature="full", num_draws=3),
    "map with a prior": guides.MAP(prior_scale=1.0),
    "swag with a prior": guides.SWAG(prior_scale=1.0),
    "flat+montec": guides.Flat(inner=guides.MonteCLoRA()),
    "flat+ensemble": guides.Flat(inner=guides.Ensemble(members=2)),
}
WIDTH = 16


class Rows(torch.utils.data.Dataset[Any]):
    """A data set of a class of the user's own."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def encoder(labels: int = 2, **changes: Any) -> nn.Module:
    """A small BERT with fixed weights."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        vocab_size=16,
        num_labels=labels,
        **changes,
    )
    return transformers.BertForSequenceClassification(config).eval()


def plain(outputs: int = 3) -> nn.Module:
    """A network of features."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, outputs)).eval()


def texts(n: int = 8) -> list[dict[str, Any]]:
    words = ["a good film", "bad", "the book was not good", "very bad film"]
    return [{"text": words[i % 4], "label": i % 2} for i in range(n)]


def features(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, WIDTH, generator=generator), torch.arange(n) % 3


def targets(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, _ = features(n)
    return inputs, inputs.sum(-1) / 4


@dataclass(frozen=True)
class Fit:
    """The arguments of a fit, of which an extreme changes some."""

    network: Callable[[], nn.Module] = encoder
    data: Callable[[], Any] = texts
    adapter: dict[str, Any] = field(default_factory=lambda: {"r": 2})
    options: dict[str, Any] = field(default_factory=dict)
    test: Callable[[], Any] | None = None

    def arguments(self, guide: Guide) -> dict[str, Any]:
        """Return what `pyrolora.fit` is given beside the network and the guide."""
        words = {"tokenizer": tokenizer()} if self.network().__module__.startswith("trans") else {}
        adapter = {"adapter": AdapterConfig(**self.adapter)} if guide.adapts else {}
        steps = {"epochs": 2, "batch_size": 4, "seed": 0}
        return {**steps, **words, **adapter, **self.options}


def fits(rate: float) -> Fit:
    return Fit(options={"learning_rate": rate})


def of_features(
    data: Callable[[], Any],
    network: Callable[[], nn.Module] = plain,
    task: str = "classification",
    test: Callable[[], Any] | None = None,
    **options: Any,
) -> Fit:
    return Fit(network, data, options={"task": task, **options}, test=test)


def spoilt(value: float, part: str, network: Callable[[], nn.Module] = encoder) -> Fit:
    """The network with one weight of this value."""

    def made() -> nn.Module:
        it = network()
        with torch.no_grad():
            dict(it.named_parameters())[part].flatten()[0] = value
        return it

    return Fit(made)


def with_feature(value: float, n: int = 8, row: int = 3, form: str = "tensors") -> Fit:
    """Features of which one is this value."""

    def made() -> Any:
        inputs, labels = features(n)
        inputs[row, 0] = value
        own = [*zip(inputs, labels, strict=True)]
        rows = [{"inputs": x.tolist(), "labels": int(y)} for x, y in own]
        return {"tensors": (inputs, labels), "dicts": rows, "own class": Rows(own)}[form]

    steps = {} if n < 100 else {"epochs": 1, "batch_size": 256}
    return of_features(made, **steps, test=lambda: (features()[0],))


def with_target(value: float, row: int = 3) -> Fit:
    def made() -> Any:
        inputs, labels = targets()
        labels[row] = value
        return inputs, labels

    return of_features(made, lambda: plain(1), "regression")


def scaled(factor: float) -> Fit:
    """The network with all weights times this."""

    def made() -> nn.Module:
        it = encoder()
        with torch.no_grad():
            for weight in it.parameters():
                weight.mul_(factor)
        return it

    return Fit(made)


def cast(dtype: torch.dtype) -> Fit:
    return Fit(lambda: encoder().to(dtype))


def long_tokens() -> Any:
    return [{"input_ids": [3] * 50_000, "labels": i % 2} for i in range(2)]


LONG = "good film " * 25_000
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
EXTREMES: dict[str, Fit] = {
    **{f"learning rate {rate:g}": fits(rate) for rate in (1e-12, 1e-6, 1.0, 1e3, 1e38)},
    "one example": Fit(data=lambda: texts(1)),
    "one class": Fit(data=lambda: [{**row, "label": 0} for row in texts()]),
    "a batch larger than the data": Fit(options={"batch_size": 64}),
    "an empty text": Fit(data=lambda: [*texts(), {"text": "", "label": 0}]),
    "empty texts": Fit(data=lambda: [{"text": "", "label": i % 2} for i in range(4)]),
    "texts of 50,000 tokens": Fit(data=lambda: [{"text": LONG, "label": i % 2} for i in range(3)]),
    "rows of 50,000 tokens": Fit(data=long_tokens),
    "a float16 network": cast(torch.float16),
    "a bfloat16 network": cast(torch.bfloat16),
    "a float64 network": cast(torch.float64),
    "a float16 network at rate 1e3": replace(cast(torch.float16), options={"learning_rate": 1e3}),
    "rank 1": Fit(adapter={"r": 1}),
    "rank = width": Fit(adapter={"r": WIDTH}),
    "rank = 4 widths": Fit(adapter={"r": 4 * WIDTH}),
    "lora_alpha 1e-30": Fit(adapter={"r": 2, "lora_alpha": 1e-30}),
    "lora_alpha 1e30": Fit(adapter={"r": 2, "lora_alpha": 1e30}),
    "NaN in an adapted weight": spoilt(
        math.nan, "bert.encoder.layer.0.attention.self.query.weight"
    ),
    "infinity in an adapted weight": spoilt(math.inf, QUERY),
    "NaN in another weight": spoilt(math.nan, "bert.encoder.layer.0.output.dense.weight"),
    "NaN in the head": spoilt(math.nan, "classifier.weight"),
    "infinity in the head": spoilt(math.inf, "classifier.bias"),
    "NaN in features": with_feature(math.nan),
    "infinity in features": with_feature(math.inf),
    "features of 1e30": with_feature(1e30),
    "features of 3e38": with_feature(3e38),
    **{
        f"NaN in example 1,500 of {form}": with_feature(math.nan, 1600, 1500, form)
        for form in ("tensors", "dicts", "own class")
    },
    "NaN in targets": with_target(math.nan),
    "infinity in targets": with_target(math.inf),
    "targets of 1e30": with_target(1e30),
    "equal targets": of_features(
        lambda: (features()[0], torch.ones(8)), lambda: plain(1), "regression"
    ),
    "equal features": of_features(lambda: (torch.zeros(8, WIDTH), features()[1])),
    "features of 1e-40": of_features(lambda: (1e-40 * features()[0], features()[1])),
    "targets of 1e-30": of_features(
        lambda: (targets()[0], 1e-30 * targets()[1]), lambda: plain(1), "regression"
    ),
    "weights of 1e30": scaled(1e30),
    "weights of zero": scaled(0.0),
    "a dropout of 0.999999": Fit(adapter={"r": 2, "lora_dropout": 0.999999}),
    "an alpha_pattern of 1e30": Fit(adapter={"r": 2, "alpha_pattern": {"query": 1e30}}),
    **{
        f"{start} from NaN": replace(
            spoilt(math.nan, QUERY), adapter={"r": 2, "init_lora_weights": start}
        )
        for start in ("pissa", "olora", "lora-ga")
    },
    "pissa at lora_alpha 1e-30": Fit(
        adapter={"r": 2, "init_lora_weights": "pissa", "lora_alpha": 1e-30}
    ),
    "pissa at lora_alpha 1e30": Fit(
        adapter={"r": 2, "init_lora_weights": "pissa", "lora_alpha": 1e30}
    ),
    "1e-9 epochs": Fit(options={"epochs": 1e-9}),
    "evaluation data with infinity": of_features(
        features, eval_data=with_feature(math.inf).data(), test=lambda: (features()[0],)
    ),
}
NUMBERS = (1e-300, 1e-30, 1e-12, 1e-3, 0.999999, 1.0, 1e3, 1e6, 1e30, 1e300)
"""The values of each real option of a guide."""
WHOLE: dict[str, tuple[int, ...]] = {
    "num_components": (1, 256),
    "rank": (1, 64),
    "draws_per_batch": (1, 256),
    "members": (1,),
    "snapshots": (1, 2),
    "num_draws": (1,),
    "draws": (2,),
    "steps": (1,),
    "chains": (1,),
    "num_samples": (4,),
    "warmup_steps": (1,),
}
"""The values of its whole options, which otherwise cost as much as they say."""


def options_of(guide: Guide) -> Iterator[tuple[str, Callable[[], Guide]]]:
    """Yield each extreme of an option, by name, with what makes the guide of it."""
    inner = getattr(guide, "inner", None)
    for part in dataclasses.fields(guide):
        value = getattr(guide, part.name)
        real = "float" in str(part.type)
        values: Sequence[Any] = NUMBERS if real else WHOLE.get(part.name, ())
        if isinstance(value, bool) or literals(part.type):
            continue
        for number in values:
            yield f"{part.name}={number:g}", lambda n=part.name, v=number: replace(guide, **{n: v})
    if inner is not None:
        for name, make in options_of(inner):
            yield f"inner {name}", lambda make=make: replace(guide, inner=make())
    if isinstance(guide, guides.MonteCLoRA):
        for edge in (1.5, 1.5 + 1e-6, 2.0):  # where the KL of the hierarchical form becomes finite
            yield f"df_per_rank={edge:g} at rank 2", lambda v=edge: replace(guide, df_per_rank=v)


@dataclass(frozen=True)
class Case:
    """A guide, an extreme, and how to fit."""

    guide: str
    extreme: str
    make: Callable[[], Guide]
    fit: Fit


def cases() -> list[Case]:
    """Every guide with every extreme of a fit, and with those of its own options."""
    found = [
        Case(name, extreme, lambda guide=guide: guide, fit)
        for extreme, fit in EXTREMES.items()
        for name, guide in GUIDES.items()
    ]
    for name, guide in GUIDES.items():
        found += [Case(name, what, make, Fit()) for what, make in options_of(guide)]
    return found


def outcome(case: Case) -> tuple[str, str]:
    """Run a case; return how it ended, and the words of an error or of a failure."""
    network = case.fit.network()
    before = _fingerprint(network)
    posterior, words = None, ""
    try:
        guide = case.make()
        posterior = pyrolora.fit(network, case.fit.data(), guide, **case.fit.arguments(guide))
    except NonFiniteError as error:
        posterior, words = error.posterior, str(error)
    except PyroLoraError as error:
        words = str(error)
    except Exception as error:
        return RAW, _where(error)
    fault = None if posterior is None else _fault_of(posterior, case.fit)
    if fault is not None:
        return fault[0], f"{fault[1]}{' after ' + words if words else ''}"
    if posterior is not None:
        posterior.detach()
    if _fingerprint(network) != before:
        return SILENT, f"the network that was passed is changed; {words}"
    return (STATED, words) if words else (FINITE, "")


def _fault_of(posterior: Posterior, fit: Fit) -> tuple[str, str] | None:
    """Return why the posterior cannot be used, or None."""
    broken = [n for n, t in posterior.model.own_state().items() if not torch.isfinite(t).all()]
    if broken:
        return SILENT, f"not finite: {broken[:3]}"
    try:
        prediction = posterior.predict((fit.test or fit.data)(), 3, seed=0)
        draws = posterior.sample(3, seed=0)
        scores = prediction.log_likelihood
    except PyroLoraError as error:
        return SILENT, f"the posterior does not predict: {error}"
    except Exception as error:
        return RAW, f"in a prediction: {_where(error)}"
    broken = [name for name, value in draws.items() if not torch.isfinite(value).all()]
    if broken:
        return SILENT, f"draws that are not finite: {broken}"
    if scores is not None and scores.isnan().any():
        return SILENT, "log-likelihoods that are NaN"
    return None


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/pyrolora/" in frame.filename] or frames
    place = f"{ours[-1].filename.rpartition('/pyrolora/')[-1]}:{ours[-1].lineno}"
    return f"{type(error).__name__}: {str(error)[:200]} ({place})"


def _fingerprint(network: nn.Module) -> list[Any]:
    """Return what a fit may not change, NaN included."""
    modules = [(name, type(module), module.training) for name, module in network.named_modules()]
    tensors = [(n, p.requires_grad, _bytes(p)) for n, p in network.named_parameters()]
    return [*modules, *tensors]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def run(chosen: Sequence[Case], *, quietly: bool = False) -> int:
    """Run the cases, print a table and every failure; return how many failed."""
    counts: Counter[tuple[str, str]] = Counter()
    failures, began = 0, time.monotonic()
    with quiet():
        for case in chosen:
            result, words = outcome(case)
            counts[case.guide, result] += 1
            if result in (RAW, SILENT):
                failures += 1
                print(
                    f"{result}: {case.guide}, {case.extreme}: {' '.join(words.split())}", flush=True
                )
    if not quietly:
        _print(counts)
    ended = Counter(way for (_, way), count in counts.items() for _ in range(count))
    ways = ", ".join(f"{ended[way]} {way}" for way in OUTCOMES)
    print(f"{len(chosen)} fits in {time.monotonic() - began:.0f} s: {ways}")
    return failures


def _print(counts: Counter[tuple[str, str]]) -> None:
    names = [name for name in GUIDES if any(guide == name for guide, _ in counts)]
    width = max(map(len, names), default=0)
    print(f"{'':{width}} " + " ".join(f"{way:>12}" for way in OUTCOMES))
    for name in names:
        print(f"{name:{width}} " + " ".join(f"{counts[name, way]:>12,}" for way in OUTCOMES))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="extremes whose name contains this")
    parser.add_argument("--guides", default="", help="some of the guides, by name")
    parser.add_argument("--every", type=int, default=1, help="one of so many cases")
    chosen = parser.parse_args(arguments)
    names = chosen.guides.split(",") if chosen.guides else [*GUIDES]
    if unknown := {*names} - {*GUIDES}:
        raise SystemExit(f"no guide is named {sorted(unknown)}; there are {sorted(GUIDES)}")
    found = [case for case in cases() if case.guide in names and chosen.only in case.extreme]
    return min(run(found[:: chosen.every]), 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())

"""A pass whose rows have an adapter each: PEFT's mixed batch, and ours, of the same adapters."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyrolora
from pyrolora.model import Share, evaluating, mixed_pass
from pyrolora.predictive import Ask, generate_mixed

REPEATS = 7


def beside_peft(folder: Path, network: str, texts: list[str], new_tokens: int) -> dict[str, Any]:
    """Return the seconds of both on the posteriors' mean adapters, a row each, and their ratios.

    Both give the same logits and texts, which is checked. PEFT's time is that of the texts alone,
    ours that of the texts and the entropies of their tokens, which is a pass more.
    """
    names = sorted(path.name for path in folder.iterdir())
    texts = [texts[k % len(texts)] for k in range(len(names))]
    tokenizer = AutoTokenizer.from_pretrained(network)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    batch = dict(tokenizer.pad({"input_ids": ids}, return_tensors="pt"))
    base: Any = AutoModelForCausalLM.from_pretrained(network).eval()
    posteriors = [pyrolora.load(folder / name, base) for name in names]
    ours = _ours(posteriors, batch, ids, new_tokens)
    for name, posterior in zip(names, posteriors, strict=True):
        posterior.to_peft(folder.parent / "peft" / name, "mean")
    peft = _peft(folder.parent / "peft", names, network, batch, new_tokens, tokenizer)
    for name, (ours_of, theirs) in {k: (ours[k], peft[k]) for k in ours}.items():
        _check(name, ours_of(), theirs())
    seconds = _timed(
        {**{("ours", k): v for k, v in ours.items()}, **{("peft", k): v for k, v in peft.items()}}
    )
    return {
        f"c: {name}: milliseconds of ours, of PEFT's, ratio": [
            round(1000 * seconds["ours", name], 1),
            round(1000 * seconds["peft", name], 1),
            round(seconds["ours", name] / seconds["peft", name], 3),
        ]
        for name in ours
    }


def _ours(
    posteriors: list[pyrolora.Posterior], batch: dict[str, Any], ids: Any, new_tokens: int
) -> dict[str, Callable[[], Any]]:
    factors = [posterior.predictor.factors(0, None, None) for posterior in posteriors]
    shares = [Share(p.model, f, 1) for p, f in zip(posteriors, factors, strict=True)]
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    asked = [
        Ask(posterior.predictor, prompt, 0, None, None, options, drawn)
        for posterior, prompt, drawn in zip(posteriors, ids, factors, strict=True)
    ]

    @torch.no_grad()
    def forward() -> torch.Tensor:
        with evaluating(posteriors[0].model):
            outputs = mixed_pass(shares, batch)
        assert outputs is not None
        return torch.cat([output[0] for output in outputs])

    def generate() -> list[str]:
        return [made.texts[0][0] for made in generate_mixed(asked) if made and made.texts]

    return {"forward": forward, "generate": generate}


def _peft(
    folder: Path, names: list[str], network: str, batch: dict[str, Any], new_tokens: int, words: Any
) -> dict[str, Callable[[], Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(network)
        model: Any = PeftModel.from_pretrained(base, folder / names[0], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(folder / name, adapter_name=name)
    model.eval()
    before = batch["input_ids"].shape[1]

    @torch.no_grad()
    def forward() -> torch.Tensor:
        logits: torch.Tensor = model(**batch, adapter_names=names, use_cache=False).logits
        return logits

    @torch.no_grad()
    def generate() -> list[str]:
        options = {"max_new_tokens": new_tokens, "do_sample": False}
        options["pad_token_id"] = words.pad_token_id
        rows = model.generate(**batch, adapter_names=names, **options)
        made: list[str] = words.batch_decode(rows[:, before:], skip_special_tokens=True)
        return made

    return {"forward": forward, "generate": generate}


def _check(name: str, ours: Any, theirs: Any) -> None:
    if isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours[:, -1], theirs[:, -1], atol=1e-3, rtol=1e-3)
    elif ours != theirs:
        raise AssertionError(f"{name}: {ours} and {theirs} differ")


def _timed(calls: dict[Any, Callable[[], Any]]) -> dict[Any, float]:
    """Return the median seconds of each call, the calls in turn."""
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}

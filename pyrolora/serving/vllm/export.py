"""Draws of a posterior, written as adapters for vLLM."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.adapters import FlatFactors
from pyrolora.data.inputs import context_length
from pyrolora.data.media.media import tokenizer_of
from pyrolora.errors import ConfigError, listed
from pyrolora.files import write_whole
from pyrolora.guides import full_name
from pyrolora.json_values import as_json
from pyrolora.model import evaluating
from pyrolora.peft.config import CONFIG_FILE
from pyrolora.peft.export import export_factors
from pyrolora.posterior import Posterior
from pyrolora.predictive.decoding import end_ids
from pyrolora.serving.vllm.exported import FILE, FORMAT, FORMAT_VERSION, adapter_digest
from pyrolora.storage.description import DIGEST, digest_of
from pyrolora.storage.tokenizer_files import write_tokenizer
from pyrolora.tasks import CausalLM

PROBE = 24
"""Tokens of the text that tells adapters apart."""
DIGITS = 12
"""Digits of a digest in a name."""


def export_vllm(
    posterior: Posterior,
    path: str | Path,
    draws: Iterable[int] | None = None,
    *,
    name: str | None = None,
) -> list[str]:
    """Write draws of a posterior as adapters that vLLM serves, and ``vllm.json`` beside them.

    Each draw is a folder with a plain LoRA adapter: one rank, the scaling 1. Its name ends in a
    digest of the adapter, since vLLM goes on with the older adapter where a name is used again.
    ``vllm.json`` says what the adapters are, and how each of them, and the network without one,
    scores a probe: by that `pyrolora serve --engine vllm` recognises them in a running engine.

    Parameters
    ----------
    posterior
        Of a causal language model.
    path
        A folder that is not there yet; it is there whole, or not at all.
    draws
        The numbers of the draws, as in `Posterior.sample`; None: the first 8, or every member of
        an ensemble.
    name
        The beginning of the adapters' names; None: the folder's name.

    Returns
    -------
    list
        The names of the adapters.

    Raises
    ------
    ConfigError
        For a posterior that vLLM cannot serve, and for a folder that is there.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists; choose another name")
    _check(posterior)
    if draws is None:
        draws = range(posterior.model.program.usual_draws(defaults.GENERATE_SAMPLES))
    numbers = posterior.predictor.numbered.check(draws)
    prefix = re.sub(r"[^A-Za-z0-9._-]+", "-", name or path.name).strip("-._")[:100] or "posterior"
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{prefix}.", suffix=".part", dir=path.parent))
    try:
        scratch.chmod(0o755)
        names = _write(posterior, scratch, numbers, prefix)
        scratch.rename(path)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(scratch)
        raise
    return names


def _check(posterior: Posterior) -> None:
    """Refuse posteriors whose answers vLLM cannot give."""
    if posterior.task.name != CausalLM.name:
        raise ConfigError(
            f"vLLM takes adapters of causal language models, and this posterior is of the task "
            f"{posterior.task.name!r}; serve it by 'pyrolora serve' without --engine"
        )
    if not posterior.bank.specs:
        raise ConfigError(
            f"{full_name(posterior.options)!r} has no adapter; write the network itself with "
            "posterior.merge().save_pretrained(path), which vLLM serves as it is"
        )
    if posterior.tokenizer is None:
        raise ConfigError(
            "this posterior has no tokenizer, and the gateway needs one to read texts; pass "
            "tokenizer= to fit() or load()"
        )


def _write(posterior: Posterior, folder: Path, numbers: Sequence[int], prefix: str) -> list[str]:
    numbered = posterior.predictor.numbered
    probe = _probe(posterior)
    adapters: list[dict[str, Any]] = []
    for number in numbers:
        factors = numbered.exportable(number)
        place = folder / f"draw-{number}"
        export_factors(place, posterior.model, factors, uniform=True)
        rank = _check_config(place)
        digest = adapter_digest(place)
        name = f"{prefix}-draw-{number}-{digest[:DIGITS]}"
        place.rename(folder / name)
        scores = _scores(posterior, probe, factors)
        adapters.append({"name": name, "draw": number, "sha256": digest, "probe_scores": scores})
    base: Any = posterior.base
    context = context_length(base)
    files, digests = write_tokenizer(folder, posterior.tokenizer)
    meta = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {p: version(p) for p in ("pyrolora", "torch", "transformers")},
        "task": posterior.task.name,
        "base": {"class": type(base).__name__, "name_or_path": base.name_or_path or None},
        "vocabulary": int(base.get_output_embeddings().weight.shape[0]),
        "context": None if context == float("inf") else int(context),
        "ends": sorted(end_ids(base.generation_config)),
        "temperature": float(posterior.temperature),
        "rank": rank,
        "targets": sorted({spec.rpartition(".")[2] for spec in posterior.bank.specs}),
        "tokenizer": files,
        "tokenizer_files": digests,
        "probe": probe,
        "probe_scores": _scores(posterior, probe, None),
        "adapters": adapters,
    }
    write_whole(folder / FILE, as_json({**meta, DIGEST: digest_of(meta)}).encode())
    return [adapter["name"] for adapter in adapters]


def _check_config(folder: Path) -> int:
    """Refuse by name what vLLM refuses in an adapter; return the rank."""
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    refused = {
        "modules_to_save": "whole modules beside the adapter",
        "target_parameters": "adapters on parameters, such as fused experts",
        "use_dora": "DoRA",
    }
    for entry, what in refused.items():
        if config[entry]:
            value = config[entry]
            shown = listed(value, most=3) if isinstance(value, list) else value
            raise ConfigError(
                f"vLLM serves no {what} ({entry}={shown}); fit without them, or write the merged "
                "network of one draw with posterior.merge(k).save_pretrained(path)"
            )
    if config["rank_pattern"] or config["alpha_pattern"]:  # as_uniform leaves none
        raise AssertionError(config)
    return int(config["r"])


def _probe(posterior: Posterior) -> list[int]:
    """Return token ids spread over the vocabulary, without special tokens."""
    tokenizer = tokenizer_of(posterior.tokenizer)
    special = {*tokenizer.all_special_ids}
    words = [token for token in range(len(tokenizer)) if token not in special]
    most = min(PROBE, int(min(context_length(posterior.base), 2**31)) - 1)
    size = max(most, 2)
    return [words[(place * len(words)) // size] for place in range(size)]


@torch.no_grad()
def _scores(posterior: Posterior, probe: list[int], factors: FlatFactors | None) -> list[float]:
    """Return log p of the probe's tokens after the first, without a temperature."""
    joint = posterior.model
    device = next(joint.base.parameters()).device
    ids = torch.tensor([probe], device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with evaluating(joint):
        if factors is None:
            output: Tensor = joint.base(**batch).logits
        else:
            output = joint.network(batch, factors)
    logs = output[0, :-1].float().log_softmax(-1)
    return [float(score) for score in logs.gather(-1, ids[0, 1:, None]).squeeze(-1)]

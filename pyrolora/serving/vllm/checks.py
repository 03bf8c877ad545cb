"""Whether an engine serves the draws of an exported posterior, and nothing else in their place.

An engine says nothing of adapters whose names match none of its layers, which it serves as the base
model, and may go on with an older adapter of the same name. Both are seen in the scores.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from pyrolora.errors import ConfigError, listed
from pyrolora.serving.vllm.engine import ALL, Engine, EngineRefusalError, Model, together
from pyrolora.serving.vllm.exported import FILE, Adapter, Exported

SAME = 1e-6
"""Nats per token by which scores have to differ to be those of different functions."""
OTHER_BASE = 0.5
"""Nats per token, on average, beyond which a base model is another one; rounding stays below."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that ``--max-lora-rank`` takes."""


async def ready(
    engine: Engine, posteriors: Sequence[Exported], top: int, adapters_at: str | None = None
) -> Model:
    """Load the draws that the engine does not serve yet, check all of them, return the base model.

    Parameters
    ----------
    engine
        The engine.
    posteriors
        The posteriors.
    top
        The tokens per place whose log-probabilities requests will need; -1: all.
    adapters_at
        The directory of the posteriors as the engine sees it; None: as it is here.

    Raises
    ------
    ConfigError
        When a draw is not served, moves no score, equals another, or is another function than the
        exported one; and when the base model is not the posteriors'.
    """
    models = {model.name: model for model in await engine.models()}
    bases = [model for model in models.values() if model.parent is None]
    if len({model.root or model.name for model in bases}) != 1:
        raise ConfigError(
            f"the engine at {engine.url} has the base models "
            f"{listed([model.name for model in bases])}; the gateway needs one that serves one"
        )
    base = bases[0]
    for posterior in posteriors:
        _check_limits(posterior, top)
        for adapter in posterior.adapters:
            if adapter.name not in models:
                await _load(engine, base, posteriors, posterior, adapter, top, adapters_at)
    for posterior in posteriors:
        await _check(
            engine,
            base,
            posterior,
            top,
            serve_line(base.root or base.name, posteriors, top, adapters_at),
        )
    return base


def serve_line(
    base: str, posteriors: Sequence[Exported], top: int, adapters_at: str | None = None
) -> str:
    """Return the line that starts an engine with all draws."""
    adapters = [(p, adapter) for p in posteriors for adapter in p.adapters]
    rank = max(p.rank for p in posteriors)
    targets = sorted({target for p in posteriors for target in p.targets})
    parts = [
        *("vllm", "serve", base, "--enable-lora"),
        *("--max-lora-rank", str(next((r for r in RANKS if r >= rank), rank))),
        *("--max-loras", str(max(len(p.adapters) for p in posteriors))),
        *("--max-cpu-loras", str(len(adapters))),
        *("--max-logprobs", str(top)),
        # Otherwise vLLM 0.32 also wraps the head, and fails where scores of texts share a batch.
        *("--lora-target-modules", *targets, "--lora-modules"),
        *(f"{adapter.name}={_place(p, adapter, adapters_at)}" for p, adapter in adapters),
    ]
    return shlex.join(parts)


def _place(posterior: Exported, adapter: Adapter, adapters_at: str | None) -> str:
    if adapters_at is None:
        return str(posterior.path.resolve() / adapter.name)
    return str(PurePosixPath(adapters_at) / posterior.name / adapter.name)


def _check_limits(posterior: Exported, top: int) -> None:
    if posterior.temperature != 1 and top != ALL:
        raise ConfigError(
            f"{posterior.name!r} has the temperature {posterior.temperature:.3g}, which acts on "
            "whole distributions; start the gateway with --top-logprobs -1"
        )


async def _load(
    engine: Engine,
    base: Model,
    posteriors: Sequence[Exported],
    posterior: Exported,
    adapter: Adapter,
    top: int,
    adapters_at: str | None,
) -> None:
    try:
        await engine.load(adapter.name, _place(posterior, adapter, adapters_at))
    except EngineRefusalError as error:
        line = serve_line(base.root or base.name, posteriors, top, adapters_at)
        if error.code == 404:
            raise ConfigError(
                f"the engine does not serve {adapter.name}, and lets nobody load it; start it as: "
                f"{line} -- or with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            ) from error
        raise ConfigError(
            f"the engine cannot load {adapter.name}: {error} -- it takes these adapters when it "
            f"is started as: {line}"
        ) from error


async def _check(engine: Engine, base: Model, posterior: Exported, top: int, line: str) -> None:
    """Compare what the engine's models give with what was exported.

    Differences are means over the tokens of the probe of |log p - log p'|.
    """
    expected = [posterior.probe_scores, *(a.probe_scores for a in posterior.adapters)]
    names = [base.name, *(adapter.name for adapter in posterior.adapters)]
    try:
        # At once, as requests will ask.
        scores = await together([_scored(engine, name, posterior.probe, top) for name in names])
    except EngineRefusalError as error:
        raise ConfigError(
            f"{error} -- the gateway asks for prompt_logprobs={top}, of several models at once; an "
            f"engine that is started as follows answers: {line}"
        ) from error
    found, due = torch.stack(scores), torch.tensor(expected, dtype=torch.float64)
    if (off := _distance(found[:1], due[:1]).item()) > OTHER_BASE:
        raise ConfigError(
            f"the engine's base model {base.name!r} is not the one that {posterior.name!r} was "
            f"fitted on ({posterior.base['name_or_path']}): its log-probabilities differ by "
            f"{off:.2f} nats per token; start the engine with that network"
        )
    _check_apart(names, found)
    _check_expected(names, found, due)


async def _scored(engine: Engine, name: str, probe: list[int], top: int) -> Tensor:
    ((_, *places),) = await engine.score(name, [probe], top)
    tokens = probe[1:]
    if len(places) != len(tokens) or not all(
        logs is not None and token in logs for logs, token in zip(places, tokens, strict=True)
    ):
        raise ConfigError(
            f"the engine scores the probe of {name} in {len(places)} places, and it has "
            f"{len(tokens)} tokens to score; is it vLLM?"
        )
    scores = [logs[token] for logs, token in zip(places, tokens, strict=True) if logs is not None]
    return torch.tensor(scores, dtype=torch.float64).clamp(min=-1e4)


def _distance(rows: Tensor, others: Tensor) -> Tensor:
    """Return (n, m), the mean absolute difference of each of n rows to each of m."""
    return (rows[:, None] - others[None]).abs().mean(-1)


def _check_apart(names: Sequence[str], found: Tensor) -> None:
    """Refuse draws that give the same scores as the base model, or as one another."""
    near = _distance(found, found).fill_diagonal_(torch.inf) < SAME
    if bool(near[0].any()):
        same = [names[int(i)] for i in near[0].nonzero()]
        raise ConfigError(
            f"the engine serves {listed(same, most=3)} as its base model: their scores are those "
            f"of {names[0]!r}. The names in the adapters match none of its layers, or it was "
            "started without them; compare its log, and export from the network that it serves"
        )
    pairs = [(int(i), int(j)) for i, j in near.nonzero() if i < j]
    if pairs:
        i, j = pairs[0]
        raise ConfigError(
            f"{names[i]} and {names[j]} give the same scores in the engine, so that there is no "
            "uncertainty between them. Either the engine took one for the other (restart it), or "
            "the posterior's draws are equal (as those of 'map' are): then serve one of them, or "
            "fit another guide"
        )


def _check_expected(names: Sequence[str], found: Tensor, due: Tensor) -> None:
    """Refuse draws whose scores are closer to those of another function than to their own."""
    nearest = _distance(found, due).argmin(-1).tolist()
    for place in range(1, len(names)):
        if nearest[place] != place:
            own, other = _distance(found[place : place + 1], due)[0, [place, nearest[place]]]
            raise ConfigError(
                f"what the engine serves as {names[place]} scores like {names[nearest[place]]} "
                f"({other:.3g} nats per token away) rather than like the exported draw "
                f"({own:.3g}). It holds another adapter under that name, scales it differently, or "
                "rounds more than the draws differ; restart it, or give it a higher --dtype"
            )


def exported_in(directory: Path) -> list[Path]:
    """Return the folders of a directory that hold posteriors for vLLM, sorted."""
    return sorted(file.parent for file in directory.glob(f"*/{FILE}"))

"""``pyrolora serve``."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Annotated

import typer

from pyrolora import defaults
from pyrolora.cli.output import say
from pyrolora.errors import ConfigError

KEY = "PYROLORA_API_KEY"
NEEDED = ("fastapi", "uvicorn", "prometheus_client")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def serve(
    directory: Annotated[
        Path, typer.Argument(help="A directory with a folder per posterior; they are its names.")
    ],
    model: Annotated[str, typer.Option(help="The network of all of them: a hub id, or a folder.")],
    host: Annotated[
        str, typer.Option(help="Where to listen; the default is reached from this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=KEY,
            show_envvar=False,
            help=f"What clients send as 'Authorization: Bearer ...'. Better set {KEY}: options "
            "are seen by every user of the machine.",
        ),
    ] = None,
    default: Annotated[
        str | None,
        typer.Option(help="The posterior of requests that name none; otherwise the only one."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Most memory of posteriors, such as 500MB or 2GB, beside the network; the least "
            "recently used leave first. Otherwise all stay."
        ),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Draws of requests that do not say; 0: the mean adapter; otherwise "
            f"{defaults.NUM_SAMPLES} for classes and {defaults.GENERATE_SAMPLES} for texts.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=defaults.MAX_SEED, help="Of draws, where requests have none.")
    ] = defaults.SEED,
    window: Annotated[
        float, typer.Option(min=0, help="Milliseconds that a request waits for company.")
    ] = 5.0,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens per batch, over all draws.")
    ] = 65_536,
    queue: Annotated[
        int, typer.Option(min=1, help="Most texts that wait; beyond it the answer is 429.")
    ] = 256,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds per request; beyond it the answer is 504.")
    ] = 60.0,
    max_body: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 1_000_000,
    max_texts: Annotated[int, typer.Option(min=1, help="Most texts of a request.")] = 64,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of a continuation.")
    ] = 512,
    max_samples: Annotated[int, typer.Option(min=1, help="Most draws of a request.")] = 64,
    max_choices: Annotated[
        int, typer.Option(min=1, help="Most continuations of a request (n).")
    ] = 16,
) -> None:
    """Serve posteriors, each answer with its uncertainty, to LoRAX's and OpenAI's clients.

    \b
    pyrolora serve posteriors --model sentence-transformers/all-MiniLM-L6-v2
    curl http://127.0.0.1:8000/classify -H 'Content-Type: application/json' \\
      -d '{"inputs": "It works.", "parameters": {"adapter_id": "first"}}'

    The network is loaded once; a posterior when a request names it. The folders may be
    runs of 'pyrolora fit' or what Posterior.save wrote.

    \b
    /                     a page to try it in a browser
    /classify             classes of a text (LoRAX; classify_batch: of several)
    /generate             a continuation (LoRAX; generate_stream: as events)
    /v1/completions       continuations (OpenAI; the posterior is the model)
    /v1/chat/completions  an answer in a conversation, if there is a chat template
    /v1/models  /info  /health  /metrics

    Every answer has 'uncertainty': entropy in nats, its aleatoric and its epistemic part,
    and how far the draws agree; of texts also per token, and what other draws wrote.
    A field that would be ignored is refused by its name. Control-C ends the server when
    the requests that have begun are answered.
    """
    _check_installed()
    _check_key(api_key)
    size = None if budget is None else _bytes(budget)
    if api_key is None and KEY in os.environ:  # typer takes an empty variable for none
        _check_key(os.environ[KEY])
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of batches would fill the log
    say("loading libraries")
    import torch

    from pyrolora.serving.limits import Limits
    from pyrolora.serving.registry import Registry
    from pyrolora.serving.run import is_loopback, run
    from pyrolora.serving.service import Service

    limits = Limits(
        body=max_body,
        texts=max_texts,
        new_tokens=max_new_tokens,
        draws=max_samples,
        choices=max_choices,
        queue=queue,
        timeout=timeout,
        window=window / 1000,
        batch_tokens=batch_tokens,
    )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    registry = Registry(directory, model, budget=size, device=device)
    names = registry.names()
    if default is not None and default not in names:
        raise ConfigError(f"--default names {default!r}, and the posteriors are {names[:20]}")
    service = Service(registry, limits, default=default, num_samples=num_samples, seed=seed)
    say(f"posteriors ({len(names)}): {', '.join(names[:20])}")
    if not is_loopback(host) and api_key is None:
        say(f"warning: {host} is reached from other machines, and there is no key; set {KEY}")
    say(f"serving at http://{host}:{port}; Control-C ends it")
    run(service, host=host, port=port, key=api_key)


def _check_key(key: str | None) -> None:
    """Refuse a key that no header can carry."""
    if key is None:
        return
    if not key.strip():
        raise ConfigError(f"the key is empty; leave --api-key and {KEY} out to serve without one")
    if key != key.strip() or not key.isprintable():
        raise ConfigError(
            "the key begins or ends with a space, or has a control character in it, and no header "
            "can carry it; take it out"
        )


def _check_installed() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"serving needs {', '.join(missing)}, which is not installed: pip install "
            "'pyrolora[serve]'"
        )


def _bytes(text: str) -> int:
    """Return the number of bytes of ``500MB`` and its like; units are powers of 1,000."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)B?", text.strip().upper())
    size = 0 if match is None else int(float(match[1]) * UNITS[match[2]])
    if not size:
        raise ConfigError(f"--budget takes a size such as 500MB or 2GB, got {text!r}")
    return size

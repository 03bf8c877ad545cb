"""``pyrolora serve``."""

from __future__ import annotations

import importlib.util
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pyrolora import defaults
from pyrolora.cli.gateway import gateway
from pyrolora.cli.output import say
from pyrolora.errors import ConfigError
from pyrolora.serving.vllm import TOP_LOGPROBS

KEY = "PYROLORA_API_KEY"
NEEDED = ("fastapi", "uvicorn", "prometheus_client")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


ENGINE_KEY = "VLLM_API_KEY"


class EngineName(StrEnum):
    """The programs that may run the network."""

    OWN = "own"
    VLLM = "vllm"

    @property
    def alone_takes(self) -> tuple[str, ...]:
        """The options that act on this one alone."""
        return {
            EngineName.OWN: ("model", "budget", "seed", "window", "batch_tokens"),
            EngineName.VLLM: ("url", "engine_key", "adapters_at", "top_logprobs"),
        }[self]


def serve(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(help="A directory with a folder per posterior; they are its names.")
    ],
    model: Annotated[
        str | None, typer.Option(help="The network of all of them: a hub id, or a folder.")
    ] = None,
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
    engine: Annotated[
        EngineName,
        typer.Option(
            help="own: the network runs here. vllm: it runs in vLLM, and this is its gateway; the "
            "directory is one of 'export --to vllm'."
        ),
    ] = EngineName.OWN,
    url: Annotated[
        str | None, typer.Option(help="Where vLLM listens, such as http://127.0.0.1:8001.")
    ] = None,
    engine_key: Annotated[
        str | None,
        typer.Option(
            envvar=ENGINE_KEY, show_envvar=False, help=f"vLLM's API key; better set {ENGINE_KEY}."
        ),
    ] = None,
    adapters_at: Annotated[
        str | None,
        typer.Option(help="The directory as vLLM sees it, if it runs elsewhere (in a container)."),
    ] = None,
    top_logprobs: Annotated[
        int,
        typer.Option(
            min=-1,
            help="Tokens per place that vLLM gives log-probabilities of. -1: all, which gives the "
            "numbers of the own engine; fewer give lower bounds of the entropies in much "
            "shorter answers.",
        ),
    ] = TOP_LOGPROBS,
) -> None:
    """Serve posteriors, each answer with its uncertainty, to LoRAX's and OpenAI's clients.

    \b
    pyrolora serve posteriors --model sentence-transformers/all-MiniLM-L6-v2
    curl http://127.0.0.1:8000/classify -H 'Content-Type: application/json' \\
      -d '{"inputs": "It works.", "parameters": {"adapter_id": "first"}}'

    \b
    pyrolora export run adapters/books --to vllm   # it prints the line that starts vLLM
    pyrolora serve adapters --engine vllm --url http://127.0.0.1:8001

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
    _check_engine(context, engine)
    _check_top(top_logprobs)
    _check_installed(engine)
    _check_key(api_key)
    if api_key is None and KEY in os.environ:  # typer takes an empty variable for none
        _check_key(os.environ[KEY])
    size = None if budget is None else _bytes(budget)
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of batches would fill the log
    say("loading libraries")
    from pyrolora.serving.limits import Limits
    from pyrolora.serving.run import is_loopback, run

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
    options: dict[str, Any] = {"default": default, "num_samples": num_samples}
    service: Any
    if engine is EngineName.VLLM:
        service = gateway(directory, limits, url, engine_key, adapters_at, top_logprobs, **options)
    else:
        service = _service(directory, str(model), limits, size, seed=seed, **options)
    names = service.registry.names()
    if default is not None and default not in names:
        raise ConfigError(f"--default names {default!r}, and the posteriors are {names[:20]}")
    say(f"posteriors ({len(names)}): {', '.join(names[:20])}")
    if not is_loopback(host) and api_key is None:
        say(f"warning: {host} is reached from other machines, and there is no key; set {KEY}")
    say(f"serving at http://{host}:{port}; Control-C ends it")
    run(service, host=host, port=port, key=api_key)


def _service(
    directory: Path, model: str, limits: Any, budget: int | None, **options: Any
) -> object:
    """Return the server of the network that runs here."""
    import torch

    from pyrolora.serving.registry import Registry
    from pyrolora.serving.service import Service

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return Service(Registry(directory, model, budget=budget, device=device), limits, **options)


def _check_top(top: int) -> None:
    if top == 0:
        raise ConfigError("--top-logprobs is -1, for all tokens, or at least 1, got 0")


def _check_engine(context: typer.Context, engine: EngineName) -> None:
    """Refuse options of the other engine, and the absence of what this one needs."""
    asked = [
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    for other in EngineName:
        useless = [name for name in asked if other is not engine and name in other.alone_takes]
        if useless:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in useless)
            raise ConfigError(
                f"{flags} would do nothing with --engine {engine.value}; leave it out, or say "
                f"--engine {other.value}"
            )
    needed = "model" if engine is EngineName.OWN else "url"
    if needed not in asked:
        what = "the network of all posteriors" if needed == "model" else "where vLLM listens"
        raise ConfigError(f"--{needed} is missing, {what}; 'pyrolora serve --help' has an example")


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


def _check_installed(engine: EngineName) -> None:
    needed = (*NEEDED, "httpx") if engine is EngineName.VLLM else NEEDED
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
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

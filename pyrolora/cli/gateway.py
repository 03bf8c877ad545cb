"""The gateway of ``pyrolora serve --engine vllm``, checked before it listens."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrolora.cli.output import say
from pyrolora.errors import ConfigError

if TYPE_CHECKING:
    from pyrolora.serving.limits import Limits


def gateway(
    directory: Path,
    limits: Limits,
    url: str | None,
    engine_key: str | None,
    adapters_at: str | None,
    top: int,
    *,
    num_samples: int | None,
    **options: Any,
) -> object:
    """Return a gateway whose engine serves every exported draw.

    Raises
    ------
    ConfigError
        When there is nothing to serve, or the engine serves something else.
    """
    from pyrolora.serving.errors import RefusalError
    from pyrolora.serving.vllm.checks import exported_in, ready
    from pyrolora.serving.vllm.engine import Engine
    from pyrolora.serving.vllm.exported import read_exported
    from pyrolora.serving.vllm.gateway import Gateway

    if not directory.is_dir():
        raise ConfigError(f"there is no folder {str(directory)!r}; name the directory of exports")
    folders = exported_in(directory)
    if not folders:
        raise ConfigError(
            f"{directory} holds no posterior for vLLM; write one with 'pyrolora export RUN "
            f"{directory / 'NAME'} --to vllm'"
        )
    posteriors = [read_exported(folder) for folder in folders]
    for posterior in posteriors:
        if num_samples is not None and not 0 < num_samples <= len(posterior.adapters):
            raise ConfigError(
                f"--num-samples {num_samples}: {posterior.name!r} has {len(posterior.adapters)} "
                "exported draws, and the mean adapter (0) is none of them"
            )
    engine = Engine(str(url), key=engine_key, timeout=limits.timeout)
    say(f"asking the engine at {engine.url} for {sum(len(p.adapters) for p in posteriors)} draws")

    async def checked() -> Any:
        try:
            return await ready(engine, posteriors, top, adapters_at)
        except RefusalError as error:
            raise ConfigError(f"{engine.url}: {error}") from error
        finally:
            await engine.close()  # the server has a loop of its own

    base = asyncio.run(checked())
    say(f"the engine serves {base.name}, and every draw scores as it did when it was exported")
    return Gateway(engine, posteriors, base, limits, num_samples=num_samples, top=top, **options)

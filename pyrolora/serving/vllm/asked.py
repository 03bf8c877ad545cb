"""A request to the gateway in vLLM's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyrolora.errors import ConfigError
from pyrolora.serving.asking import Draws
from pyrolora.serving.errors import UnsupportedError
from pyrolora.serving.verbs import Write
from pyrolora.serving.vllm.engine import ALL
from pyrolora.serving.vllm.exported import Exported

COOLEST = 0.01
"""The lowest temperature of vLLM, which samples at it where it is asked for a lower one."""


@dataclass(frozen=True)
class Asked:
    """A prompt of a request.

    Attributes
    ----------
    settings
        Of its continuations.
    ids
        Its tokens.
    options
        The same settings in vLLM's words.
    """

    settings: Write
    ids: list[int]
    options: dict[str, Any]


def vllm_options(settings: Write, temperature: float) -> dict[str, Any]:
    """Return settings of transformers' ``generate`` in vLLM's words, times T of the posterior.

    vLLM looks for stop strings in the text with its special tokens, as the own engine does.

    Raises
    ------
    UnsupportedError
        For those that vLLM has not.
    """
    asked = dict(settings.options)
    if asked.pop("typical_p", 1.0) != 1.0:
        raise UnsupportedError("typical_p: vLLM has none; use top_p", "typical_p")
    options: dict[str, Any] = {"temperature": 0.0}
    if settings.sampled:
        tempered = asked.pop("temperature") * temperature
        if tempered < COOLEST:
            raise UnsupportedError(
                f"temperature: vLLM samples at {COOLEST} or above, and this request at "
                f"{tempered:.3g}, the posterior's own temperature of {temperature:.3g} included; "
                "ask for 0, which takes the likeliest tokens, or for a higher one",
                "temperature",
            )
        options = {
            "temperature": tempered,
            "top_k": asked.pop("top_k") or ALL,
            "top_p": asked.pop("top_p"),
            "min_p": 0.0,
        }
    if "repetition_penalty" in asked:
        options["repetition_penalty"] = asked.pop("repetition_penalty")
    if settings.stops:
        options |= {"stop": [*settings.stops], "skip_special_tokens": False}
    if asked:
        raise ConfigError(f"the gateway has no words of vLLM's for {sorted(asked)}")
    return options


def numbers_of(
    posterior: Exported, draws: Draws, usual: int | None, *, sampled: bool
) -> tuple[int, ...]:
    """Return the numbers of the draws that a request asks for.

    Parameters
    ----------
    posterior
        Has the exported draws.
    draws
        What the request says of them.
    usual
        Draws of requests that say nothing; None: all.
    sampled
        Whether tokens are sampled, for which a seed is taken.

    Raises
    ------
    UnsupportedError
        For draws that were not exported, and for a seed that nothing would use.
    """
    there = [adapter.draw for adapter in posterior.adapters]
    if draws.seed is not None and not sampled:
        raise UnsupportedError(
            "seed: the draws of this server have numbers, and at temperature 0 no token is "
            "sampled; leave it out, or choose draws by their numbers (draws)",
            "seed",
        )
    if draws.numbers is not None:
        numbers = list(draws.numbers)
        if draws.num_samples is not None:
            raise UnsupportedError(
                "draws and num_samples both say which draws; give one of them", "draws"
            )
        if len({*numbers}) < len(numbers) or not {*numbers} <= {*there}:
            raise UnsupportedError(
                f"draws: each of {numbers} has to be another one of those exported, {there}",
                "draws",
            )
    else:
        size = usual if draws.num_samples is None else draws.num_samples
        size = len(there) if size is None else size
        if not 0 < size <= len(there):
            raise UnsupportedError(
                f"num_samples: the engine serves {len(there)} draws and no mean adapter, got "
                f"{size}; ask for 1 to {len(there)}",
                "num_samples",
            )
        numbers = there[:size]
    return tuple(numbers)

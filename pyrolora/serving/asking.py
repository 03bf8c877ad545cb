"""From a request's fields to the rows of its texts."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyrolora import defaults
from pyrolora.data.media.media import tokenizer_of
from pyrolora.errors import ConfigError, DataError
from pyrolora.posterior import Posterior
from pyrolora.predictive import Follower
from pyrolora.serving.errors import UnsupportedError
from pyrolora.serving.limits import Limits
from pyrolora.serving.registry import Lease
from pyrolora.serving.text import encoded, room_after
from pyrolora.serving.verbs import Classify, Columns, Write

SEEDS = 2**32


@dataclass(frozen=True)
class Draws:
    """Which draws a request asks for; None: those of the server.

    ``numbers`` name them, as in `Posterior.sample`, in place of ``num_samples``.
    """

    num_samples: int | None = None
    seed: int | None = None
    numbers: Sequence[int] | None = None


@dataclass(frozen=True)
class Sampling:
    """How a request wants its text.

    Attributes
    ----------
    max_new_tokens
        The length; None: ``usual_length``, or what the network's context leaves.
    options
        Of transformers' ``generate``, beside the length.
    stops
        The texts that end it.
    sampled
        Whether tokens are sampled; otherwise the likeliest is taken.
    choices, alternatives
        As in `Write`.
    """

    max_new_tokens: int | None = None
    usual_length: int = defaults.MAX_NEW_TOKENS
    options: tuple[tuple[str, Any], ...] = ()
    stops: tuple[str, ...] = ()
    sampled: bool = False
    choices: int = 1
    alternatives: int | None = None


@dataclass(eq=False)
class Row:
    """A text of a request: what the queue holds.

    Attributes
    ----------
    lease
        The row's own, released when it is answered or cancelled.
    settings
        The draws, and what they are asked.
    columns
        The tokens.
    follower
        Is told of tokens as they are written, where one draw writes.
    given_up
        Whether nobody waits for the answer any more.
    """

    lease: Lease
    settings: Classify | Write
    columns: Columns
    follower: Follower | None = None
    given_up: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for rows that may share a batch.

        A pass that writes lasts until its longest text is written, so that the lengths of those
        that share it differ by a factor below two.
        """
        if isinstance(self.settings, Classify):
            return Classify, self.lease.family
        return Write, self.lease.family, self.settings.max_new_tokens.bit_length()

    @property
    def tokens(self) -> int:
        """Tokens over all draws, those to be written with them."""
        length = len(self.columns["input_ids"]) + self.settings.length
        return length * self.settings.passes


@dataclass(frozen=True)
class Asking:
    """Makes rows of requests, within the limits of the server.

    Attributes
    ----------
    limits
        Of one request.
    num_samples, seed
        Of requests that do not say; None: as many draws as `Posterior.predict` takes.
    """

    limits: Limits
    num_samples: int | None
    seed: int

    def classify(self, lease: Lease, texts: Sequence[str], draws: Draws) -> list[Row]:
        """Return the rows of texts whose classes are asked for."""
        posterior, task = lease.posterior, lease.posterior.task
        if task.serves in (None, "text"):
            raise UnsupportedError(
                f"the posterior {lease.name!r} is of the task {task.name!r}, which does not label "
                "a text: classifications, token classifications and regressions do; of a causal "
                "language model ask for text, other tasks are not served",
                "model",
            )
        self.check("inputs", len(texts), self.limits.texts, "texts")
        settings = Classify(*self._draws(posterior, draws, defaults.NUM_SAMPLES, seeded=False))
        return [Row(lease, settings, encoded(posterior, text)) for text in texts]

    def write(
        self,
        lease: Lease,
        prompts: Callable[[Posterior], Sequence[str]],
        draws: Draws,
        sampling: Sampling,
    ) -> list[Row]:
        """Return the rows of prompts, which may depend on the posterior's tokenizer."""
        posterior = lease.posterior
        if posterior.task.serves != "text":
            raise UnsupportedError(
                f"the posterior {lease.name!r} is of the task {posterior.task.name!r}, and only "
                "posteriors of a causal language model are served to write text; ask for "
                "classes, tags and numbers at /classify",
                "model",
            )
        length = sampling.max_new_tokens
        self.check("max_tokens", length or 0, self.limits.new_tokens, "new tokens")
        settings = self._settings(posterior, draws, sampling)
        texts = prompts(posterior)
        self.check("prompt", len(texts), self.limits.texts, "texts")
        rows = []
        for text in texts:
            columns = encoded(posterior, text, reserved=length or 1)
            room = room_after(posterior, columns)
            usual = min(sampling.usual_length, room, self.limits.new_tokens)
            rows.append(Row(lease, replace(settings, max_new_tokens=length or usual), columns))
        return rows

    def _settings(self, posterior: Posterior, draws: Draws, sampling: Sampling) -> Write:
        draws = seeded(draws, sampling)
        which = self._draws(posterior, draws, defaults.GENERATE_SAMPLES, seeded=sampling.sampled)
        return self.written(*which, sampling)

    def written(
        self,
        num_samples: int,
        seed: int | None,
        numbers: tuple[int, ...] | None,
        sampling: Sampling,
    ) -> Write:
        """Return the settings of a text by these draws."""
        self.check("n", sampling.choices, self.limits.choices, "choices")
        writers = max(num_samples, 1)
        several = -(-sampling.choices // writers)
        if several > 1 and not sampling.sampled:
            raise UnsupportedError(
                f"{sampling.choices} choices were asked for, and each of the {writers} draws "
                "writes its likeliest one; take more draws (num_samples) or a temperature above 0",
                "n",
            )
        return Write(
            num_samples,
            seed,
            numbers,
            several=several,
            options=sampling.options,
            stops=sampling.stops,
            sampled=sampling.sampled,
            choices=sampling.choices,
            alternatives=sampling.alternatives,
        )

    def _draws(
        self, posterior: Posterior, draws: Draws, usual: int, *, seeded: bool
    ) -> tuple[int, int | None, tuple[int, ...] | None]:
        """Return how many draws are asked for, the seed, and the numbers of draws that have them.

        With numbers a seed is that of tokens, in texts that are ``seeded``.
        """
        if draws.numbers is not None:
            beside = None if seeded else draws.seed
            try:
                numbers = posterior.predictor.numbers(
                    draws.numbers, num_samples=draws.num_samples, seed=beside
                )
            except ConfigError as error:
                raise UnsupportedError(str(error), "draws") from error
            assert numbers is not None
            self.check("draws", len(numbers), self.limits.draws, "draws")
            return len(numbers), draws.seed, tuple(numbers)
        number = self.num_samples if draws.num_samples is None else draws.num_samples
        if number is None:
            number = posterior.model.program.usual_draws(usual)
        self.check("num_samples", number, self.limits.draws, "draws")
        return number, self.seed if draws.seed is None else draws.seed, None

    def check(self, field: str, count: int, most: int, what: str) -> None:
        """Raise `UnsupportedError` for more than the server allows."""
        if count > most:
            raise UnsupportedError(
                f"{count} {what} were asked for, and the server allows {most}", field
            )


def seeded(draws: Draws, sampling: Sampling) -> Draws:
    """Return draws with a seed for the tokens of a sampled text; the answer says which it was."""
    if draws.seed is None and sampling.sampled:
        return replace(draws, seed=secrets.randbelow(SEEDS))
    return draws


def chat_prompt(posterior: Posterior, messages: Sequence[dict[str, str]]) -> str:
    """Return the text of a conversation, by the tokenizer's template."""
    tokenizer = tokenizer_of(posterior.tokenizer)
    if getattr(tokenizer, "chat_template", None) is None:
        raise UnsupportedError(
            "the tokenizer of this posterior has no chat template; use /v1/completions", "model"
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template may refuse roles, in its own words
        raise DataError(f"the chat template refuses these messages: {error}") from error
    return str(text)

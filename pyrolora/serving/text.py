"""Texts to tokens, tokens to the pieces of a text, and the probability of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pyrolora.adapters import AnyFactors, LaterFactors
from pyrolora.data.encoding import Encoder
from pyrolora.data.inputs import context_length
from pyrolora.data.media.media import tokenizer_of
from pyrolora.model import evaluating
from pyrolora.posterior import Posterior
from pyrolora.predictive.predict import turn_of
from pyrolora.serving.errors import TooLongError, UnsupportedError
from pyrolora.tasks import TokenTask

IDS = "input_ids"
UNFINISHED = "\ufffd"
"""The character that a decoder writes for bytes that do not make a whole character yet."""
MOST_LOGITS = 2**25
"""Entries of logits that are held at a time in scoring tokens."""


def context_of(posterior: Posterior) -> float:
    """Return the most tokens that the network and its tokenizer take."""
    length = getattr(tokenizer_of(posterior.tokenizer), "model_max_length", float("inf"))
    return min(length, context_length(posterior.base))


def encoded(posterior: Posterior, text: str, *, reserved: int = 0) -> dict[str, list[int]]:
    """Return the columns of tokens of a text, as ``predict`` and ``generate`` encode it.

    Parameters
    ----------
    reserved
        Tokens that will be written after the text; the text is then left open for them.

    Raises
    ------
    TooLongError
        When the network does not take that many tokens.
    UnsupportedError
        When the posterior has no tokenizer, or the text no token.
    """
    main = getattr(posterior.base, "main_input_name", IDS)
    if main != IDS:
        raise UnsupportedError(f"the network of this posterior reads {main!r}, not texts", "model")
    tokenizer = tokenizer_of(posterior.tokenizer)
    if tokenizer is None:
        raise UnsupportedError("this posterior has no tokenizer, and texts need one", "model")
    return tokenized(tokenizer, text, context_of(posterior), reserved=reserved)


def tokenized(
    tokenizer: Any, text: str, limit: float, *, reserved: int = 0
) -> dict[str, list[int]]:
    """Return the columns of tokens of a text, of which the network takes ``limit``."""
    columns = Encoder(tokenizer, float("inf"), open=reserved > 0)([text])
    row = {name: list(values[0]) for name, values in columns.items() if name != "cut"}
    size = len(row["input_ids"])
    if not size:
        raise UnsupportedError("the text has no token; send a text with at least one word")
    if size + reserved > limit:
        beside = f", and {reserved} are to be written after them" if reserved else ""
        raise TooLongError(
            f"the text has {size} tokens{beside}, and the network takes {int(limit)}; shorten it"
            + (" or lower the number of new tokens" if reserved else "")
        )
    return row


def room_after(posterior: Posterior, columns: dict[str, list[int]]) -> int:
    """Return how many tokens may be written after a text."""
    return int(min(context_of(posterior) - len(columns["input_ids"]), 2**31))


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the part that each token adds to the text; joined they are the decoded text.

    A character of several tokens belongs to the last of them.
    """
    shown = ""
    parts: list[str] = []
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:end], skip_special_tokens=True)
        ready = whole.startswith(shown) and not whole.endswith(UNFINISHED)
        if end == len(ids) and not whole.startswith(shown):  # the decoder rewrote what it wrote
            return [*[""] * (end - 1), whole]
        parts.append(whole[len(shown) :] if ready or end == len(ids) else "")
        shown += parts[-1]
    return parts


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return the place where the first of the stop strings begins, or None."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return min(places, default=None)


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of a continuation's tokens under the mixture over draws.

    Attributes
    ----------
    chosen
        (T,): log mean_s p_s of each token.
    ids, scores
        (T, k): the k likeliest tokens of each place and their log-probabilities.
    """

    chosen: Tensor
    ids: Tensor
    scores: Tensor


@torch.no_grad()
def token_scores(
    posterior: Posterior,
    prompt: Sequence[int],
    continuations: Sequence[Tensor],
    factors: AnyFactors,
    *,
    alternatives: int,
) -> list[TokenScores]:
    """Score every token of continuations of one prompt under the mixture over draws."""
    joint, task = posterior.model, posterior.task
    base: Any = posterior.base
    assert isinstance(task, TokenTask)
    law = task.at(posterior.temperature)
    device = next(base.parameters()).device
    start = torch.tensor(list(prompt))
    whole = [torch.cat([start, new]) for new in continuations]
    ids = pad_sequence(whole, batch_first=True).to(device)
    mask = pad_sequence([torch.ones_like(row) for row in whole], batch_first=True).to(device)
    batch = {"input_ids": ids, "attention_mask": mask}
    vocabulary = int(base.config.vocab_size)
    step = max(1, MOST_LOGITS // (ids.numel() * vocabulary))
    total: Tensor | float = 0.0
    if isinstance(factors, LaterFactors):
        step = min(step, factors.at_once)
    with turn_of(factors), evaluating(joint):
        if factors.draws is None:
            total = law.token_logits(joint.network(batch, factors), batch).softmax(-1)
        else:
            for first in range(0, factors.draws, step):
                output = joint.network(batch, factors[first : first + step])
                total = total + law.token_logits(output, batch).softmax(-1).sum(0)
            total = total / factors.draws
    assert isinstance(total, Tensor)
    logs = total.float().log().cpu()
    scores = []
    for row, new in zip(logs, continuations, strict=True):
        own = row[len(start) - 1 : len(start) - 1 + len(new)]
        best = own.topk(min(alternatives, own.shape[-1]), dim=-1)
        chosen = own.gather(-1, new[:, None]).squeeze(-1)
        scores.append(TokenScores(chosen, best.indices, best.values))
    return scores

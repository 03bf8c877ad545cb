"""From the log-probabilities that engines give to the uncertainty of continuations.

The numbers are those of `TokenPrediction`, which also computes them where the network is at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pyrolora.columns import IGNORED, LABELS
from pyrolora.errors import DataError
from pyrolora.predictive import Generation
from pyrolora.serving.text import TokenScores
from pyrolora.serving.vllm.engine import TokenLogs
from pyrolora.tasks import CausalLM, TokenPrediction

CHOSEN = 0
"""The column of the token that was written, where places have columns of their own."""


@dataclass(frozen=True)
class Scored:
    """A continuation under S draws.

    Attributes
    ----------
    logits
        (S, T, C), log p of C outcomes at each of the T tokens.
    labels
        (T,): the outcome that each token is.
    tokens
        (C,), the token ids of the outcomes; None where they are the ``top`` tokens of a place.
    covered
        (T,): the share of probability that has outcomes of its own, the least of all draws.
    """

    logits: Tensor
    labels: Tensor
    tokens: Tensor | None
    covered: Tensor


def whole(places: Sequence[Sequence[TokenLogs]], ids: Sequence[int], vocabulary: int) -> Scored:
    """Return the scores of a text by log-probabilities of the whole vocabulary.

    Parameters
    ----------
    places
        Per draw and token the log-probabilities.
    ids
        The tokens.
    vocabulary
        The number of tokens that the network scores.

    Raises
    ------
    DataError
        When the engine names fewer tokens.
    """
    logits = torch.full((len(places), len(ids), vocabulary), -torch.inf)
    for row, draw in zip(logits, places, strict=True):
        for place, logs in zip(row, draw, strict=True):
            tokens = torch.tensor([*logs])
            if len(tokens) < vocabulary or int(tokens.max()) >= vocabulary:
                raise DataError(
                    f"the engine names {len(tokens)} tokens where the network of the posterior "
                    f"scores {vocabulary}"
                )
            place[tokens] = torch.tensor([*logs.values()])
    return Scored(logits, torch.tensor(ids), torch.arange(vocabulary), torch.ones(len(ids)))


def coarse(places: Sequence[Sequence[TokenLogs]], ids: Sequence[int]) -> Scored:
    """Return the scores of a text by log-probabilities of a few tokens per place.

    The outcomes of a place are the token that was written, the tokens that every draw names, and
    all others together. Fewer outcomes have a lower entropy and share less information with the
    draw, so that ``entropy``, ``aleatoric`` and ``epistemic`` are lower bounds of those over the
    vocabulary (the data processing inequality). Log-likelihoods are exact.
    """
    rows: list[Tensor] = []
    for place, token in enumerate(ids):
        draws = [draw[place] for draw in places]
        named = sorted(set.intersection(*map(set, draws)) - {token})
        known = torch.tensor([[logs[one] for one in (token, *named)] for logs in draws])
        rest = (1 - known.double().exp().sum(-1, keepdim=True)).clamp(min=0).log()
        rows.append(torch.cat([known, rest.float()], -1).T)  # (C, S)
    outcomes = pad_sequence(rows, batch_first=True, padding_value=-torch.inf)  # (T, C, S)
    covered = torch.stack([1 - row[-1].exp().max() for row in rows]) if rows else torch.ones(0)
    labels = torch.full((len(ids),), CHOSEN)
    return Scored(outcomes.permute(2, 0, 1), labels, None, covered)


def generation(
    texts: Sequence[Sequence[int]], scored: Sequence[Scored], draw: Tensor, temperature: float
) -> Generation:
    """Return continuations of one prompt with their uncertainty.

    Parameters
    ----------
    texts
        Token ids of each.
    scored
        The scores of each.
    draw
        (K,): the number of the draw that wrote each.
    temperature
        T of the posterior.
    """
    task = CausalLM().at(temperature)
    read = TokenPrediction.collect([_read(task, one) for one in scored], task)
    assert read.log_likelihood is not None
    longest = read.entropy.shape[1]
    ids = [torch.tensor([*text], dtype=torch.long) for text in texts]
    sequences = pad_sequence(ids, batch_first=True)
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in ids], batch_first=True)
    assert sequences.shape[1] == longest
    return Generation(
        sequences=sequences[None],
        mask=mask[None],
        draw=draw,
        log_likelihood=read.log_likelihood[:, None],
        entropy=read.entropy[None],
        aleatoric=read.aleatoric[None],
    )


def token_scores(scored: Scored, temperature: float, alternatives: int) -> TokenScores:
    """Return log p̄ of each token, and of the likeliest ones; these need the whole vocabulary."""
    tempered = (scored.logits / temperature).log_softmax(-1)
    logs = tempered.logsumexp(0) - torch.tensor(float(len(tempered))).log()
    chosen = logs.gather(-1, scored.labels[:, None]).squeeze(-1)
    if scored.tokens is None:
        assert not alternatives
        empty = logs[:, :0]
        return TokenScores(chosen, empty.long(), empty)
    best = logs.topk(min(alternatives, logs.shape[-1]), dim=-1)
    return TokenScores(chosen, scored.tokens[best.indices], best.values)


def _read(task: CausalLM, scored: Scored) -> dict[str, Tensor]:
    """Return the record of one continuation; the place before it predicts its first token."""
    first = torch.tensor([IGNORED])
    labels = torch.cat([first, scored.labels])[None]
    output = torch.nn.functional.pad(scored.logits, (0, 0, 0, 1))[:, None]  # the last predicts none
    batch = {"input_ids": labels.clamp(min=0), LABELS: labels}
    return TokenPrediction.reduce(task, [output], batch)

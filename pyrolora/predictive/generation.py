"""Continuations of texts, with the uncertainty of every token under the draws of a posterior."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import combinations
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyrolora.predictive.meanings import Same, SemanticEntropy, Weights, semantic_entropy
from pyrolora.tasks.prediction import log_mean_exp


@dataclass(frozen=True)
class Generation:
    """K continuations of each of n prompts, with their scores under S draws.

    Draw s writes its continuations as one function, with the same weights for every token; all S
    draws then read all of them. With p_s(·) = p(· | the tokens before, draw s) and
    p̄ = mean_s p_s, each token's uncertainty splits as H[p̄] = mean_s H[p_s] + mutual information
    (Malinin and Gales 2021, ICLR: `log_predictive` is the expectation of products, and the
    entropies are those of the product of expectations).

    Attributes
    ----------
    sequences, mask
        Token ids of the continuations, (n, K, T), and which of them count: those up to the first
        end of text, including it.
    draw
        (K,): the number of the draw that wrote each, as in ``draws``; without, its place.
    log_likelihood
        log p(continuation | prompt, draw), (S, n, K), in nats, for every draw.
    entropy, aleatoric
        (n, K, T), in nats per token; NaN where `mask` is false.
    prompts, texts
        The texts, n and n x K, or None without a tokenizer.
    tokens
        The text of each counted token, n x K lists, or None without a tokenizer.
    """

    sequences: Tensor
    mask: Tensor
    draw: Tensor
    log_likelihood: Tensor
    entropy: Tensor
    aleatoric: Tensor
    prompts: list[str] | None = None
    texts: list[list[str]] | None = None
    tokens: list[list[list[str]]] | None = None

    def __repr__(self) -> str:
        n, count, length = self.sequences.shape
        return (
            f"Generation(prompts={n}, continuations={count}, draws={len(self.log_likelihood)}, "
            f"tokens<={length})"
        )

    @property
    def epistemic(self) -> Tensor:
        """The mutual information of token and draw, (n, K, T)."""
        return (self.entropy - self.aleatoric).clamp(min=0)

    @property
    def num_tokens(self) -> Tensor:
        """The number of tokens of each continuation, (n, K)."""
        return self.mask.sum(-1)

    @property
    def log_predictive(self) -> Tensor:
        """The log-likelihood log mean_s p(continuation | prompt, draw s), (n, K), in nats."""
        return log_mean_exp(self.log_likelihood)

    @property
    def agreement(self) -> Tensor:
        """The similarity of the texts that different draws write, (n,), from 0 to 1.

        The mean of 2 M / T over pairs of continuations of different draws, with M the tokens in
        matching blocks and T those of both (``difflib.SequenceMatcher``). NaN for one draw.
        """
        writers = self.draw.tolist()
        pairs = [
            (a, b) for a, b in combinations(range(len(writers)), 2) if writers[a] != writers[b]
        ]
        agreements = []
        for sequences, mask in zip(self.sequences, self.mask, strict=True):
            ids = [row[kept].tolist() for row, kept in zip(sequences, mask, strict=True)]
            ratios = [SequenceMatcher(None, ids[a], ids[b], False).ratio() for a, b in pairs]
            agreements.append(sum(ratios) / len(ratios) if ratios else float("nan"))
        return torch.tensor(agreements, dtype=torch.float32)

    def semantic_entropy(
        self, same: Same, *, weights: Weights = "likelihood", per_token: bool = False
    ) -> SemanticEntropy:
        """Return the entropy of what the continuations mean, split within and between draws.

        Parameters
        ----------
        same
            A function ``same(prompt, first, second)``, true where two texts mean the same; or
            `pyrolora.predictive.Entailment` of a model of natural language inference, or
            `pyrolora.predictive.Similarity` of an embedding.
        weights
            ``"likelihood"``: a continuation weighs as much as each draw finds it likely.
            ``"frequency"``: each weighs the same, and the draws that wrote it are its own; the
            parts within and between then need several continuations per draw.
        per_token
            Likelihoods are those per token, so that long texts are at no disadvantage.

        Raises
        ------
        DataError
            Without texts.
        """
        return semantic_entropy(self, same, weights=weights, per_token=per_token)

    def to_pandas(self) -> pd.DataFrame:
        """Return a table with one row per continuation.

        Its columns are ``prompt`` and ``draw`` (numbers), ``text``, ``num_tokens``, ``nll`` (of the
        mixture over draws), ``entropy``, ``aleatoric``, ``epistemic`` (means over tokens; nats per
        token), and ``agreement`` of the prompt's draws.
        """
        n, count, _ = self.sequences.shape
        columns: dict[str, Any] = {
            "prompt": torch.arange(n).repeat_interleave(count).numpy(),
            "draw": self.draw.repeat(n).numpy(),
        }
        if self.texts is not None:
            columns["text"] = [text for texts in self.texts for text in texts]
        columns["num_tokens"] = self.num_tokens.flatten().numpy()
        columns["nll"] = (-self.log_predictive / self.num_tokens).flatten().numpy()
        for name in ("entropy", "aleatoric", "epistemic"):
            columns[name] = getattr(self, name).nanmean(-1).flatten().numpy()
        columns["agreement"] = self.agreement.repeat_interleave(count).numpy()
        return pd.DataFrame(columns)

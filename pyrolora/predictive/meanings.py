"""Semantic entropy: the uncertainty of what texts mean, and not of how they are put."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from pyrolora.checks import one_of, share, true_or_false, whole_number
from pyrolora.errors import ConfigError, DataError
from pyrolora.model import evaluating
from pyrolora.tasks.prediction import entropy_of

if TYPE_CHECKING:
    from pyrolora.predictive.generation import Generation

Same = Callable[[str, str, str], bool]
"""Whether two answers to a prompt mean the same: ``same(prompt, first, second)``."""
Weights = Literal["likelihood", "frequency"]


@dataclass(frozen=True)
class SemanticEntropy:
    """The entropy of the meaning of an answer, in nats, split within and between draws.

    K continuations of a prompt fall into clusters c of one meaning. With p_s(c), the probability of
    a meaning under draw s, and p̄ = mean_s p_s, the entropy splits as for tokens:

        H[p̄] = mean_s H[p_s] + mutual information of meaning and draw.

    References: Kuhn, Gal and Farquhar (2023), ICLR; Farquhar et al. (2024), Nature 630, 625-630.

    Attributes
    ----------
    clusters
        The number of the meaning of each continuation, (n, K), from 0 in order of appearance.
    draws
        p_s(c), (S, n, C), 0 for meanings that a prompt does not have; NaN where no draw has more
        than one continuation to tell its own p_s by.
    probs
        p̄(c), (n, C).
    """

    clusters: Tensor
    draws: Tensor
    probs: Tensor

    @property
    def entropy(self) -> Tensor:
        """H[p̄], the semantic entropy, (n,)."""
        return entropy_of(self.probs) + 0.0  # not -0

    @property
    def aleatoric(self) -> Tensor:
        """mean_s H[p_s], the part within draws, (n,); NaN where p_s is not known."""
        return entropy_of(self.draws).mean(0) + 0.0

    @property
    def epistemic(self) -> Tensor:
        """H[p̄] − mean_s H[p_s] >= 0, the part between draws, (n,); NaN where p_s is not known."""
        return (self.entropy - self.aleatoric).clamp(min=0)

    @property
    def confidence(self) -> Tensor:
        """The probability of the meaning of each continuation, (n, K)."""
        return self.probs.gather(-1, self.clusters)


def semantic_entropy(
    generation: Generation,
    same: Same,
    *,
    weights: Weights = "likelihood",
    per_token: bool = False,
) -> SemanticEntropy:
    """Return the semantic entropy of continuations, as `Generation.semantic_entropy` has it."""
    one_of("weights", weights, Weights)
    true_or_false("per_token", per_token)
    if generation.texts is None or generation.prompts is None:
        raise DataError(
            "meanings are those of texts, and there are only token ids; generate with a tokenizer, "
            "pyrolora.load(folder, tokenizer=...)"
        )
    if not callable(same):
        raise ConfigError(
            "same must be a function same(prompt, first, second), or pyrolora.predictive."
            f"Entailment(model) or Similarity(encode), got {same!r:.60}"
        )
    pairs = zip(generation.prompts, generation.texts, strict=True)
    clusters = torch.tensor([meanings(prompt, texts, same) for prompt, texts in pairs])
    if weights == "frequency":
        if per_token:
            raise ConfigError("per_token=True is for weights='likelihood'; counts have no tokens")
        return by_frequency(clusters, generation.draw)
    scores = generation.log_likelihood
    if per_token:
        scores = scores / generation.num_tokens
    return by_likelihood(clusters, scores, _repeated(generation))


def meanings(prompt: str, texts: Sequence[str], same: Same) -> list[int]:
    """Return the number of the meaning of each text.

    Each text joins the first cluster whose first text means the same, or opens another (algorithm 1
    of Kuhn et al. 2023). Texts that are equal are not compared.
    """
    known: dict[str, int] = {}
    first: list[str] = []
    several = getattr(same, "several", None)
    for text in texts:
        if text in known:
            continue
        answers = (
            several(prompt, text, first) if several else (same(prompt, old, text) for old in first)
        )
        known[text] = next((c for c, yes in enumerate(map(_verdict, answers)) if yes), len(first))
        if known[text] == len(first):
            first.append(text)
    return [known[text] for text in texts]


def _verdict(answer: Any) -> bool:
    """Return what ``same`` answered; raise `ConfigError` for a score, any of which would count."""
    if not isinstance(answer, bool | np.bool_):
        raise ConfigError(
            f"same(prompt, first, second) must return True or False, got {answer!r:.60}; of a "
            "score say from where on two texts mean the same"
        )
    return bool(answer)


def by_frequency(clusters: Tensor, writers: Tensor) -> SemanticEntropy:
    """Return p_s as the share of each meaning among the continuations that draw s wrote.

    It is the discrete semantic entropy of Farquhar et al. (2024).

    Parameters
    ----------
    clusters
        The meanings, (n, K).
    writers
        The draw that wrote each continuation, (K,).
    """
    one_hot = torch.nn.functional.one_hot(clusters).float()  # (n, K, C)
    draws = torch.stack([one_hot[:, writers == s].mean(1) for s in writers.unique()])
    probs = draws.mean(0)
    if len(draws) > 1 and len(draws) == len(writers):  # one each tells nothing of its own spread
        draws = torch.full_like(draws, torch.nan)
    return SemanticEntropy(clusters, draws, probs)


def by_likelihood(
    clusters: Tensor, scores: Tensor, repeated: Tensor | None = None
) -> SemanticEntropy:
    """Return p_s(c) ∝ Σ_{k in c} p(continuation k | draw s), over the different continuations.

    Every draw scores what every other wrote, so that one continuation per draw is enough.

    Parameters
    ----------
    clusters
        The meanings, (n, K).
    scores
        log p(continuation | prompt, draw), (S, n, K).
    repeated
        Which continuations are the same tokens as an earlier one, (n, K), and count no more.
    """
    if repeated is not None:
        scores = scores.masked_fill(repeated, -torch.inf)
    member = torch.nn.functional.one_hot(clusters).bool()  # (n, K, C)
    shares = scores.double().softmax(-1)
    draws = torch.einsum("snk,nkc->snc", shares, member.double()).float()
    return SemanticEntropy(clusters, draws, draws.mean(0))


def _repeated(generation: Generation) -> Tensor:
    """Return which continuations repeat the tokens of an earlier one, (n, K)."""

    def rows() -> Iterator[list[bool]]:
        for sequences, mask in zip(generation.sequences, generation.mask, strict=True):
            ids = [tuple(row[kept].tolist()) for row, kept in zip(sequences, mask, strict=True)]
            yield [row in ids[:k] for k, row in enumerate(ids)]

    return torch.tensor([*rows()])


class Entailment:
    """Says that two answers mean the same where each entails the other.

    A model of natural language inference reads "prompt answer" for both, in both orders, and has to
    find entailment likeliest twice.

    Parameters
    ----------
    model
        A classifier of pairs of texts with a class named entailment: its folder or name, or the
        network itself.
    tokenizer
        Its tokenizer; None: that of the folder.
    with_prompt
        Whether the model reads the prompt before each answer.
    batch_size
        Pairs per pass.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        with_prompt: bool = True,
        batch_size: int = 32,
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        true_or_false("with_prompt", with_prompt)
        whole_number("batch_size", batch_size, at_least=1)
        source = getattr(getattr(model, "config", None), "name_or_path", None) or model
        if not isinstance(model, torch.nn.Module):
            try:
                model = AutoModelForSequenceClassification.from_pretrained(model)
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"cannot load the model of entailment {source!r}: {error}; give a folder or a "
                    "name on the hub of a classifier of pairs of texts"
                ) from error
        self.model = model
        self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(source)
        self.with_prompt, self.batch_size = with_prompt, batch_size
        self.entailment = _entailment_class(model)

    def __call__(self, prompt: str, first: str, second: str) -> bool:
        return self.several(prompt, first, [second])[0]

    @torch.no_grad()
    def several(self, prompt: str, text: str, others: Sequence[str]) -> list[bool]:
        """Return whether ``text`` means the same as each of the others."""
        with evaluating(self.model):
            return self._several(prompt, text, others)

    def _several(self, prompt: str, text: str, others: Sequence[str]) -> list[bool]:
        before = f"{prompt} " if self.with_prompt else ""
        ways = [(text, other) for other in others] + [(other, text) for other in others]
        found: list[bool] = []
        for start in range(0, len(ways), self.batch_size):
            left, right = zip(*ways[start : start + self.batch_size], strict=True)
            batch = self.tokenizer(
                [before + one for one in left],
                [before + one for one in right],
                padding=True,
                truncation=True,
                return_tensors="pt",
            ).to(self.model.device)
            found += self.model(**batch).logits.argmax(-1).eq(self.entailment).tolist()
        return [one and other for one, other in zip(*_halves(found), strict=True)]


class Similarity:
    """Says that two answers mean the same where the cosine of their embeddings is high.

    Parameters
    ----------
    encode
        A function from a list of texts to their embeddings, (n, d); or an object with such a method
        ``encode``, as the models of sentence-transformers have.
    threshold
        The lowest cosine of texts that mean the same.
    """

    def __init__(self, encode: Any, threshold: float = 0.9) -> None:
        share("threshold", threshold, "(0, 1]")
        self.encode = getattr(encode, "encode", encode)
        if isinstance(encode, str) or not callable(self.encode):
            raise ConfigError(
                "encode must be a function from texts to embeddings, or have a method 'encode', "
                f"got {encode!r:.60}"
            )
        self.threshold = threshold

    def __call__(self, prompt: str, first: str, second: str) -> bool:
        return self.several(prompt, first, [second])[0]

    def several(self, prompt: str, text: str, others: Sequence[str]) -> list[bool]:
        """Return whether ``text`` means the same as each of the others."""
        if not others:
            return []
        vectors = torch.as_tensor(self.encode([text, *others])).double()
        unit = torch.nn.functional.normalize(vectors.flatten(1), dim=-1)
        return (unit[1:] @ unit[0] >= self.threshold - 1e-9).tolist()


def _entailment_class(model: Any) -> int:
    """Return the number of the class entailment; raise `ConfigError` if there is no such one."""
    names = getattr(model.config, "id2label", None) or {}
    found = [int(i) for i, name in names.items() if str(name).lower() == "entailment"]
    if len(found) != 1:
        raise ConfigError(
            "the model of entailment needs one class named 'entailment', and its classes are "
            f"{[*names.values()]}; set model.config.id2label if they have other names"
        )
    return found[0]


def _halves(values: list[bool]) -> tuple[list[bool], list[bool]]:
    middle = len(values) // 2
    return values[:middle], values[middle:]

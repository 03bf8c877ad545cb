"""Scores of generated answers: how many are right, and which uncertainty finds the wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.columns import INPUTS
from pyrolora.data.examples import as_examples, is_plain
from pyrolora.errors import ConfigError, DataError
from pyrolora.predictive.generation import Generation
from pyrolora.predictive.meanings import SemanticEntropy
from pyrolora.predictive.metrics import auroc, binary_calibration_error
from pyrolora.predictive.selective import risks
from pyrolora.predictive.standard_errors import error_of_mean, scatter

Correct = Callable[[Mapping[str, Any], str], bool]
"""Whether an answer is right: ``correct(row, text)``, with the row of the data."""
TRUTH = ("True", "False")


@dataclass(frozen=True)
class GenerationScores:
    """How often generated answers are right, and how well uncertainties tell which are wrong.

    Attributes
    ----------
    answers
        One row per prompt: ``prompt``, ``text`` (the answer: of all continuations the one that the
        mixture over draws finds likeliest), ``correct``, and the uncertainties, high where the
        answer is not sure.
    metrics
        One row per uncertainty: ``auroc``, how well it tells wrong answers from right ones (0.5 is
        chance; NaN where all are right, or none); ``aurc``, the mean error rate where only the most
        certain are answered; ``ece``, the calibration error of the probability that an answer is
        right, of uncertainties that state one (NaN for others); and the standard errors of these,
        ``auroc_se``, ``aurc_se``, ``ece_se``, by the bootstrap over prompts.
    accuracy, accuracy_se
        The share of right answers, and its standard error.
    """

    answers: pd.DataFrame
    metrics: pd.DataFrame
    accuracy: float
    accuracy_se: float

    def __repr__(self) -> str:
        return (
            f"GenerationScores(prompts={len(self.answers)}, accuracy={self.accuracy:.3f} ± "
            f"{self.accuracy_se:.3f})\n{self.metrics.round(3)}"
        )


def rows_to_answer(data: Any) -> list[dict[str, Any]]:
    """Return the rows of a data set as `Posterior.generate` takes them, with all columns."""
    rows = as_examples(data, INPUTS, defaults.SCORE_SPLITS)
    if not is_plain(rows):
        raise DataError(
            f"evaluate_generation() needs rows with prompts and right answers, got a "
            f"{type(data).__name__}; pass a datasets.Dataset or a list of dicts"
        )
    return [dict(row) for row in rows]


def asked_of(rows: Sequence[Mapping[str, Any]], correct: Any) -> list[dict[str, Any]]:
    """Return the rows without the column of the right answers."""
    return [{name: value for name, value in row.items() if name != correct} for row in rows]


def likeliest(generation: Generation) -> Tensor:
    """Return the continuation of each prompt that the mixture over draws finds likeliest, (n,)."""
    return generation.log_predictive.argmax(-1)


def uncertainties(
    generation: Generation,
    semantic: SemanticEntropy | None = None,
    p_true: Tensor | None = None,
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return the uncertainties of the likeliest answers, (n,), and the probabilities they state.

    ``nll`` is −log p̄ of the whole answer, in nats, and ``nll_per_token`` its mean over tokens;
    ``entropy`` and ``epistemic`` are means over its tokens; ``lexical`` is 1 − `Generation
    .agreement`. With ``semantic`` there are ``semantic_entropy``, ``semantic_epistemic`` and
    ``meaning``, 1 minus the probability of the answer's meaning; with ``p_true`` (S, n, K),
    ``p_true``, 1 minus its mean over draws.
    """
    best = likeliest(generation)[:, None]

    def of_best(values: Tensor) -> Tensor:
        return values.gather(1, best)[:, 0]

    nll = of_best(-generation.log_predictive)
    each = nll / of_best(generation.num_tokens).clamp(min=1)
    found: dict[str, tuple[Tensor, Tensor | None]] = {
        "nll": (nll, (-nll).exp()),
        "nll_per_token": (each, (-each).exp()),
        "entropy": (of_best(generation.entropy.nanmean(-1)), None),
        "epistemic": (of_best(generation.epistemic.nanmean(-1)), None),
    }
    if not bool(generation.agreement.isnan().any()):
        found["lexical"] = (1 - generation.agreement, generation.agreement)
    if semantic is not None:
        found["semantic_entropy"] = (semantic.entropy, None)
        if not bool(semantic.epistemic.isnan().any()):
            found["semantic_epistemic"] = (semantic.epistemic, None)
        meaning = of_best(semantic.confidence)
        found["meaning"] = (1 - meaning, meaning)
    if p_true is not None:
        true = of_best(p_true.mean(0))
        found["p_true"] = (1 - true, true)
    return found


def scored_answers(
    generation: Generation,
    rows: Sequence[Mapping[str, Any]],
    correct: Correct | str,
    *,
    semantic: SemanticEntropy | None = None,
    p_true: Tensor | None = None,
    seed: int = 0,
) -> GenerationScores:
    """Return the scores of generated answers.

    Parameters
    ----------
    generation
        The continuations.
    rows
        The examples that the prompts are of.
    correct
        A function ``correct(row, text)``, true for a right answer; or the name of the column with
        the right answer, or with a list of them, which a right text equals but for case,
        punctuation and articles (SQuAD's exact match).
    semantic, p_true
        The meanings of the continuations, and the probabilities that they are true, (S, n, K).
    seed
        Seed of the bootstrap samples.

    Raises
    ------
    DataError
        Without texts, for a column that the rows lack, or other numbers of rows and prompts.
    """
    if generation.texts is None or generation.prompts is None:
        raise DataError(
            "answers are texts, and there are only token ids; generate with a tokenizer, "
            "pyrolora.load(folder, tokenizer=...)"
        )
    if len(rows) != len(generation.texts):
        raise DataError(
            f"there are {len(generation.texts)} prompts and {len(rows)} rows; give the rows that "
            "the prompts are of"
        )
    best = likeliest(generation).tolist()
    texts = [texts[k] for texts, k in zip(generation.texts, best, strict=True)]
    right = torch.tensor([*map(judge(correct, rows), rows, texts)])
    measured = uncertainties(generation, semantic, p_true)
    columns = {name: values.numpy() for name, (values, _) in measured.items()}
    answers = pd.DataFrame(
        {"prompt": generation.prompts, "text": texts, "correct": right.numpy(), **columns}
    )
    metrics = {name: _metrics(values, p, right, seed) for name, (values, p) in measured.items()}
    share = right.double()
    return GenerationScores(
        answers,
        pd.DataFrame.from_dict(metrics, orient="index").rename_axis("uncertainty"),
        float(share.mean()),
        error_of_mean(share.numpy()),
    )


def judge(
    correct: Correct | str, rows: Sequence[Mapping[str, Any]]
) -> Callable[[Mapping[str, Any], str], bool]:
    """Return the function that says whether an answer is right."""
    if isinstance(correct, str):
        columns = sorted({*rows[0]}) if rows else []
        if correct not in columns:
            raise DataError(
                f"correct={correct!r} is no column of the data, which have {columns}; name the one "
                "with the right answers, or pass a function correct(row, text)"
            )
        return lambda row, text: _matches(text, row[correct])
    if not callable(correct):
        raise ConfigError(
            "correct must be a function correct(row, text), or the name of the column with the "
            f"right answers, got {correct!r:.60}"
        )

    def judged(row: Mapping[str, Any], text: str) -> bool:
        verdict = correct(row, text)
        if not isinstance(verdict, bool | np.bool_):
            raise ConfigError(
                f"correct(row, text) must return True or False, got {verdict!r:.60}; of a score "
                "say from where on an answer is right"
            )
        return bool(verdict)

    return judged


def _matches(text: str, known: Any) -> bool:
    """Return whether a text is one of the right ones, as SQuAD's exact match has it."""
    from torchmetrics.functional.text import squad

    options = [known] if isinstance(known, str) else known
    if not isinstance(options, list | tuple) or not all(isinstance(one, str) for one in options):
        raise DataError(
            f"the right answer of an example must be a text or a list of texts, got {known!r:.60}"
        )
    if not options:
        return False
    target = {"answers": {"text": [*options], "answer_start": [0] * len(options)}, "id": "0"}
    return float(squad({"prediction_text": text, "id": "0"}, target)["exact_match"]) > 0


def _metrics(
    uncertainty: Tensor, confidence: Tensor | None, right: Tensor, seed: int
) -> dict[str, float]:
    """Return the metrics of one uncertainty, each with its standard error."""

    def measured(rows: Tensor) -> dict[str, float]:
        scores, good = uncertainty[rows], right[rows]
        ece = float("nan")
        if confidence is not None:
            ece = binary_calibration_error(confidence[rows], good)
        return {
            "auroc": auroc(scores[good], scores[~good]),
            "aurc": float(risks(scores, (~good).float()).mean()),
            "ece": ece,
        }

    n, rng = len(right), np.random.default_rng(seed)
    samples = [measured(torch.from_numpy(rng.integers(0, n, n))) for _ in range(defaults.RESAMPLES)]
    found: dict[str, float] = {}
    for name, value in measured(torch.arange(n)).items():
        resampled = np.array([sample[name] for sample in samples])
        found |= {name: value, f"{name}_se": scatter(resampled) if n > 1 else float("nan")}
    return found


def truth_rows(generation: Generation, *, ideas: int) -> list[dict[str, Any]]:
    """Return a question per continuation, whether this answer is true or false.

    It is the one of Kadavath et al. (2022, arXiv 2207.05221, section 4), in which the model first
    reads some of its answers to the same prompt, ``ideas`` of them.
    """
    if generation.texts is None or generation.prompts is None:
        raise DataError(
            "p_true asks about texts, and there are only token ids; generate with a tokenizer, "
            "pyrolora.load(folder, tokenizer=...)"
        )
    rows = []
    for prompt, texts in zip(generation.prompts, generation.texts, strict=True):
        seen = [*dict.fromkeys(text.strip() for text in texts)][:ideas]
        before = "".join(f"{one}\n" for one in ["Here are some brainstormed ideas:", *seen])
        for text in texts:
            question = f"Question: {prompt.strip()}\n{before if seen else ''}"
            question += f"Possible answer: {text.strip()}\nIs the possible answer:"
            rows.append({"question": question, "choices": [*TRUTH]})
    return rows

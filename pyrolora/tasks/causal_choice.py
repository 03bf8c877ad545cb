"""Choices by a causal language model: by the letters of options, or by the texts themselves."""

from __future__ import annotations

from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pyrolora.columns import CHOICE_PLACES, CHOICE_TOKENS, COMPLETION_MASK, IGNORED, Batch
from pyrolora.data import Collator
from pyrolora.data.choice_prompts import encode_continuations, encode_lettered
from pyrolora.data.columns import CHOICES, context_columns
from pyrolora.data.padding import MASK
from pyrolora.distributions import LogitsCategorical
from pyrolora.errors import ConfigError, DataError
from pyrolora.tasks.base import Task
from pyrolora.tasks.causal_lm import CausalLM
from pyrolora.tasks.checkpoint import Checkpoint
from pyrolora.tasks.multiple_choice import IMPOSSIBLE, ChoiceCollator, MultipleChoice
from pyrolora.tasks.unsupported import classes_of

# Networks without logits of the tokens that come next.
_OTHERS = ("SEQUENCE_CLASSIFICATION", "MULTIPLE_CHOICE", "TOKEN_CLASSIFICATION", "MASKED_LM")


class LetterCollator(Collator):
    """Prompts with lettered options to a batch (b, T), and ``choice_tokens`` (b, choices)."""

    internal = frozenset((CHOICE_TOKENS,))

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        super().__init__(network, tokenizer)
        self.taken.add(CHOICE_TOKENS)

    def check_data(self, examples: Any) -> None:
        """Take data with and without choices; `encode` and `check` say what is missing."""

    def encode(self, data: datasets.Dataset) -> tuple[datasets.Dataset, tuple[str, ...]]:
        return encode_lettered(data, self.encoder), (CHOICES, *context_columns(data))

    def check(self, examples: Any, labels: Tensor | None, explicit: set[str]) -> None:
        """Raise `DataError` for examples without letters, and labels that are none of them."""
        for i in range(len(examples)):
            size = len(self._row(examples[i])[1])
            if labels is not None and not 0 <= int(labels[i]) < size:
                raise DataError(
                    f"the label of example {i} is {int(labels[i])}, and its choices are "
                    f"{[*range(size)]}; count the choices from 0"
                )

    def _row(self, example: Any) -> tuple[dict[str, Any], Tensor]:
        """Return the inputs of an example, and the tokens of its letters."""
        row = self.example(example)
        tokens = row.pop(CHOICE_TOKENS, None)
        if tokens is None or len(tokens) == 0:
            raise DataError(
                "choices by their letters are made of texts, a question and its 'choices', and "
                f"this example has {sorted(row)}; an example in tokens needs {CHOICE_TOKENS!r}, "
                "the token of each letter, beside 'input_ids'"
            )
        return row, torch.as_tensor(tokens)

    def __call__(self, examples: list[Any]) -> dict[str, Tensor]:
        rows, letters = zip(*map(self._row, examples), strict=True)
        batch = super().__call__(list(rows))
        batch[CHOICE_TOKENS] = pad_sequence(list(letters), True, IGNORED)
        return batch


class ContinuationCollator(ChoiceCollator):
    """Contexts with each choice to a batch (b, choices, T), and ``choice_places``."""

    internal = frozenset((COMPLETION_MASK,))

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        super().__init__(network, tokenizer)
        self.taken.add(COMPLETION_MASK)

    def encode(self, data: datasets.Dataset) -> tuple[datasets.Dataset, tuple[str, ...]]:
        return encode_continuations(data, self.encoder), (CHOICES, *context_columns(data))

    def choices(self, example: Any) -> tuple[list[dict[str, Any]], list[bool]]:
        rows, mask = super().choices(example)
        for row in rows:
            if COMPLETION_MASK not in row:
                raise DataError(
                    f"choices in tokens need {COMPLETION_MASK!r} beside 'input_ids', 1 at the "
                    "tokens of the choice and 0 before them; or give texts, a question and its "
                    "'choices'"
                )
            if not any(row[COMPLETION_MASK][1:]):
                raise DataError(
                    f"a choice has no token that counts: {COMPLETION_MASK!r} is 0 after its first "
                    "token, which nothing predicts; leave the example out"
                )
        return rows, mask

    def __call__(self, examples: list[Any]) -> dict[str, Tensor]:
        batch = super().__call__(examples)
        counted = batch.pop(COMPLETION_MASK)[..., 1:].ne(0)
        places = counted.int().argsort(dim=-1, descending=True, stable=True)
        own = places.masked_fill(~counted.gather(-1, places), -1)
        batch[CHOICE_PLACES] = own[..., : int(counted.sum(-1).amax())]
        return batch


class CausalChoice(MultipleChoice):
    """Choices by a causal language model, which it stays: draws also write text.

    y ~ Categorical(softmax(f)), with f (..., b, choices) made of the logits of tokens.
    """

    classes = classes_of("CAUSAL_LM")
    auto = "AutoModelForCausalLM"
    short: ClassVar[str]
    """The value of ``choices`` in `pyrolora.fit`."""
    token_temperature: float = 1.0
    """T of the law of each token, of a language model that was not fitted to choose."""

    @classmethod
    def matches(cls, network: nn.Module) -> bool:  # it is always named
        return False

    @classmethod
    def implied(cls, checkpoint: Checkpoint) -> bool:
        return checkpoint.layout == "choices" and checkpoint.is_a("CAUSAL_LM")

    @classmethod
    def call(cls) -> str:
        return f"choices={cls.short!r}"

    def check_network(self, network: nn.Module) -> None:
        super().check_network(network)
        name = type(network).__name__
        if name in classes_of(*_OTHERS) - self.classes:
            raise ConfigError(
                f"{self.name!r} reads the logits of a causal language model, and {name} is none; "
                "load it with AutoModelForCausalLM, or leave choices= and task= out for a network "
                "that scores choices (AutoModelForMultipleChoice)"
            )

    def as_text(self) -> Task:
        return CausalLM()

    def token_logits(self, output: Tensor, ids: Tensor) -> Tensor:
        """Return the logits of tokens at `token_temperature`.

        Raises
        ------
        ConfigError
            Unless they are those of a vocabulary with the tokens ``ids``.
        """
        if output.dim() != 3 or int(ids.max()) >= output.shape[-1]:
            raise ConfigError(
                f"{self.name!r} reads logits (rows, T, vocabulary) with the token {int(ids.max())} "
                f"among them, and the network gives shape {tuple(output.shape)}; pass a causal "
                "language model, with its own tokenizer"
            )
        return output if self.token_temperature == 1 else output / self.token_temperature


class LetterChoice(CausalChoice):
    """Choices by letters: the softmax of the logits of the letters' tokens after a prompt.

    f_c is the logit of the token of letter c at the last token of the prompt, which lists the
    options, so that all choices of an example are read in one pass. The protocol is that of BLoB
    (Wang et al. 2024, NeurIPS). `pyrolora.data.choice_prompts` has the prompt.
    """

    name = "letter-choice"
    reads = "the letter that it writes after lettered options, in one pass"
    short: ClassVar[str] = "letters"
    collator = LetterCollator
    extras = (CHOICE_TOKENS,)

    def places(self, batch: Batch) -> Tensor:
        """Return the place of the last token of each row, (b, 1)."""
        ids = batch["input_ids"]
        mask = batch.get(MASK, torch.ones_like(ids))
        places = torch.arange(ids.shape[-1], device=ids.device)
        return (places * mask.ne(0)).amax(-1, keepdim=True)

    def scores(self, output: Tensor, batch: Batch) -> Tensor:
        letters = batch[CHOICE_TOKENS]
        return self.token_logits(output, letters)[:, 0].gather(-1, letters.clamp(min=0))

    def logits(self, output: Tensor, batch: Batch) -> Tensor:
        return self.tempered(output).masked_fill(batch[CHOICE_TOKENS] < 0, IMPOSSIBLE)


class TextChoice(CausalChoice):
    """Choices by their texts: the softmax of the texts' log-likelihoods after the context.

    f_c = Σ_t log softmax(logits_{t-1})[y_t] over the tokens t of choice c, which follow those that
    it shares with the context alone. An example takes a row per choice.
    """

    name = "text-choice"
    reads = "the likelihood of each choice's text, in a pass per choice"
    short: ClassVar[str] = "texts"
    collator = ContinuationCollator
    extras = (*MultipleChoice.extras, CHOICE_PLACES)
    per_token: ClassVar[bool] = False
    """Whether the mean over a choice's tokens takes the place of their sum."""

    def inputs(self, batch: Batch, network: nn.Module) -> dict[str, Tensor]:
        rows = super().inputs(batch, network)
        return {name: tensor.flatten(0, 1) for name, tensor in rows.items()}

    def places(self, batch: Batch) -> Tensor:
        """Return the places before the tokens of each choice, (b choices, K)."""
        return batch[CHOICE_PLACES].flatten(0, 1).clamp(min=0)

    def scores(self, output: Tensor, batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        logits = self.token_logits(output, ids)
        counted = batch[CHOICE_PLACES].flatten(0, 1) >= 0
        tokens = ids.flatten(0, 1).gather(-1, self.places(batch) + 1)
        picked = LogitsCategorical(logits, validate_args=False).log_prob(tokens)
        sums = torch.where(counted, picked, 0.0).sum(-1)
        values = sums / counted.sum(-1) if self.per_token else sums
        return values.unflatten(0, ids.shape[:2])


class TokenMeanChoice(TextChoice):
    """Choices by their texts, long ones at no disadvantage: f_c is the mean over their tokens."""

    name = "text-choice-per-token"
    reads = "its mean over tokens"
    short: ClassVar[str] = "texts-per-token"
    per_token = True

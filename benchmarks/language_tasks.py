"""Tasks for a language model: prompts, short examples, and networks that answer by likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from common import quiet_loading
from tasks import TASKS, Splits, load_task
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    set_seed,
)
from transformers.modeling_outputs import MultipleChoiceModelOutput

MOST_WORDS = 52  # of an example, a question counted with each of its choices: two cores read slowly
CHOICES = "choices"


@dataclass(frozen=True)
class Prompt:
    """What the model reads, with the names of the task's columns in braces, and the words by which
    it answers: a class each. Where the answers are the choices of an example there are none."""

    text: str
    words: tuple[str, ...] = ()


PROMPTS = {
    "sst2": Prompt("Review: {sentence}\nSentiment:", (" negative", " positive")),
    "trec": Prompt(
        "Question: {sentence}\nAsks for:",
        (" abbreviation", " description", " entity", " human", " location", " number"),
    ),
    "openbookqa": Prompt("Question: {question}\nAnswer:"),
    "arc_easy": Prompt("Question: {question}\nAnswer:"),
    "rte": Prompt("{sentence1}\nDoes it follow that {sentence2}\nAnswer:", (" yes", " no")),
}


class LlamaForChoices(LlamaForCausalLM):
    """A language model whose score of a choice is the mean log-likelihood of the tokens from the
    first on that tells the example's choices apart.

    Input is (b, choices, T), padded on the right; scores are (b, choices). Logits of the vocabulary
    are computed in float32, whatever the network is in: their sum over tokens decides.
    """

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **rest: Any) -> Any:
        shape = input_ids.shape
        own = (input_ids != input_ids[..., :1, :]).any(-2, keepdim=True).cummax(-1).values
        own = (own & attention_mask.bool()).flatten(0, -2)[:, 1:]
        ids = input_ids.flatten(0, -2)
        hidden = self.model(input_ids=ids, attention_mask=attention_mask.flatten(0, -2))[0]
        first = int(own.any(0).nonzero()[0]) if own.any() else 0
        logits = linear(hidden[:, first:-1].float(), self.lm_head.weight.float())
        picked = logits.gather(-1, ids[:, first + 1 :, None]).squeeze(-1) - logits.logsumexp(-1)
        own = own[:, first:]
        scores = (picked * own).sum(-1) / own.sum(-1).clamp(min=1)
        return MultipleChoiceModelOutput(logits=scores.unflatten(0, shape[:-1]))


def load_examples(
    folder: Path, name: str, sizes: tuple[int, int, int], seed: int, most_words: int = MOST_WORDS
) -> Splits:
    """So many examples to train on, held out and scored, none longer than ``most_words``."""
    found = load_task(folder, name, 0, seed)
    pool = prompted(datasets.concatenate_datasets([found.train, found.held_out]), name, most_words)
    scored = prompted(found.scored, name, most_words)
    train, held_out, most = sizes
    if len(pool) < train + held_out:
        raise SystemExit(
            f"{name} has {len(pool)} examples of at most {most_words} words, and {train} to train "
            f"on and {held_out} held out are asked for; lower --examples or --held-out"
        )
    return Splits(
        pool.select(range(train)),
        pool.select(range(train, train + held_out)),
        scored.select(range(min(most, len(scored)))),
        None,
    )


def prompted(data: datasets.Dataset, name: str, most_words: int) -> datasets.Dataset:
    """Short examples as the model reads them: ``text`` and ``label``, or ``question``, ``choices``
    with the space before them, and ``label``."""
    template, by_words = PROMPTS[name].text, PROMPTS[name].words

    def rows(row: dict[str, Any]) -> dict[str, Any]:
        text = template.format(**row)
        if by_words:
            return {"text": text}
        return {"question": text, CHOICES: [f" {choice}" for choice in row[CHOICES]]}

    def short(row: dict[str, Any]) -> bool:
        own = row.get(CHOICES, [""])
        texts = [row[column] for column in TASKS[name].columns if column != CHOICES]
        return sum(len(" ".join([*texts, choice]).split()) for choice in own) <= most_words

    kept = data.filter(short)
    read = ["text"] if by_words else ["question", CHOICES]
    return kept.map(rows).select_columns([*read, "label"])


def load_language_model(folder: Path, name: str, seed: int, dtype: str) -> tuple[nn.Module, Any]:
    """The model for the task. Of a classifier, the head's rows are those of the words'
    first tokens in the output layer: before training its logits are the language model's own."""
    set_seed(seed)
    words = PROMPTS[name].words
    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        whole = LlamaForChoices.from_pretrained(folder, dtype=getattr(torch, dtype))
        if not words:
            return whole, tokenizer
        network = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=getattr(torch, dtype), num_labels=len(words)
        )
    network.config.pad_token_id = tokenizer.pad_token_id
    rows = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    with torch.no_grad():
        network.score.weight.copy_(whole.lm_head.weight[rows])
    return network, tokenizer

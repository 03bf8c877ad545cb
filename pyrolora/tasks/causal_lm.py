"""Causal language modelling: the labelled tokens of a text, each predicted by those before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pyrolora.columns import COMPLETION_MASK, IGNORED, LABELS
from pyrolora.data import Collator, TextOptions
from pyrolora.data.chats.completions import DialogueEncoder
from pyrolora.data.chats.cutting import cut_rows
from pyrolora.data.chats.dialogues import dialogue_of
from pyrolora.data.columns import (
    ASSISTANT_MASKS,
    CHOICES,
    TOKEN_MASKS,
    check_nested,
    check_preferences,
    has_choices,
)
from pyrolora.data.encoding import Encoder
from pyrolora.data.examples import is_plain
from pyrolora.data.media.illustrated import Illustrator
from pyrolora.data.padding import MASK
from pyrolora.data.tokenising import encode_texts, no_tokens
from pyrolora.errors import DataError
from pyrolora.tasks.checkpoint import Checkpoint
from pyrolora.tasks.tokens import LanguageModel, check_own_tokens
from pyrolora.tasks.unsupported import classes_of


class CausalCollator(Collator):
    """Texts to a batch of tokens that are their own labels, unless the data have labels."""

    per_token = True
    makes_labels = True
    beside = (MASK, *TOKEN_MASKS)
    ends_texts = True
    reads_pictures = True
    reads_texts = True

    def check_data(self, examples: Any) -> None:
        if is_plain(examples):
            check_preferences(examples.column_names)
        if has_choices(examples) and is_plain(examples) and CHOICES in examples.column_names:
            raise DataError(
                "the data has a column 'choices', and a language model learns to choose in two "
                "ways: choices='letters', by the letter that it writes after a list of options "
                "(one pass per example), or choices='texts', by the likelihood of each choice's "
                "text (a pass per choice; 'texts-per-token' takes the mean over tokens). To learn "
                "whole texts, join the question and the right choice in one column, 'text'"
            )

    @property
    def encoder(self) -> Encoder:
        encoder, most = super().encoder, self.reading.max_length
        if most is None or most >= encoder.limit:
            return encoder
        source = "at max_length, which texts=TextOptions(max_length=...) sets"
        return replace(encoder, limit=most, source=source)

    def encode(self, data: datasets.Dataset) -> tuple[datasets.Dataset, tuple[str, ...]]:
        """Return the tokens of texts, or the tokens and labels of chats and completions."""
        if isinstance(self.media, Illustrator):
            return self.media.encode(data, self.encoder, self.reading)
        dialogue = dialogue_of(data, self.reading)
        if dialogue is None:
            check_nested(data)
            return data, ()
        check_nested(data.remove_columns([*dialogue.columns]))
        encode = DialogueEncoder(dialogue, self.encoder, self.reading)
        if dialogue.kind == "text":
            encode.check(data)
            return encode_texts(data, dialogue.prompt, self.encoder), dialogue.prompt
        return encode(data), dialogue.columns

    def complete(self, examples: Any, *, need_labels: bool) -> Any:
        """Cut rows that came as tokens, where the user says how long they may be."""
        return (
            examples
            if self.texts is None
            else cut_rows(examples, self.encoder, self.texts.max_length)
        )

    def labels_of(self, row: Mapping[str, Any], mask: list[int] | None) -> Any:
        labels = row.get(LABELS)
        missing = LABELS in row and labels is None
        if missing or "input_ids" not in row or "input_ids" not in self.taken:
            return labels
        return token_labels(row, labels, mask, self.reading)

    def places_read(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        labels = batch.get(LABELS)
        return None if labels is None else F.pad(labels[:, 1:].ne(IGNORED), (0, 1))

    def packs(self, row: Mapping[str, Any]) -> bool:
        return is_packed(row)

    def check(self, examples: Any, labels: Tensor | None, explicit: set[str]) -> None:
        """Raise `DataError` for texts without a token to predict, and labels of other texts."""
        labelled = is_plain(examples) and LABELS in examples.column_names  # of dialogues, which
        if labels is not None and not explicit and not labelled:  # warn themselves
            short = labels[:, 1:].ne(IGNORED).sum(1).eq(0).nonzero().flatten().tolist()
            if short:
                need = "no token to predict (a text's first has none before it)"
                raise DataError(no_tokens(short, need))
        if labels is not None and LABELS in explicit:
            check_own_tokens(examples, self, causal=True)


class CausalLM(LanguageModel):
    """Causal language modelling: each token of a text, predicted by those before it.

    log p(y) of an example is the **sum** over its labelled tokens, t = 1..T-1, of
    log softmax(f_{t-1})[y_t]. Without labels every token is its own label.
    """

    name = "text-generation"
    reads = "the text alone"
    aliases = ("causal-lm", "image-text-to-text")
    collator = CausalCollator
    classes = classes_of("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")
    auto = "AutoModelForCausalLM"
    writes = "on"
    serves = "text"
    shift = 1
    title = "a causal language model"

    @classmethod
    def matches(cls, network: nn.Module) -> bool:
        config: Any = getattr(network, "config", None)
        return super().matches(network) and not getattr(config, "is_encoder_decoder", False)

    @classmethod
    def implied(cls, checkpoint: Checkpoint) -> bool:
        layouts = (None, "tokens", "example", "labels", "spans")  # the text alone may be meant
        return checkpoint.continues and checkpoint.layout in layouts

    @classmethod
    def load(cls, checkpoint: Checkpoint, like: nn.Module | None = None) -> PreTrainedModel:
        if not checkpoint.writes_of_pictures:
            return super().load(checkpoint, like)
        loader = transformers.AutoModelForImageTextToText
        return loader.from_pretrained(checkpoint.name, dtype="auto")


def token_labels(
    row: Mapping[str, Any], labels: Any, made: list[int] | None, texts: TextOptions
) -> Any:
    """Return the labels of an example: its tokens, or ``labels`` checked against them.

    Padding does not count, nor what a padding would predict, nor what a mask of the completion or
    of the assistant leaves out. ``made`` is the attention mask of a row that came without one:
    there a label that is padding does not count. ``texts`` says what is learnt of tokens without
    labels.
    """
    ids = torch.as_tensor(row["input_ids"])
    mask = row.get(MASK, made)
    seen = torch.ones_like(ids).bool() if mask is None else torch.as_tensor(mask) != 0
    counted = _counted(row, len(ids), texts if labels is None else TextOptions())
    if labels is None:
        seen[1:] &= seen[:-1].clone()
        if is_packed(row):  # what begins a text is not predicted by the one before
            seen &= torch.as_tensor(row["position_ids"]) != 0
        if counted is not None:
            seen &= counted
        return ids.masked_fill(~seen, IGNORED).tolist()
    kept = torch.as_tensor(labels)
    if kept.dim() == 1 and len(kept) != len(ids):
        raise DataError(
            f"an example has {len(ids)} tokens and {len(kept)} labels; a causal language model "
            "has a label per token of its input, -100 where it does not count"
        )
    if kept.shape != ids.shape:
        return labels
    if counted is not None and not torch.equal((kept != IGNORED)[1:], (counted & seen)[1:]):
        raise DataError(
            "'labels' and the mask of the completion say different things about which tokens "
            "count; leave one of them out"
        )
    unread = kept.eq(ids) & ~seen if made is not None else torch.zeros_like(seen)
    return kept.masked_fill(unread, IGNORED).tolist()


def _counted(row: Mapping[str, Any], size: int, texts: TextOptions) -> Tensor | None:
    """Return which tokens count, where masks say so: those of the completion, of the assistant."""
    masks = {n: torch.as_tensor(row[n]) != 0 for n in TOKEN_MASKS if row.get(n) is not None}
    if any(mask.shape != (size,) for mask in masks.values()):
        raise DataError(f"{sorted(masks)} must have a number per token, {size} of them")
    said = [masks[name] for name in ASSISTANT_MASKS if name in masks]
    if len(said) > 1 and not torch.equal(*said):
        raise DataError(
            f"{list(ASSISTANT_MASKS)} say different things about which tokens count; keep one of "
            "them"
        )
    if texts.assistant_only_loss and not said:
        raise DataError(
            "assistant_only_loss=True, and an example of tokens has no 'assistant_masks'; add "
            "them (tokenizer.apply_chat_template(..., return_assistant_tokens_mask=True)), or pass "
            "the chats as 'messages'"
        )
    if texts.completion_only_loss and COMPLETION_MASK not in masks:
        raise DataError(
            "completion_only_loss=True, and an example of tokens has no 'completion_mask'; add it, "
            "or pass 'prompt' and 'completion' as texts"
        )
    if texts.completion_only_loss is False:
        masks.pop(COMPLETION_MASK, None)
    return torch.stack([*masks.values()]).all(0) if masks else None


def is_packed(row: Mapping[str, Any]) -> bool:
    """Return whether several texts stand in one row, each with positions from 0.

    Raises
    ------
    DataError
        With an ``attention_mask``, under which the texts would see each other.
    """
    if row.get("position_ids") is None:
        return False
    positions = torch.as_tensor(row["position_ids"])
    seen = torch.as_tensor(row.get(MASK, torch.ones_like(positions))) != 0
    if positions.dim() != 1 or seen.shape != positions.shape:
        return False
    jumps = (positions.diff() != 1) & seen[1:] & seen[:-1]
    if jumps.any() and MASK in row:
        raise DataError(
            "an example packs several texts (its position_ids start again), and with an "
            "attention_mask they would see each other; leave attention_mask out"
        )
    return bool(jumps.any())

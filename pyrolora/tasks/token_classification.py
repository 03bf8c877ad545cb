"""Token classification: one tag per word, such as named entities and parts of speech."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrolora.columns import IGNORED, LABELS, Batch
from pyrolora.data import Collator
from pyrolora.data.columns import (
    TAG_COLUMNS,
    TARGETS,
    check_text,
    is_list,
    tags_column,
    text_columns,
    warn_unread,
    words_column,
)
from pyrolora.data.encoding import WORD_IDS, Encoder
from pyrolora.data.examples import is_plain, mapped
from pyrolora.data.inputs import encoder_for
from pyrolora.data.labels import class_names, known_names, numbered, with_column
from pyrolora.data.multi_hot import flat_labels
from pyrolora.data.padding import MASK
from pyrolora.data.target import Target
from pyrolora.data.tokenising import warn_cut
from pyrolora.data.words import check_tokenizer, check_words, first_tokens, lost_words, warn_lost
from pyrolora.errors import ConfigError, DataError
from pyrolora.tasks.checkpoint import Checkpoint
from pyrolora.tasks.heads import load_head, outputs_like, outputs_of
from pyrolora.tasks.tag_prediction import TagPrediction
from pyrolora.tasks.tokens import TokenTask
from pyrolora.tasks.unsupported import classes_of

COUNTED = "counted_tokens"
"""The column that says, without labels, which tokens get a prediction."""
LOST = "lost_words"
"""The column, while words are encoded, with those that the tokenizer has no token for."""
OTHER_HEADS = classes_of("SEQUENCE_CLASSIFICATION", "MULTIPLE_CHOICE")
"""Classes whose heads have the same name as one for tokens, and another meaning."""


class TagCollator(Collator):
    """Words with a tag each, or tokens with a label each, to a batch of tokens and labels.

    The first token of a word has its tag, the others -100. Without tags, `COUNTED` marks the first
    tokens of words; in tokenised data, all tokens but special ones.
    """

    targets = "'labels', 'label', 'ner_tags' or 'tags' with a list, of a label per word or token"
    per_token = True
    internal = frozenset({COUNTED})

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        super().__init__(network, tokenizer)
        self.taken.add(COUNTED)

    @property
    def encoder(self) -> Encoder:
        """The encoder that says of each token to which word it belongs."""
        return encoder_for(self.tokenizer, self.context, words=True)

    def number(
        self, examples: Any, network: nn.Module, task: Target
    ) -> tuple[Any, list[str] | None]:
        """Return the examples with the numbers of tags in place of names, as for classes."""
        tags, column = tags_of(examples), label_column(examples)
        if tags is None or column is None:
            return examples, None
        names, made = known_names(tags, network, task), numbered(tags, network, task)
        if made is tags:
            return examples, names
        pairs = zip(tags[LABELS], made[LABELS], strict=True)
        flat = iter([_number(tag, number) for tag, number in pairs])
        stored = examples.with_format(None)[column]
        rows = [None if row is None else [next(flat) for _ in row] for row in stored]
        return with_column(examples, column, rows), names

    def with_labels(self, data: datasets.Dataset) -> datasets.Dataset:
        names = data.column_names
        if "input_ids" in names and LABELS not in names and is_list(data.features.get("label")):
            return data.rename_column("label", LABELS)
        return data

    def encode(self, data: datasets.Dataset) -> tuple[datasets.Dataset, tuple[str, ...]]:
        words, tags = words_column(data), tags_column(data)
        read = text_columns(data) if words is None else (words,)
        if not read:
            return data, ()
        if words is None and (tagged := [name for name in TAG_COLUMNS if name in data.features]):
            raise DataError(
                f"a tag belongs to a word, and the data has texts, {list(read)}, beside {tagged}; "
                "split them into a column 'tokens' with the list of words of each example"
            )
        check_text(data, read, self.tokenizer)
        check_tokenizer(self.tokenizer, words=words is not None)
        if words is not None:
            check_words(data, words)
        if words is not None and tags is not None:
            _check_tags(data, words, tags)
        if LABELS in data.features and tags != LABELS:
            warn_unread([LABELS], self.network_name)
        encoder = self.encoder

        def encoded(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            made = encoder(*(rows[name] for name in read))
            found = made.pop(WORD_IDS)
            made[LOST] = [[]] * len(found)
            if words is not None:
                triples = zip(rows[words], found, made["cut"], strict=True)
                made[LOST] = [[] if cut else lost_words(row, ids) for row, ids, cut in triples]
            places = [first_tokens(ids) for ids in found]
            if tags is None:
                counted = [[int(word is not None) for word in row] for row in places]
                return {**made, COUNTED: counted}
            pairs = zip(places, rows[tags], strict=True)
            return {**made, LABELS: [_aligned(row, own_tags) for row, own_tags in pairs]}

        made = mapped(
            data, encoded, batched=True, remove_columns=data.column_names, desc="tokenising"
        )
        warn_cut(sum(made["cut"]), len(made), encoder.limit)
        warn_lost(made[LOST], self.tokenizer)
        return made.remove_columns(["cut", LOST]), read if tags is None else (*read, tags)

    def example(self, example: Any) -> dict[str, Any]:
        row = super().example(example)
        if LABELS not in row and COUNTED not in row and "input_ids" in row:
            row[COUNTED] = self._counted(row)
        return row

    def labels_of(self, row: Mapping[str, Any], mask: list[int] | None) -> Any:
        labels, ids = row.get(LABELS), row.get("input_ids")
        if labels is not None and ids is not None and _size(labels) != len(ids):
            raise DataError(
                f"an example has {len(ids)} tokens and {_size(labels)} labels; give each token of "
                "input_ids a label, -100 where it does not count, or pass the words as 'tokens' "
                "with their tags"
            )
        return labels

    def _counted(self, row: Mapping[str, Any]) -> list[int]:
        """Return, for each token, 1 unless it is special or padding."""
        ids = torch.as_tensor(row["input_ids"]).tolist()
        special, seen = [0] * len(ids), row.get(MASK, [1] * len(ids))
        if self.tokenizer is not None:
            special = self.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        return [int(bool(a) and not b) for a, b in zip(seen, special, strict=True)]


class TokenClassification(TokenTask):
    """Token classification: the tag of each word.

    log p(y) of an example is the **sum** over its counted tokens of log softmax(f_t)[y_t], with f
    (..., b, T, classes) the network's logits. The first tokens of words count; tokens labelled
    -100 do not.
    """

    name = "token-classification"
    reads = "a tag per word or token"
    aliases = ("token-cls", "ner")
    collator = TagCollator
    extras = (COUNTED,)
    discrete = True
    names_classes = True
    classes = classes_of("TOKEN_CLASSIFICATION")
    auto = "AutoModelForTokenClassification"
    prediction = TagPrediction
    serves = "tags"
    shift: ClassVar[int] = 0
    title = "a network for token classification"

    @classmethod
    def implied(cls, checkpoint: Checkpoint) -> bool:
        writes = checkpoint.continues or checkpoint.decodes
        return checkpoint.layout == "words" or (checkpoint.layout == "tokens" and not writes)

    @classmethod
    def load(cls, checkpoint: Checkpoint, like: nn.Module | None = None) -> PreTrainedModel:
        if checkpoint.architecture in OTHER_HEADS:
            raise ConfigError(
                f"the data has a label per token, and {checkpoint.name!r} is a "
                f"{checkpoint.architecture}, whose head is trained for another task; for a new "
                "head pass the network: AutoModelForTokenClassification.from_pretrained(..., "
                "num_labels=..., ignore_mismatched_sizes=True)"
            )
        tags = tags_of(checkpoint.examples)
        names = None if tags is None else class_names(tags)
        outputs = outputs_like(like) or outputs_of(checkpoint, names, tags, cls.auto)
        return load_head(checkpoint, outputs, cls.auto)

    def token_mask(self, batch: Batch) -> Tensor:
        """Return (b, T) booleans, true for tokens that count."""
        counted = batch.get(COUNTED)
        return super().token_mask(batch) if counted is None else counted.bool()

    def row_log_prob(self, output: Tensor, batch: Batch) -> Tensor:
        """Return log softmax(f_t)[y_t] of each counted token, (m,) or (S, m), in nats."""
        mask, labels = self.token_mask(batch), self.targets(batch)
        assert labels is not None
        scores = self.token_logits(output, batch)[..., mask, :].log_softmax(-1)
        index = labels[mask].expand(scores.shape[:-1])
        return scores.gather(-1, index[..., None]).squeeze(-1)

    def check_labels(self, labels: Tensor, network: nn.Module) -> None:
        if labels.dim() != 2 or labels.is_floating_point():
            raise DataError(
                "token classification needs one whole-number label per token, got labels of dtype "
                f"{labels.dtype} and shape {tuple(labels.shape)}; pass words with their tags, or "
                "input_ids with as many labels, -100 where a token does not count"
            )
        self.check_counted(labels)
        classes = getattr(getattr(network, "config", None), "num_labels", None)
        _check_classes(classes, labels)

    def check_output(self, output: Tensor, labels: Tensor) -> None:
        if output.dim() != 3:
            raise DataError(
                "token classification needs one row of logits per token, (n, T, classes); the "
                f"network gave shape {tuple(output.shape)}; load it with "
                "AutoModelForTokenClassification"
            )
        _check_classes(output.shape[-1], labels)

    def check_reading(self, output: Tensor, batch: Batch, network: nn.Module) -> None:
        """Raise `ConfigError` unless there are logits for each token."""
        places, size = output.shape[-2], batch[LABELS].shape[-1]
        if places != size:
            raise ConfigError(
                f"token classification needs logits for each of the {size} tokens of a text, and "
                f"this {type(network).__name__} gives them for {places}; load it with "
                "AutoModelForTokenClassification"
            )


def _check_classes(classes: int | None, labels: Tensor) -> None:
    """Raise `DataError` for labels of counted tokens that are no class of the network."""
    counted = labels[labels.ne(IGNORED)]
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or (classes is not None and high >= classes):
        have = "classes from 0 on" if classes is None else f"{classes} classes"
        more = f"load it with num_labels={high + 1}, or " if classes and high >= classes else ""
        raise DataError(
            f"the network has {have}, got labels from {low} to {high}; {more}map the labels to "
            f"0..{(classes or max(high, 0) + 1) - 1}, and to -100 for tokens that do not count"
        )


def label_column(examples: Any) -> str | None:
    """Return the column with the tags of words, or with the labels of tokens, if there is one."""
    if not is_plain(examples):
        return None
    if "input_ids" not in examples.column_names:
        return tags_column(examples)
    return next((name for name in TARGETS if name in examples.column_names), None)


def tags_of(examples: Any) -> datasets.Dataset | None:
    """Return the tags of all words, one per row; None where no column has lists of tags."""
    column = label_column(examples)
    return None if column is None else flat_labels(examples, column)


def _number(tag: Any, number: int | None) -> int:
    """Return the number of a tag's class; where it has none, its own number, or -100."""
    if number is not None:
        return number
    return tag if isinstance(tag, int) else IGNORED


def _check_tags(data: datasets.Dataset, words: str, tags: str) -> None:
    """Raise `DataError` for tags that are names still, or not as many as there are words."""
    table = data.select_columns([words, tags]).with_format("arrow")[:]
    sizes = [pc.list_value_length(table[name]).to_pylist() for name in (words, tags)]
    for i, (size, count) in enumerate(zip(*sizes, strict=True)):
        if count is not None and size != count:
            raise DataError(
                f"example {i} has {size} words in {words!r} and {count} labels in {tags!r}; give "
                "each word one label, -100 where it does not count"
            )
        if count is not None and None in (row := table[tags][i].as_py()):
            raise DataError(
                f"example {i} has no label for word {row.index(None)} in {tags!r}; give -100 to a "
                "word that does not count"
            )
    first = next((tag for row in table[tags].to_pylist() for tag in row or () if tag), None)
    if isinstance(first, str):
        raise DataError(
            f"the tags are names, such as {first!r}, and the network has no names for its classes; "
            "load it with id2label={0: ..., 1: ...}, or pass its name in place of the network"
        )


def _aligned(words: list[int | None], tags: list[Any] | None) -> list[Any] | None:
    """Return a label per token; None for an example without tags."""
    if tags is None:
        return None
    found = [None if word is None else tags[word] for word in words]
    return [IGNORED if tag is None else tag for tag in found]


def _size(labels: Any) -> int:
    return len(labels) if np.ndim(labels) else 0

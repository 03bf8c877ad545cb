"""The columns of data: text, words, labels, masks, names of rows, and those that are not read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from itertools import chain
from typing import Any

import datasets
import numpy as np

from pyrolora.columns import COMPLETION_MASK, INPUTS, LABELS, TAGS
from pyrolora.data.examples import first_of, is_nested, is_plain, is_text, unformatted
from pyrolora.errors import DataError

CHOICES = "choices"
TARGETS = (LABELS, "label")

# A text as a list of words, and a tag per word.
WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = (*TARGETS, *TAGS)

# Text columns of well-known data sets; a network reads a pair in this order.
TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("question", "answer"),
    ("query", "passage"),
    ("query", "document"),
    ("sentence_A", "sentence_B"),
    ("text", "text_pair"),
)
# Texts to read, in this order, and the text to write for them.
WRITTEN_PAIRS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("text",), "summary"),
    (("document",), "summary"),
    (("dialogue",), "summary"),
    (("report",), "summary"),
    (("article",), "summary"),
    (("article",), "highlights"),
    (("article",), "abstract"),
    (("source",), "target"),
    (("src",), "tgt"),
    (("text",), "target"),
    (("input",), "target"),
    (("input",), "output"),
    (("inputs",), "targets"),
    (("input_text",), "target_text"),
    (("question",), "answer"),
    (("question",), "response"),
    (("query",), "answer"),
    (("query",), "response"),
    (("problem",), "solution"),
    (("prompt",), "completion"),
    (("prompt",), "response"),
    (("instruction",), "output"),
    (("instruction",), "response"),
    (("instruction", "input"), "output"),
    (("instruction", "input"), "response"),
    (("instruction", "context"), "response"),
)
# The text before each choice of multiple choice; joined in this order.
CONTEXT_COLUMNS = ("context", "text", "sentence", "question", "question_stem")
# Columns that number or name a row, or repeat its label, and are left out without a warning; so are
# those that `ROW_NUMBERS` matches, and a tokenizer's other columns.
ROW_NAMES = frozenset(
    (
        *("id", "ids", "idx", "index", "guid", "uid", "uuid", "qid", "pid"),
        *("label_text", "label_name", "label_names", "label_str", "text_label", "answerKey"),
        *("special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping"),
    )
)
# As in pair_id, sent_idx, MNLI's pairID, MRPC's id1, and the indices of pandas, in a CSV file, too.
ROW_NUMBERS = re.compile(r"(?i:.*_(id|idx))|.*[a-z]I[Dd]|id\d+|Unnamed: \d+|__index_level_\d+__|")
# The origin of a text: no input, if there is another column of text.
ORIGINS = re.compile(r"url|timestamp|date|genre|.*_label")
# Masks of the tokens that count; 0 at those that do not. A token counts if all of them say so.
ASSISTANT_MASKS = ("assistant_masks", "assistant_tokens_mask")
TOKEN_MASKS = (COMPLETION_MASK, *ASSISTANT_MASKS)
# Weights of tokens or examples, which are not supported.
WEIGHTS = re.compile(
    r"weights|(sample|example|token|loss)_weights?"
    r"|(loss|labels?|target|response|answer|prompt|action)_masks?"
)
# Labels of tokens under other names, which have to be renamed to count.
TOKEN_LABELS = frozenset(("label_ids", "lm_labels", "target_ids", "decoder_input_ids"))
# Columns that are no input of a network beside a text, and yet what a language model learns from.
DIALOGUES = (
    *("prompt", "completion", "response", "instruction", "output", "question", "answer"),
    *("completions", "responses", "outputs", "answers"),
    *("messages", "conversations", "chosen", "rejected"),
)
# A preferred text and another one, or the tokens of both, as in TRL.
PREFERENCES = (("chosen", "rejected"), ("chosen_ids", "rejected_ids"))
# A text in several languages, a dict from each to the text.
TRANSLATION = "translation"
# The first and the last token of an answer, as transformers' networks take them.
SPANS = ("start_positions", "end_positions")


def is_row_name(name: str) -> bool:
    """Return whether a column of this name numbers or names the row, and is no input."""
    return name in ROW_NAMES or ROW_NUMBERS.fullmatch(name) is not None


def text_columns(data: datasets.Dataset) -> tuple[str, ...]:
    """Return the one or two columns of raw text that make the input.

    Raises
    ------
    DataError
        For several columns of text that are no well-known pair.
    """
    text = free_text(data)
    if len(text) < 2:
        return tuple(text)
    for known in TEXT_COLUMNS:
        if set(known) == set(text):
            return known
    one = " or ".join(map(repr, text))
    raise DataError(
        f"cannot tell which of the text columns {text} are the input: one alone ({one}), two as a "
        "pair, or all of them joined; keep one with data.select_columns([...]) or drop the others "
        "with data.remove_columns([...]), name a pair 'text' and 'text_pair' (--text on the "
        "command line), or join them to one column 'text'"
    )


def free_text(data: datasets.Dataset) -> list[str]:
    """Return the columns of raw text that are neither labels nor names of rows.

    A column with the origin of a text counts only where it is the only one.
    """
    text = [
        name
        for name, feature in data.features.items()
        if is_text(feature) and name not in TARGETS and not is_row_name(name)
    ]
    return [name for name in text if not is_origin(data, name)] or text


def is_origin(data: datasets.Dataset, name: str) -> bool:
    """Return whether a column has the origins of texts.

    Its name says so. A ``source`` may be a text as well; single words, such as CoLA's "gj04", are
    origins.
    """
    if name == "source":
        return all(len(str(value).split()) < 2 for value in data.unique(name))
    return ORIGINS.fullmatch(name) is not None


def check_nested(data: datasets.Dataset) -> None:
    """Raise `DataError` for columns of raw text that hold named parts."""
    nested = [
        name
        for name, feature in data.features.items()
        if name != CHOICES and isinstance(getattr(feature, "feature", feature), dict)
    ]
    if nested:
        spans = "answers" in nested and "context" in data.features
        answers = " (answers in a context are read by task='question-answering')" if spans else ""
        apart = "make columns of them with data.flatten()"
        if any(is_list(data.features[name]) for name in nested):  # which flatten() leaves
            apart = "make texts of them with data.map(...)"
        raise DataError(
            f"the columns {nested} hold dicts, and their parts are not read{answers}; {apart}, or "
            f"drop them with data.remove_columns({nested})"
        )


def check_task(names: Collection[str]) -> None:
    """Raise `DataError` for columns of extractive question answering, where another task reads."""
    spans = [name for name in SPANS if name in names]
    if spans:
        raise DataError(
            f"the data has {spans}, the answers of extractive question answering, and another task "
            "reads it: load the network with AutoModelForQuestionAnswering "
            "(task='question-answering'), or remove these columns"
        )


def unread(names: Collection[str], read: Collection[str], *, tokens: bool = False) -> list[str]:
    """Return the columns that are left out and do not name rows.

    Raise `DataError` where leaving one out would change how much something counts, or which
    ``tokens`` are learnt.
    """
    left = sorted(n for n in names if n not in read and n not in TARGETS and not is_row_name(n))
    weights = [name for name in left if WEIGHTS.fullmatch(name)]
    if weights:
        raise DataError(
            f"the columns {weights} say how much a token or an example counts, which is not "
            f"supported; drop them with data.remove_columns({weights}) to have all count alike, or "
            "give tokens that do not count the label -100"
        )
    targets = [name for name in left if tokens and name in TOKEN_LABELS and LABELS not in names]
    if targets:
        raise DataError(
            f"the columns {targets} may be the tokens to learn, which are read under the name "
            f"'labels' alone: data.rename_column({targets[0]!r}, 'labels'), or drop them with "
            f"data.remove_columns({targets})"
        )
    return left


def warn_unread(left: list[str], reader: str) -> None:
    """Warn of columns that are not read."""
    if left:
        warnings.warn(f"the columns {left} are not read: {reader} takes none of them", stacklevel=2)


def check_two_labels(data: datasets.Dataset) -> None:
    """Raise `DataError` for two columns of labels that differ."""
    if all(name in data.column_names for name in TARGETS):
        stored = unformatted(data)
        if list(stored[LABELS]) != list(stored["label"]):
            raise DataError(TWO_LABELS)


TWO_LABELS = (
    "there are two labels, 'label' and 'labels', and they differ; drop the one that is not the "
    "target: data.remove_columns('label') or data.remove_columns('labels')"
)


def same_labels(example: Any) -> bool:
    """Return whether an example's ``label`` and ``labels``, if it has both, are the same."""
    if not all(name in example for name in TARGETS):
        return True
    return bool(np.array_equal(np.asarray(example[LABELS]), np.asarray(example["label"])))


def check_columns(data: datasets.Dataset) -> None:
    """Raise `DataError` for columns with the name of a text that hold none."""
    texts = (*chain.from_iterable(TEXT_COLUMNS), "text", "sentence", "content", *WORD_COLUMNS)
    for name in dict.fromkeys(texts):
        feature = data.features.get(name)
        if isinstance(feature, datasets.Value) and feature.dtype == "null":
            raise DataError(f"the text column {name!r} has missing values alone")
        if isinstance(feature, datasets.List | datasets.LargeList | datasets.Sequence):
            raise DataError(
                f"the column {name!r} holds lists; join them to texts, or tokenise them yourself, "
                "with is_split_into_words=True; words with a tag each are the columns 'tokens' and "
                "'tags', data.rename_column"
            )


def check_text(data: datasets.Dataset, text: tuple[str, ...], tokenizer: Any) -> None:
    """Raise `DataError` for raw text without a tokenizer, or with missing values."""
    if tokenizer is None:
        raise DataError(
            f"the data holds raw text ({', '.join(text)}) and there is no tokenizer; pass "
            "tokenizer=AutoTokenizer.from_pretrained(...), or tokenise the data yourself"
        )
    for name in text:
        if any(value is None for value in data[name]):
            raise DataError(f"the text column {name!r} has missing values; fill or remove them")


def context_columns(data: datasets.Dataset) -> tuple[str, ...]:
    """Return the columns of raw text that stand before each choice."""
    text = free_text(data)
    known = tuple(name for name in CONTEXT_COLUMNS if name in text)
    if not known and len(text) != 1:
        raise DataError(
            f"multiple choice needs a text column that the choices belong to, one of "
            f"{', '.join(CONTEXT_COLUMNS)}, got {text}; rename it: "
            "data.rename_column(name, 'question')"
        )
    left = [name for name in text if name not in known]
    if known and left:
        raise DataError(
            f"of the text columns {text}, {list(known)} stand before the choices, and {left} may "
            f"belong to them or not; drop them with data.remove_columns({left}), or rename one to "
            "'context'"
        )
    return known or tuple(text)


def has_choices(examples: Any) -> bool:
    """Return whether examples have several choices each, in raw text or in tokens."""
    row = first_of(examples, INPUTS) if len(examples) else {}
    ids: Any = row.get("input_ids")
    return CHOICES in row or (is_nested(ids) and len(ids) > 1)


def has_preferences(names: Collection[str]) -> bool:
    """Return whether columns of these names hold a preferred text and another one."""
    return any({*pair} <= {*names} for pair in PREFERENCES)


def check_preferences(names: Collection[str]) -> None:
    """Raise `DataError` for preferences, which another task learns."""
    if has_preferences(names):
        raise DataError(
            "the data has 'chosen' and 'rejected' texts, and preferences are learnt by a reward "
            "model: load the network with AutoModelForSequenceClassification, num_labels=1 (by its "
            "name it is loaded so), and pass task='reward-modelling'; to learn the chosen texts "
            "alone, drop the others, data.remove_columns('rejected'), and rename 'chosen' 'text', "
            "'messages', or beside a 'prompt' 'completion'"
        )


def words_column(examples: Any) -> str | None:
    """Return the name of the column that holds texts as lists of words, if there is one.

    Raises
    ------
    DataError
        When all of its lists are empty.
    """
    if not is_plain(examples):
        return None
    features = examples.features
    lists = [name for name in WORD_COLUMNS if is_list(features.get(name))]
    for name in lists:
        if getattr(features[name].feature, "dtype", None) == "null":
            raise DataError(
                f"no example has a word in {name!r}, all lists are empty; leave them out"
            )
    return next((name for name in lists if is_text(getattr(features[name], "feature", None))), None)


def tags_column(examples: Any) -> str | None:
    """Return the name of the column with a label per word, if there is one beside the words.

    Raises
    ------
    DataError
        For several columns of tags, unless one of them has the name of labels.
    """
    if words_column(examples) is None:
        return None
    found = [name for name in TAG_COLUMNS if is_list(examples.features.get(name))]
    if {*TARGETS} <= {*found}:
        check_two_labels(examples)
    if len(found) > 1 and found[0] not in TARGETS:
        raise DataError(
            f"cannot tell which of the columns {found} has the tags to learn; rename it, "
            f"data.rename_column({found[0]!r}, 'labels') (--label {found[0]} on the command line), "
            f"or drop the others, data.remove_columns({found[1:]})"
        )
    return next(iter(found), None)


def is_list(feature: Any) -> bool:
    """Return whether a column's feature is a list."""
    return isinstance(feature, datasets.Sequence | datasets.List | datasets.LargeList)

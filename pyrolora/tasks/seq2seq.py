"""Sequence to sequence: a text that a decoder writes for the text that an encoder reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSpeechSeq2Seq, PreTrainedModel

from pyrolora.columns import DECODER_IDS, DECODER_MASK, IGNORED, LABELS, Batch
from pyrolora.data import Collator
from pyrolora.data.columns import TOKEN_MASKS, check_text, is_list
from pyrolora.data.encoding import Encoder, added
from pyrolora.data.examples import as_numbers, first_of
from pyrolora.data.inputs import encoder_for, shift_of, table_of_positions, taken_by, written_length
from pyrolora.data.pairs import encode_pairs, pair_of
from pyrolora.errors import ConfigError, DataError
from pyrolora.tasks.checkpoint import Checkpoint
from pyrolora.tasks.tokens import LanguageModel
from pyrolora.tasks.unsupported import classes_of

OF_TARGET = (LABELS, DECODER_IDS, DECODER_MASK)
"""The columns with a number per token of the text that is written."""


class PairCollator(Collator):
    """Texts to read and texts to write, to a batch whose labels have a length of their own.

    Both are padded on the right, where a decoder does not look.
    """

    targets = "texts to write (such as 'target' beside 'source'), or their tokens as 'labels'"
    per_token = True
    makes_labels = True  # so that those of every example are checked
    beside = (DECODER_MASK,)
    internal = frozenset({DECODER_IDS, DECODER_MASK})

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        super().__init__(network, tokenizer)
        self.most = min(table_of_positions(network) or torch.inf, written_length(network))
        config = getattr(network, "config", None)
        self.fill = getattr(config, "pad_token_id", None) or 0

    @property
    def writer(self) -> Encoder:
        """The encoder of texts to write, which end as the tokenizer ends them, else with EOS."""
        ends = not added(Encoder(self.tokenizer, torch.inf, target=True).tokens)[1]
        return encoder_for(self.tokenizer, self.most, ends=ends, target=True)

    def check_data(self, examples: Any) -> None:
        super().check_data(examples)
        masks = [name for name in TOKEN_MASKS if name in first_of(examples, self.input_name)]
        if masks:
            raise DataError(
                f"the columns {masks} say which tokens of one text count, and here the labels are "
                "a text of their own; give tokens that do not count the label -100, and drop them"
            )

    def encode(self, data: datasets.Dataset) -> tuple[datasets.Dataset, tuple[str, ...]]:
        pair = pair_of(data)
        check_text(data, (pair[0][0], pair[1]), self.tokenizer)
        return encode_pairs(data, pair, self.encoder, self.writer), (*pair[0], pair[1])

    def with_labels(self, data: datasets.Dataset) -> datasets.Dataset:
        names = data.column_names
        if LABELS not in names and is_list(data.features.get("label")):
            return data.rename_column("label", LABELS)
        return data

    def check(self, examples: Any, labels: Tensor | None, explicit: set[str]) -> None:
        if labels is None:
            raise DataError(
                "there is nothing to score: a sequence-to-sequence network predicts the tokens of "
                f"known texts; give {self.targets}, or have generate() write texts"
            )
        if DECODER_MASK not in first_of(examples, self.input_name):
            self._check_padding(labels)

    def labels_of(self, row: Mapping[str, Any], mask: list[int] | None) -> Any:
        labels = row.get(LABELS)
        if labels is None:
            return None
        size = len(labels) if hasattr(labels, "__len__") and not isinstance(labels, str) else 0
        if not size:
            raise DataError(
                f"the labels of an example are {labels!r:.60}, and have to be the ids of the "
                "tokens to write, at least one"
            )
        if size > self.most:
            raise DataError(
                f"an example has {size} labels, and the decoder of {self.network_name} has "
                f"{int(self.most)} positions; tokenise with truncation=True, "
                f"max_length={int(self.most)}, or pass the raw text"
            )
        if DECODER_IDS in row:
            _check_shifted(torch.as_tensor(row[DECODER_IDS]), torch.as_tensor(labels))
        else:
            _check_whole(torch.as_tensor(labels))
        return labels

    def _stacked(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super()._stacked([{n: v for n, v in r.items() if n not in OF_TARGET} for r in rows])
        fills = {LABELS: IGNORED, DECODER_IDS: self.fill, DECODER_MASK: 0}
        for name in (name for name in OF_TARGET if name in rows[0]):
            batch[name] = pad_sequence([as_numbers(r[name]) for r in rows], True, fills[name])
        return batch

    def _check_padding(self, labels: Tensor) -> None:
        """Raise `DataError` for labels that end with padding in place of -100."""
        for i, row in enumerate(labels):
            ids = row[row.ne(IGNORED)].tolist()
            run = next((k for k, token in enumerate(ids[::-1]) if token != ids[-1]), len(ids))
            known = run and ids[-1] in self.padding.sure
            if known or (run > 1 and ids[-1] in self.padding.unsure):
                raise DataError(
                    f"the labels of example {i} end with {run} times the token {ids[-1]}, which is "
                    "padding, and would be learnt; give -100 there, or leave it out"
                )


class Seq2Seq(LanguageModel):
    """Sequence to sequence: the tokens of a text, each predicted by the input and those before it.

    log p(y | x) of an example is the **sum** over its labelled tokens, t = 0..T-1, of
    log softmax(f_t)[y_t], with f_t the decoder's output after y_0..y_{t-1}, for the input x of the
    encoder.
    """

    name = "text2text-generation"
    reads = "a text that is written for another"
    aliases = ("seq-2-seq-lm", "seq2seq-lm", "seq2seq", "summarization", "translation")
    collator = PairCollator
    classes = classes_of("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ") | {"VisionEncoderDecoderModel"}
    auto = "AutoModelForSeq2SeqLM"
    writes = "apart"
    shift = 0
    title = "a sequence-to-sequence network"

    @classmethod
    def matches(cls, network: nn.Module) -> bool:
        return super().matches(network) and DECODER_IDS in taken_by(network)

    @classmethod
    def implied(cls, checkpoint: Checkpoint) -> bool:
        if checkpoint.layout is None:
            return checkpoint.may_decode
        texts = checkpoint.layout == "example" and checkpoint.has_text_labels
        return checkpoint.decodes and (texts or checkpoint.layout == "tokens")

    @classmethod
    def load(cls, checkpoint: Checkpoint, like: nn.Module | None = None) -> PreTrainedModel:
        if checkpoint.is_a("SPEECH_SEQ_2_SEQ"):
            return AutoModelForSpeechSeq2Seq.from_pretrained(checkpoint.name, dtype="auto")
        return super().load(checkpoint, like)

    def check_network(self, network: nn.Module) -> None:
        """Raise `ConfigError` for a network that cannot turn labels to the inputs of a decoder."""
        name, shift = type(network).__name__, shift_of(network)
        writes = getattr(network, "can_generate", None)
        if not callable(writes) or not writes():
            super().check_network(network)
        if shift is None or DECODER_IDS not in taken_by(network):
            raise ConfigError(
                f"{name} is no encoder-decoder of transformers' that writes text, which the task "
                f"{self.name!r} needs; leave task= out, or load one with {self.auto}"
            )
        try:
            token = int(getattr(network.config, "pad_token_id", None) == 0)  # any but padding
            shift(torch.tensor([[token, token]]))
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"{name} cannot tell its decoder's inputs from labels ({error}); set "
                "network.config.decoder_start_token_id and network.config.pad_token_id"
            ) from error

    def inputs(self, batch: Batch, network: nn.Module) -> dict[str, Tensor]:
        """Return the columns that the network takes, with the labels one place on."""
        made, shift = super().inputs(batch, network), shift_of(network)
        if DECODER_IDS not in made and LABELS in batch and shift is not None:
            made[DECODER_IDS] = shift(batch[LABELS].long().clone())  # FSMT's writes into it
        return made

    def check_reading(self, output: Tensor, batch: Batch, network: nn.Module) -> None:
        labels, (places, width) = batch[LABELS], output.shape[-2:]
        if places != labels.shape[-1] or int(labels.max()) >= width:
            raise ConfigError(
                f"{self.title} gives logits of its vocabulary for each of the {labels.shape[-1]} "
                f"labels, which go up to {int(labels.max())}, and this {type(network).__name__} "
                f"gives {width} for {places} places"
            )


def _check_whole(labels: Tensor) -> None:
    """Raise `DataError` for labels that do not count before one that does, as of a masked model."""
    places = labels.ne(IGNORED).nonzero().flatten()
    if len(places) and int(places[-1]) >= len(places):
        raise DataError(
            "an example has labels of -100 before the last token to write, "
            f"{labels.tolist()!r:.60}, where the decoder would read padding; give the text to "
            "write whole, with -100 after it alone, or decoder_input_ids beside it (tokens that "
            "are hidden in a text are learnt by a masked language model, task='fill-mask')"
        )


def _check_shifted(ids: Tensor, labels: Tensor) -> None:
    """Raise `DataError` for inputs of the decoder that are not the labels, one place on."""
    counted = labels[:-1].ne(IGNORED) & labels[1:].ne(IGNORED)
    if ids.shape != labels.shape or not torch.equal(ids[1:][counted], labels[:-1][counted]):
        raise DataError(
            f"the {DECODER_IDS} of an example, {ids.tolist()!r:.60}, are not its labels one place "
            f"on, {labels.tolist()!r:.60}; leave {DECODER_IDS} out: the network makes them"
        )

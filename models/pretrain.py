"""Make an embedded model: a small transformer, pretrained from random weights.

    python models/pretrain.py encoder --text BOOKS
    python models/pretrain.py decoder --text BOOKS

BOOKS is a folder of plain text (``*.txt`` or ``*.txt.xz``); ``text.py`` says what joins it. Writes
the configuration, the tokenizer, the weights in float16, and ``training.json``, whose figures the
card repeats.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import datasets
import torch
from text import corpus, overlap, split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)


def main() -> None:
    options = read_options()
    kind = KINDS[options.kind]
    set_seed(options.seed)

    texts, sources = corpus(options.text)
    print(f"{len(texts)} paragraphs, {sum(map(len, texts)) / 1e6:.1f} million characters")
    tokenizer = kind.tokenizer(train_bpe(texts, kind))
    train, validation = (kind.blocks(part, tokenizer) for part in split(texts))
    print(f"{len(train)} blocks of {kind.block} tokens to train on, {len(validation)} held out")

    network = kind.network(options.hidden_size, options.layers)
    started = time.perf_counter()
    trainer = kind.trainer(
        model=network,
        args=arguments(options),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=DataCollatorForLanguageModeling(
            tokenizer, mlm=kind.masked is not None, mlm_probability=kind.masked
        ),
    )
    resume = options.checkpoints is not None and any(options.checkpoints.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - started
    loss = trainer.evaluate()["eval_loss"]
    save(network, kind, tokenizer, options.output)
    report = {
        "sources": sources,
        "demo_test_sentences_in_text": overlap(texts),
        "blocks": len(train),
        "block_tokens": kind.block,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "epochs": round(trainer.state.epoch, 2),
        "seconds": round(seconds),
        "resumed": resume,
        "device": str(trainer.args.device),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "parameters": sum(p.numel() for p in network.parameters()),
        **({} if kind.masked is None else {"masked": kind.masked}),
        "validation_loss": round(loss, 4),
        "history": [e for e in trainer.state.log_history if "eval_loss" in e],
    }
    (options.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "sources"}, indent=1))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, kind in KINDS.items():
        one = kinds.add_parser(name, help=kind.__doc__)
        one.add_argument("--text", type=Path, required=True, help="a folder of *.txt or *.txt.xz")
        one.add_argument("--output", type=Path, default=Path(__file__).parent / name)
        one.add_argument("--steps", type=int, default=kind.steps)
        one.add_argument(
            "--batch-size", type=int, default=kind.batch_size, help=f"blocks of {kind.block} tokens"
        )
        one.add_argument("--learning-rate", type=float, default=kind.learning_rate)
        one.add_argument("--hidden-size", type=int, default=256)
        one.add_argument("--layers", type=int, default=4)
        one.add_argument("--seed", type=int, default=0)
        one.add_argument("--checkpoints", type=Path, help="keep them there, and resume from them")
    return parser.parse_args()


# What the two models differ in -----------------------------------------------------------------


class Kind(ABC):
    special: tuple[str, ...]  # tokens, in the order of their ids
    vocabulary: int
    block: int  # tokens
    masked: float | None = None  # the share of tokens; None: the next token is predicted
    steps: int
    batch_size: int
    learning_rate: float
    trainer: type[Trainer] = Trainer
    settled: dict[str, float] = {}  # noqa: RUF012 - of the configuration, once trained

    @abstractmethod
    def tokenizer(self, bpe: Tokenizer) -> PreTrainedTokenizerFast: ...

    @abstractmethod
    def blocks(self, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> datasets.Dataset:
        """Texts joined and cut to rows of ``block`` tokens."""

    @abstractmethod
    def network(self, hidden_size: int, layers: int) -> PreTrainedModel: ...


class MaskedTrainer(Trainer):
    """The head sees the masked positions only: a third of the step saved."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        chosen = labels != -100
        hidden = model.roberta(input_ids=inputs["input_ids"]).last_hidden_state[chosen]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), labels[chosen])
        return (loss, {"loss": loss}) if return_outputs else loss


class Encoder(Kind):
    """RoBERTa, by masked language modelling"""

    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # RoBERTa's first four ids
    vocabulary, block, masked = 8192, 128, 0.2
    steps, batch_size, learning_rate = 4500, 32, 1e-3
    trainer = MaskedTrainer
    # Off while it is trained: few passes over the text, nothing to regularise.
    settled = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}  # noqa: RUF012

    def tokenizer(self, bpe):
        bpe.post_processor = processors.RobertaProcessing(
            ("</s>", bpe.token_to_id("</s>")),
            ("<s>", bpe.token_to_id("<s>")),
            add_prefix_space=False,
        )
        return RobertaTokenizerFast(tokenizer_object=bpe, model_max_length=self.block)

    def blocks(self, texts, tokenizer):
        first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
        ids = list(chain.from_iterable((*row, last) for row in encode(texts, tokenizer)))
        rows = [[first, *row, last] for row in cut(ids, self.block - 2)]
        return datasets.Dataset.from_dict({"input_ids": rows})

    def network(self, hidden_size, layers):
        config = RobertaConfig(
            vocab_size=self.vocabulary,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // 32,
            intermediate_size=4 * hidden_size,
            max_position_embeddings=self.block + 2,  # RoBERTa counts from the padding id + 1
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
        )
        return RobertaForMaskedLM(config)


class Decoder(Kind):
    """LLaMA, by predicting the next token"""

    special = ("<s>", "</s>", "<pad>")
    vocabulary, block = 4096, 256
    steps, batch_size, learning_rate = 2800, 8, 2e-3

    def tokenizer(self, bpe):
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
        )
        first, last, padding = self.special
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token=first,
            eos_token=last,
            pad_token=padding,
            model_max_length=self.block,
            padding_side="left",  # a continuation starts where the text ends
        )

    def blocks(self, texts, tokenizer):
        first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
        ids = list(chain.from_iterable((first, *row, last) for row in encode(texts, tokenizer)))
        return datasets.Dataset.from_dict({"input_ids": list(cut(ids, self.block))})

    def network(self, hidden_size, layers):
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // 32,
            num_key_value_heads=hidden_size // 64,
            intermediate_size=5 * hidden_size // 2,
            max_position_embeddings=self.block,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
        return LlamaForCausalLM(config)


KINDS: dict[str, Kind] = {"encoder": Encoder(), "decoder": Decoder()}


# What they share -------------------------------------------------------------------------------


def train_bpe(texts: list[str], kind: Kind) -> Tokenizer:
    """Byte-level BPE."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=kind.vocabulary,
        special_tokens=list(kind.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    for start in range(0, len(texts), 1000):
        yield from tokenizer(texts[start : start + 1000], add_special_tokens=False)["input_ids"]


def cut(ids: list[int], size: int) -> Iterator[list[int]]:
    return (ids[i : i + size] for i in range(0, len(ids) - size, size))


def arguments(options: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(options.checkpoints or "pretraining"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=options.steps // 20,
        weight_decay=0.01,
        adam_beta2=0.98,
        bf16=torch.accelerator.is_available() or torch.cpu._is_avx512_bf16_supported(),
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        eval_strategy="steps",
        eval_steps=max(options.steps // 10, 1),
        prediction_loss_only=True,
        logging_steps=max(options.steps // 100, 1),
        save_strategy="no" if options.checkpoints is None else "steps",
        save_steps=0.05,
        save_total_limit=1,
        report_to="none",
        seed=options.seed,
    )


def save(
    network: PreTrainedModel, kind: Kind, tokenizer: PreTrainedTokenizerFast, output: Path
) -> None:
    """Weights stored in float16, the configuration asking for float32: loading widens them."""
    network.config.update(kind.settled)
    network.half().save_pretrained(output)
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()

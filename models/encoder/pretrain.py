"""Make the embedded encoder: a small RoBERTa, pretrained by masked language modelling.

    python models/encoder/pretrain.py --text BOOKS --output models/encoder

BOOKS is a folder of plain text (``*.txt`` or ``*.txt.xz``). The docstrings of installed packages
join it, less what the demo tests on: the held-out files of the libraries it classifies, and all of
the libraries it calls unseen. Writes the configuration, the tokenizer, the weights in float16, and
``training.json``, whose figures the card repeats.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import platform
import random
import re
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from pyrolora.demo.sentences import LIBRARIES, docstrings, sentences
from pyrolora.errors import DataError

# Beside the libraries of the demo's task: what a development environment holds anyway.
PACKAGES = (
    *("PIL", "_pytest", "accelerate", "arviz", "asyncio", "click", "concurrent", "datasets"),
    *("distutils", "email", "fontTools", "http", "httpx", "importlib", "jinja2", "joblib"),
    *("json", "logging", "mpmath", "multiprocessing", "narwhals", "packaging", "peft", "pip"),
    *("pyarrow", "pydantic", "pygments", "pyro", "rich", "safetensors", "setuptools", "sklearn"),
    *("tokenizers", "torchgen", "torchmetrics", "tqdm", "typer", "unittest", "xml"),
)
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # RoBERTa's first four ids
VOCABULARY, BLOCK = 8192, 128  # tokens
MASKED = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a folder of *.txt or *.txt.xz")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch-size", type=int, default=32, help="blocks of 128 tokens")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=Path, help="keep them there, and resume from them")
    options = parser.parse_args()
    set_seed(options.seed)

    texts, sources = corpus(options.text)
    print(f"{len(texts)} paragraphs, {sum(map(len, texts)) / 1e6:.1f} million characters")
    tokenizer = train_tokenizer(texts)
    train, validation = blocks(texts, tokenizer)
    print(f"{len(train)} blocks of {BLOCK} tokens to train on, {len(validation)} held out")

    network = RobertaForMaskedLM(configuration(options.hidden_size, options.layers))
    started = time.perf_counter()
    trainer = MaskedTrainer(
        model=network,
        args=arguments(options),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED),
    )
    resume = options.checkpoints is not None and any(options.checkpoints.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - started
    loss = trainer.evaluate()["eval_loss"]
    save(network, tokenizer, options.output)
    report = {
        "sources": sources,
        "demo_test_sentences_in_text": overlap(texts),
        "blocks": len(train),
        "block_tokens": BLOCK,
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
        "masked": MASKED,
        "validation_loss": round(loss, 4),
        "history": [e for e in trainer.state.log_history if "eval_loss" in e],
    }
    (options.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "sources"}, indent=1))


# Text -----------------------------------------------------------------------------------------


def corpus(folder: Path) -> tuple[list[str], dict[str, int]]:
    """Paragraphs without repetitions, in random order, and the characters of each source."""
    sources: dict[str, int] = {}
    seen: set[str] = set()
    for name, paragraphs in _sources(folder):
        total = 0
        for paragraph in paragraphs:
            if len(paragraph) >= 40 and paragraph not in seen:
                seen.add(paragraph)
                total += len(paragraph)
        sources[name] = total
        print(f"{name}: {total / 1e6:.2f} million characters")
    texts = sorted(seen)
    random.shuffle(texts)
    return texts, sources


def _sources(folder: Path) -> Iterator[tuple[str, Iterator[str]]]:
    files = sorted([*folder.glob("*.txt"), *folder.glob("*.txt.xz")])
    books = [file for file in files if file.name != "SOURCE.txt"]
    if not books:
        raise SystemExit(f"no *.txt or *.txt.xz in {folder}")
    for file in books:
        read = lzma.open if file.suffix == ".xz" else open
        with read(file, "rt", encoding="utf-8") as stream:
            yield file.name.removesuffix(".xz"), _paragraphs(stream.read())
    for name in LIBRARIES:
        yield name, (p for text in docstrings(name, held_out=False) for p in _paragraphs(text))
    for name in PACKAGES:
        try:
            texts = list(docstrings(name))
        except DataError:
            print(f"{name}: not installed, left out")
            continue
        yield name, (p for text in texts for p in _paragraphs(text))


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        yield " ".join(paragraph.split())


def overlap(texts: list[str]) -> dict[str, int]:
    """How many of the demo's test sentences stand word for word in the text, through copies of
    documentation in other files and packages."""
    joined = "\n".join(texts)
    tested = sentences()["test"]["text"]
    return {"found": sum(text in joined for text in tested), "of": len(tested)}


def train_tokenizer(texts: list[str]) -> RobertaTokenizerFast:
    """Byte-level BPE in RoBERTa's form."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.RobertaProcessing(
        ("</s>", bpe.token_to_id("</s>")), ("<s>", bpe.token_to_id("<s>")), add_prefix_space=False
    )
    return RobertaTokenizerFast(tokenizer_object=bpe, model_max_length=BLOCK)


def blocks(
    texts: list[str], tokenizer: RobertaTokenizerFast
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Paragraphs joined and cut to blocks; every hundredth text goes to validation."""
    parts = []
    for chosen in ([t for t in texts if not _held_out(t)], [t for t in texts if _held_out(t)]):
        ids: list[int] = []
        for start in range(0, len(chosen), 1000):
            encoded = tokenizer(chosen[start : start + 1000], add_special_tokens=False)
            for row in encoded["input_ids"]:
                ids += [*row, tokenizer.sep_token_id]
        size = BLOCK - 2
        rows = [
            [tokenizer.cls_token_id, *ids[i : i + size], tokenizer.sep_token_id]
            for i in range(0, len(ids) - size, size)
        ]
        parts.append(datasets.Dataset.from_dict({"input_ids": rows}))
    return parts[0], parts[1]


def _held_out(text: str) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 == 0


# Network --------------------------------------------------------------------------------------


def configuration(hidden_size: int, layers: int) -> RobertaConfig:
    return RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=BLOCK + 2,  # RoBERTa counts from the padding id + 1
        type_vocab_size=1,
        hidden_dropout_prob=0.0,  # few passes over the text: nothing to regularise
        attention_probs_dropout_prob=0.0,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )


class MaskedTrainer(Trainer):
    """The head sees the masked positions only: a third of the step saved."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        chosen = labels != -100
        hidden = model.roberta(input_ids=inputs["input_ids"]).last_hidden_state[chosen]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), labels[chosen])
        return (loss, {"loss": loss}) if return_outputs else loss


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


def save(network: RobertaForMaskedLM, tokenizer: RobertaTokenizerFast, output: Path) -> None:
    """Weights stored in float16, the configuration asking for float32: loading widens them."""
    network.config.hidden_dropout_prob = network.config.attention_probs_dropout_prob = 0.1
    network.half().save_pretrained(output)
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()

"""Small networks and data that the tests share: real architectures, built in memory."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from pyrolora.guides import MonteCLoRA
from pyrolora.seeding import seed_torch

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "book"),
    *("very", "not", "the", "a", "was", "is", "fine", "dull"),
]
LABELS = ["good", "bad", "not"]
LETTERED = [*WORDS, *"ABCD", "Answer", ":", "."]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "vocab_size": len(WORDS),
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Noise of the size that the options say, whatever is learnt, around a prior at zero.
ABSOLUTE: dict[str, Any] = {"units": "one", "prior_mean": "zero"}
ABSOLUTE_MIXTURE = {**ABSOLUTE, "sample_scale": 0.3, "init_covariance": 0.01}
ABSOLUTE_GAUSSIAN = {**ABSOLUTE, "prior_scale": 0.2, "init_scale": 0.02}


class Rows(TorchDataset[Any]):
    """A torch data set over a list."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def absolute(guide: type[Any], **changes: Any) -> Any:
    """A guide of that class with absolute noise, and with trained scales at a low price."""
    sizes = ABSOLUTE_MIXTURE if guide is MonteCLoRA else ABSOLUTE_GAUSSIAN
    trained = {"scale_updates": "gradient", "kl_weight": 0.2}
    return guide(**{**sizes, **trained, **changes})


def arguments(folder: Any, **changes: Any) -> TrainingArguments:
    """A short training on the CPU that writes nothing and shows nothing."""
    options = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**{**options, **changes})


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS`, with BERT's template for pairs."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    )


def chat_tokenizer(template: str | None = None, special: Sequence[str] = ()) -> Any:
    """A tokenizer of bytes, whose chats follow ``template``; without one as ChatML writes them."""
    chatml = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=[*(special or ("<|im_start|>", "<|im_end|>"))],
    )
    made.chat_template = chatml if template is None else template
    return made


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words with the letters of choices, which writes nothing around a text."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(LETTERED)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]"
    )


def mask_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer with a mask token, the last of its vocabulary."""
    made = tokenizer()
    made.add_special_tokens({"mask_token": "[MASK]"})
    return made


def bert(num_labels: int = 2, seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    """A tiny BERT classifier (regression with one label), without dropout unless asked for."""
    seed_torch(seed)
    config = BertConfig(**{**SIZES, **NO_DROPOUT, "num_labels": num_labels, **changes})
    return BertForSequenceClassification(config).eval()


def bert_choice(seed: int = 0, **changes: Any) -> BertForMultipleChoice:
    """A tiny BERT that scores choices; its weights are large enough for scores to differ."""
    seed_torch(seed)
    sizes = {**SIZES, **NO_DROPOUT, "initializer_range": 0.3, **changes}
    return BertForMultipleChoice(BertConfig(**sizes)).eval()


def bert_tags(seed: int = 0, **changes: Any) -> BertForTokenClassification:
    """A tiny BERT that tags tokens with one of three classes."""
    seed_torch(seed)
    sizes = {**SIZES, **NO_DROPOUT, "num_labels": 3, "initializer_range": 0.3, **changes}
    return BertForTokenClassification(BertConfig(**sizes)).eval()


def bert_labels(
    classes: int = 3, *, named: bool = True, **changes: Any
) -> BertForSequenceClassification:
    """A tiny BERT whose configuration has several labels per example, named by `LABELS`."""
    names = dict(enumerate(LABELS[:classes]))
    known = {"id2label": names, "label2id": {name: i for i, name in names.items()}} if named else {}
    return bert(classes, **{"problem_type": "multi_label_classification", **known, **changes})


def bert_spans(seed: int = 0, **changes: Any) -> BertForQuestionAnswering:
    """A tiny BERT with logits for the first and the last token of an answer."""
    seed_torch(seed)
    return BertForQuestionAnswering(BertConfig(**{**SIZES, **NO_DROPOUT, **changes})).eval()


def bert_mlm(seed: int = 0, **changes: Any) -> BertForMaskedLM:
    """A tiny masked language model for `mask_tokenizer`."""
    seed_torch(seed)
    sizes = {**SIZES, **NO_DROPOUT, "initializer_range": 0.3, "vocab_size": len(WORDS) + 1}
    return BertForMaskedLM(BertConfig(**{**sizes, **changes})).eval()


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A tiny LLaMA with grouped key and value heads."""
    seed_torch(seed)
    sizes = {**SIZES, "num_key_value_heads": 1, "pad_token_id": 0, **changes}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def llama_reward(outputs: int = 1, seed: int = 0) -> LlamaForSequenceClassification:
    """A tiny LLaMA that gives a text one number, for `letter_tokenizer`."""
    seed_torch(seed)
    sizes = {**SIZES, "vocab_size": len(LETTERED), "num_key_value_heads": 1, "pad_token_id": 0}
    config = LlamaConfig(**sizes, num_labels=outputs, initializer_range=0.3)
    return LlamaForSequenceClassification(config).eval()


def gpt2(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """A tiny GPT-2, whose layers are transformers' ``Conv1D``."""
    seed_torch(seed)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **changes}
    return GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=len(WORDS), pad_token_id=0)).eval()


def t5(seed: int = 0, **changes: Any) -> T5ForConditionalGeneration:
    """A tiny T5 for `writer_tokenizer`, whose positions are relative and have no end."""
    seed_torch(seed)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 3}
    more = {"dropout_rate": 0.0, "initializer_factor": 2.0, "decoder_start_token_id": 0, **changes}
    config = T5Config(vocab_size=len(WORDS), **sizes, **special, **more)
    return T5ForConditionalGeneration(config).eval()


def bart(seed: int = 0, **changes: Any) -> BartForConditionalGeneration:
    """A tiny BART for `writer_tokenizer`, with a table of 24 positions."""
    seed_torch(seed)
    sizes = {
        f"{part}_{name}": size
        for part in ("encoder", "decoder")
        for name, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "forced_eos_token_id": 3}
    more = {"decoder_start_token_id": 3, "dropout": 0.0, "init_std": 0.3, **changes}
    config = BartConfig(
        vocab_size=len(WORDS), d_model=16, max_position_embeddings=24, **sizes, **special, **more
    )
    return BartForConditionalGeneration(config).eval()


def writer_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer over `WORDS` that ends each text with [SEP], its EOS, as T5's does."""
    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", 3)]
    )
    made.eos_token = "[SEP]"
    return made


def mlp(inputs: int = 4, outputs: int = 3, seed: int = 0) -> nn.Sequential:
    """A plain network."""
    seed_torch(seed)
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def reviews(n: int = 24, seed: int = 0) -> datasets.Dataset:
    """Raw text with a learnable binary label: does it say 'good' or 'bad'?"""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        label = int(torch.randint(2, (), generator=generator))
        filler = [WORDS[int(i)] for i in torch.randint(8, 16, (3,), generator=generator)]
        length = int(torch.randint(1, 4, (), generator=generator))
        rows.append({"text": " ".join([*filler[:length], ("bad", "good")[label]]), "label": label})
    return datasets.Dataset.from_list(rows)


def texts(n: int = 24, seed: int = 0) -> datasets.Dataset:
    """The texts of `reviews`, for language models, which read no label."""
    return reviews(n, seed).remove_columns("label")


def summaries(n: int = 12, seed: int = 0) -> datasets.Dataset:
    """Texts of several lengths, and shorter ones to write for them."""
    rows = []
    for row in reviews(n, seed):
        verdict = "good" if row["label"] else "bad"
        rows.append({"document": row["text"], "summary": verdict + " is fine" * (len(rows) % 3)})
    return datasets.Dataset.from_list(rows)


def questions(n: int = 24, seed: int = 0) -> datasets.Dataset:
    """Raw questions with two to four choices, of which the one that says 'good' is right."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        size = int(torch.randint(2, 5, (), generator=generator))
        label = int(torch.randint(size, (), generator=generator))
        fillers = [WORDS[int(i)] for i in torch.randint(8, 16, (size,), generator=generator)]
        choices = [f"{'good' if j == label else 'bad'} {word}" for j, word in enumerate(fillers)]
        question = " ".join(["the film", "is not dull"][: 1 + size % 2])
        rows.append({"question": question, "choices": choices, "label": label})
    return datasets.Dataset.from_list(rows)


def preferences(n: int = 24, seed: int = 0) -> datasets.Dataset:
    """Pairs of texts, of which the one that says 'good' is preferred."""
    rows = []
    for text in reviews(n, seed)["text"]:
        start = text.rpartition(" ")[0]
        rows.append({"chosen": f"{start} good", "rejected": f"the {start} bad"})
    return datasets.Dataset.from_list(rows)


def several(n: int = 12, form: str = "names", seed: int = 0) -> datasets.Dataset:
    """Texts whose labels are the words of `LABELS` that they have, in one of several forms."""
    generator, rows = random.Random(seed), []
    for _ in range(n):
        words = generator.choices([*LABELS, "film", "the", "very"], k=generator.randrange(2, 7))
        hot = [name in words for name in LABELS]
        forms = {
            "names": {"labels": [name for name in LABELS if name in words]},
            "numbers": {"label": [c for c, has in enumerate(hot) if has]},
            "integers": {"labels": [*map(int, hot)]},
            "floats": {"labels": [*map(float, hot)]},
            "booleans": {"labels": hot},
            "columns": dict(zip(LABELS, map(int, hot), strict=True)),
        }
        rows.append({"text": " ".join(words), **forms[form]})
    return datasets.Dataset.from_list(rows)


def squad(n: int = 8, words: int = 6, seed: int = 0, **changes: Any) -> datasets.Dataset:
    """Questions for a word of the context, in SQuAD's columns; the last has no answer."""
    generator, rows = random.Random(seed), []
    for i in range(n):
        context = generator.choices(("film", "book", "very", "the", "a", "was", "is"), k=words)
        answer, found = generator.choice(["good", "bad"]), i < n - 1
        if found:
            context[generator.randrange(words)] = answer
        text = " ".join(context)
        answers = {"text": [answer], "answer_start": [text.index(answer)]} if found else None
        row = {"id": str(i), "title": "t", "question": f"is the film {answer}", "context": text}
        rows.append({**row, "answers": answers or {"text": [], "answer_start": []}, **changes})
    return datasets.Dataset.from_list(rows)


def tagged(n: int = 24, seed: int = 0) -> datasets.Dataset:
    """Words with a tag each: is it 'good' or 'bad', an article, or another word?"""
    rows = []
    for text in reviews(n, seed)["text"]:
        words = text.split()
        kinds = [1 if w in ("good", "bad") else 2 if w in ("the", "a") else 0 for w in words]
        rows.append({"tokens": words, "ner_tags": kinds})
    return datasets.Dataset.from_list(rows)


def tokens(n: int = 16, length: int = 8, classes: int = 2, seed: int = 0) -> datasets.Dataset:
    """Tokenised sequences of one length with labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, len(WORDS), (n, length), generator=generator)
    labels = (ids[:, 0] % classes).tolist()
    mask = torch.ones_like(ids)
    return datasets.Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels}
    )


def batch_of(data: datasets.Dataset) -> dict[str, torch.Tensor]:
    """The whole data set as one batch."""
    return {name: torch.tensor(data[name][:]) for name in data.column_names}

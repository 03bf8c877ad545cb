"""The study's tasks: files, splits, networks."""

from __future__ import annotations

import lzma
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from common import digest, quiet_loading
from torch import nn
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    set_seed,
)

# Held-out examples choose epochs, learning rate and temperature; scored ones are touched once.
HELD_OUT = 200
SCORED = 500
OUTSIDE = 200
MAX_TOKENS = 128
SHUFFLE = 0  # the scored examples are the same for every seed of a fit
# Of "books": the texts, a class each, and the passages that each gives for training and scoring.
TEXTS = "lm_text"
PASSAGE_WORDS = 16
PASSAGES = (400, 80)


@dataclass(frozen=True)
class Task:
    """Where a task's data are, what they look like, and which score it is known by."""

    columns: tuple[str, ...]
    scored: str = "validation"
    kind: str = "classification"
    score: str = "accuracy"
    classes: int = 2  # 1: regression
    outside: bool = True  # whether TREC's questions are another distribution
    texts: str = ""  # the files of ``TEXTS`` whose passages are told apart
    parts: str = ""  # a line that begins each of the parts of one file, which are the classes
    words: int = PASSAGE_WORDS  # of a passage
    folder: str = ""  # where that is not the task's name
    label: str = "label"


PAIR = ("sentence1", "sentence2")
TASKS = {
    "books": Task(("sentence",), classes=13, texts="*.txt.xz"),
    "cola": Task(("sentence",), score="mcc"),
    "mrpc": Task(PAIR),
    "rte": Task(PAIR),
    "sst2": Task(("sentence",)),
    "trec": Task(("sentence",), scored="test", classes=6, outside=False),
    "trec_fine": Task(
        ("sentence",),
        scored="test",
        classes=50,
        outside=False,
        folder="trec",
        label="fine_label",
    ),
    "plays": Task(
        ("sentence",), classes=8, texts="shakespeare*", parts="Dramatis Personae", words=32
    ),
    "stsb": Task(PAIR, kind="regression", score="pearson", classes=1),
    "openbookqa": Task(("question", "choices"), kind="multiple choice", outside=False),
    "arc_easy": Task(("question", "choices"), scored="test", kind="multiple choice", outside=False),
    "arc_challenge": Task(
        ("question", "choices"), scored="test", kind="multiple choice", outside=False
    ),
}


@dataclass(frozen=True)
class Splits:
    """Training examples of one seed and size, held-out ones from the rest of the same file,
    scored ones, and sentences of another distribution (None where it has no such form)."""

    train: datasets.Dataset
    held_out: datasets.Dataset
    scored: datasets.Dataset
    outside: datasets.Dataset | None


def task_files(folder: Path, name: str) -> list[Path]:
    """The training file and the scored file, or the texts; and the file of the other
    distribution."""
    task = TASKS[name]
    if task.texts:
        files = sorted((folder / TEXTS).glob(task.texts))
        number = 1 if task.parts else task.classes
        if len(files) != number:
            raise SystemExit(
                f"{folder / TEXTS} has {len(files)} files {task.texts}; the task {name!r} takes "
                f"{number}"
            )
    else:
        own = folder / (task.folder or name)
        files = [own / f"{split}.jsonl" for split in ("train", task.scored)]
    files.append(folder / "trec" / "test.jsonl")
    for path in files:
        if not path.is_file():
            raise SystemExit(f"there is no {path}; --data must be a folder with TASK/SPLIT.jsonl")
    return files


def identity(folder: Path, name: str) -> str:
    """What the task's files contain, in 16 digits."""
    return digest(task_files(folder, name))


def load_task(folder: Path, name: str, examples: int, seed: int) -> Splits:
    """``examples`` training examples picked by ``seed``; 0 for all but the held-out ones."""
    task = TASKS[name]
    *files, trec = task_files(folder, name)
    train, scored = passages(_texts(files, task), task.words) if task.texts else map(_read, files)
    if task.label != "label":
        train, scored = _numbered(train, scored, task.label)
    columns = [*task.columns, "label"]
    train = train.select_columns(columns).shuffle(seed=seed)
    size = min(examples or len(train), len(train) - HELD_OUT)
    if task.kind == "regression":
        train, scored = (_as_float(part) for part in (train, scored))
    return Splits(
        train.select(range(size)),
        train.select(range(size, size + HELD_OUT)),
        _few(scored.select_columns(columns), SCORED),
        _outside(_few(_read(trec), OUTSIDE), task) if task.outside else None,
    )


def _texts(files: Sequence[Path], task: Task) -> list[list[str]]:
    """The words of each class: of a file, or of a part of the one file."""
    texts = [lzma.decompress(path.read_bytes()).decode() for path in files]
    if task.parts:
        texts = texts[0].split(f"\n{task.parts}\n")[1:]
    return [text.split() for text in texts]


def passages(
    texts: Sequence[list[str]], passage_words: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Which text is a passage from? Those that are scored are of the last fifth of a text."""
    pick = random.Random(SHUFFLE)
    rows: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for label, words in enumerate(texts):
        starts = range(0, len(words) - passage_words + 1, passage_words)
        cut = 4 * len(starts) // 5
        for part, own, size in zip(rows, (starts[:cut], starts[cut:]), PASSAGES, strict=True):
            for start in sorted(pick.sample(own, min(size, len(own)))):
                passage = " ".join(words[start : start + passage_words])
                part.append({"sentence": passage, "label": label})
    train, scored = (datasets.Dataset.from_list(part) for part in rows)
    return train, scored


def load_network(
    folder: Path, name: str, seed: int, dtype: str, num_labels: int | None = None
) -> tuple[nn.Module, Any]:
    """The encoder with a new head for the task, the same for all methods of a seed."""
    set_seed(seed)
    kind: Any = AutoModelForSequenceClassification
    options: dict[str, Any] = {"num_labels": num_labels or TASKS[name].classes}
    if TASKS[name].kind == "multiple choice":
        kind, options = AutoModelForMultipleChoice, {}
    with quiet_loading():
        network = kind.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
    return network, tokenizer


def mean_words(data: datasets.Dataset, task: Task) -> float:
    """Words of an example: what its price goes with."""
    few = data.select(range(min(100, len(data))))
    texts = [
        text
        for row in few
        for column in task.columns
        for text in (row[column] if isinstance(row[column], list) else [row[column]])
    ]
    words = sum(len(text.split()) for text in texts) / len(few)
    if task.kind == "multiple choice":  # the question is read once a choice
        questions = [len(row["question"].split()) * (len(row["choices"]) - 1) for row in few]
        words += sum(questions) / len(few)
    return words


def _read(path: Path) -> datasets.Dataset:
    return datasets.load_dataset("json", data_files=str(path), split="train")


def _few(data: datasets.Dataset, most: int) -> datasets.Dataset:
    return data.shuffle(seed=SHUFFLE).select(range(min(most, len(data))))


def _numbered(
    train: datasets.Dataset, scored: datasets.Dataset, column: str
) -> list[datasets.Dataset]:
    """Both with the names of classes in that column as numbers, in the order of the alphabet."""
    numbers = {name: number for number, name in enumerate(sorted(set(train[column])))}
    return [
        part.remove_columns("label").add_column("label", [numbers[name] for name in part[column]])
        for part in (train, scored)
    ]


def _as_float(data: datasets.Dataset) -> datasets.Dataset:
    return data.cast_column("label", datasets.Value("float32"))


def _outside(trec: datasets.Dataset, task: Task) -> datasets.Dataset:
    """TREC's questions; for pairs each with the next one."""
    questions = list(trec["sentence"])
    if len(task.columns) == 1:
        return datasets.Dataset.from_dict({task.columns[0]: questions})
    second = [*questions[1:], questions[0]]
    return datasets.Dataset.from_dict(dict(zip(task.columns, (questions, second), strict=True)))

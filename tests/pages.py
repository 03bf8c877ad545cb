"""The pages of the documentation, and the folder in which their reader stands.

In that folder the hub's models and data sets are tiny ones of the same names, so that a page runs
as it is written.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import problems
import torch
from llavas import llava, processor
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoModelForSequenceClassification,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

ROOT = Path(__file__).parents[1]
README, START = ROOT / "README.md", ROOT / "docs" / "start.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def blocks(page: Path, language: str = "python") -> list[str]:
    """The code of a page, each block after as many empty lines as stand before it."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return ["\n" * text[: match.start(1)].count("\n") + match.group(1) for match in found]


def run(page: Path, names: dict[str, Any]) -> None:
    """Run the Python of a page from top to bottom; a traceback shows the page's own lines."""
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


def furnish(folder: Path) -> None:
    """Put a reader's models, adapter and data into a folder."""
    words, letters = problems.tokenizer(), problems.letter_tokenizer()
    sizes = {"initializer_range": 0.3, "vocab_size": len(letters), "max_position_embeddings": 256}
    chats = problems.chat_tokenizer()
    talking = {"vocab_size": len(chats), "max_position_embeddings": 512}
    encoder = problems.bert(initializer_range=0.3)
    train(encoder, words, steps=10)
    torch.manual_seed(0)
    vit = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vit |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    models: dict[str, tuple[Any, Any]] = {
        ENCODER: (encoder, words),
        "bert-base-uncased": (problems.bert(initializer_range=0.3).bert, words),
        "google/flan-t5-small": (problems.t5(), problems.writer_tokenizer()),
        "HuggingFaceTB/SmolLM2-135M-Instruct": (problems.llama(**sizes), letters),
        "Qwen/Qwen2.5-0.5B-Instruct": (problems.llama(**talking), chats),
        "google/vit-base-patch16-224-in21k": (
            ViTModel(ViTConfig(**vit)),
            ViTImageProcessorPil(size={"height": 8, "width": 8}),
        ),
        "llava-hf/llava-1.5-7b-hf": (llava(), processor()),
    }
    for name, (network, reader) in models.items():
        network.save_pretrained(folder / name)
        reader.save_pretrained(folder / name)
    tables: dict[str, datasets.Dataset] = {
        "train.jsonl": problems.reviews(48),
        "test.jsonl": problems.reviews(24, seed=1).map(contradict, with_indices=True),
        "knkarthick/samsum/train.jsonl": problems.summaries(),
        "squad_v2/train.jsonl": problems.squad(),
        "go_emotions/train.jsonl": problems.several(),
    }
    for name, table in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        table.to_json(folder / name)
    network = AutoModelForSequenceClassification.from_pretrained(folder / ENCODER)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    adapted = get_peft_model(network, config)
    train(adapted, words, steps=20)
    adapted.save_pretrained(folder / "adapter")


def contradict(row: dict[str, Any], index: int) -> dict[str, Any]:
    """Turn every sixth label, so that no model is right about all of them."""
    return {"label": 1 - row["label"]} if index % 6 == 0 else {}


def train(network: Any, words: Any, steps: int) -> None:
    """Train a network, or its adapter alone, on reviews."""
    data = problems.reviews(48)
    batch = words(data["text"][:], padding=True, return_tensors="pt")
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        network(**batch, labels=torch.tensor(data["label"][:])).loss.backward()
        optimizer.step()


def yours() -> dict[str, dict[str, Any]]:
    """What stands for a reader's own data in pages that show no file of them, by page."""
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A film."}]
    return {
        "tasks.md": {
            "test": problems.summaries(4, seed=1),
            "rows": problems.questions(12),
            "pairs": [{"chosen": "a good film", "rejected": "a bad film"}] * 6,
            "chats": [{"messages": said}] * 4,
            "chat_model": "Qwen/Qwen2.5-0.5B-Instruct",
            "picture": Image.new("RGB", (10, 12), (250, 0, 0)),
            "another": Image.new("RGB", (12, 9), (0, 0, 250)),
        }
    }

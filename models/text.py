"""What the embedded models are made from: books, and docstrings of installed packages.

Left out is what the demo tests on: the held-out files of the libraries it classifies, and all of
the libraries it calls unseen.
"""

from __future__ import annotations

import hashlib
import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path

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


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Every hundredth text goes to validation, by its digest."""
    parts: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        parts[int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 == 0].append(text)
    return parts

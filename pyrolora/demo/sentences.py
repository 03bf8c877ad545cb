"""Real text on every machine: sentences of documentation, labelled with their library."""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import datasets

from pyrolora import defaults
from pyrolora.errors import DataError
from pyrolora.progress import progress

# The classes: dependencies of this package, which are always installed, each with the words that
# would give it away. Sentences with such a word are left out.
LIBRARIES = {
    "matplotlib": ("mpl", "pyplot"),
    "networkx": ("nx",),
    "numpy": ("np",),
    "pandas": ("pd",),
    "scipy": ("sp",),
    "sympy": (),
    "torch": ("pytorch",),
    "transformers": (),
}
# Another distribution: no model is trained on it, and the embedded encoder was not either.
UNSEEN = {"fsspec": (), "h5py": (), "huggingface_hub": ("hf", "hugging"), "xarray": ()}

SHORTEST, LONGEST = 8, 20  # words

_MARKUP = re.compile(r":[\w:]+:`~?([^`<]+?)(?: ?<[^`]*>)?`|`+([^`]+)`+")
_SENTENCE_END = re.compile(r"(?<=\.)\s+(?=[A-Z])")
_PLAIN = re.compile(r"(?!.*(?: : |--|[A-Z][a-z]+: ))[A-Z][A-Za-z0-9 ,;:'()\"/._-]+\.")


def sentences(
    *,
    train: int = defaults.DEMO_TRAIN,
    test: int = defaults.DEMO_TEST,
    unseen: int = defaults.DEMO_TEST,
) -> datasets.DatasetDict:
    """Return sentences from the docstrings of installed libraries, labelled with the library.

    Whole files belong to one split, and no sentence stands in two splits. The choice is a
    function of the installed versions alone.

    Parameters
    ----------
    train, test
        Most sentences per split of each of the eight libraries.
    unseen
        Most sentences of each of the four other libraries.

    Returns
    -------
    datasets.DatasetDict
        ``train`` and ``test`` with ``text`` and ``label`` (a ``ClassLabel``), shuffled; ``unseen``
        with ``text`` and ``label_name``, the library of the sentence.

    Raises
    ------
    DataError
        When a library is not installed, or has no docstrings.
    """
    names = list(LIBRARIES)
    seen: set[str] = set()
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": [], "unseen": []}
    parts = [("train", False, train), ("test", True, test)]
    wanted = [(*part, *library) for part in parts for library in LIBRARIES.items()]
    title = "reading docstrings"
    for split, held_out, number, name, giveaways in progress(wanted, title=title):
        texts = islice(_clean(name, giveaways, held_out, seen), number)
        rows[split] += [{"text": text, "label": name} for text in texts]
    for name, giveaways in progress(UNSEEN.items(), title=title):
        texts = islice(_clean(name, giveaways, None, seen), unseen)
        rows["unseen"] += [{"text": text, "label_name": name} for text in texts]
    labelled = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(
                sorted(some, key=lambda row: _digest(row["text"])),
                features=None if split == "unseen" else labelled,
            )
            for split, some in rows.items()
        }
    )


def docstrings(library: str, *, held_out: bool | None = None) -> Iterator[str]:
    """Yield the docstrings of an installed package, file by file in an arbitrary, fixed order.

    Parameters
    ----------
    library
        The import name of the package.
    held_out
        True: files whose sentences are test data; False: the others; None: all.
    """
    for path, name in _files(library):
        if held_out is not None and held_out != _is_test_data(f"{library}/{name}"):
            continue
        try:
            with warnings.catch_warnings():  # other people's code has odd escapes
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # templates, older encodings, null bytes
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield text


def _files(library: str) -> list[tuple[Path, str]]:
    """Return source files and their names inside the package, in the order of their digests."""
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        raise DataError(
            f"the library {library!r} is not installed, and the demo's sentences come from it; "
            f"pip install {library}"
        )
    root = Path(spec.origin).parent
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = [n.as_posix() for n in names if not any(part.startswith("test") for part in n.parts)]
    return [(root / name, name) for name in sorted(kept, key=_digest)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_test_data(file: str) -> bool:
    """Return whether a file is one of the three in ten for the test data."""
    return int(_digest(file), 16) % 10 < 3


def _clean(
    library: str, giveaways: tuple[str, ...], held_out: bool | None, seen: set[str]
) -> Iterator[str]:
    """Yield sentences that are plain prose, do not name the library, and are new."""
    words = "".join(rf"|\b{word}s?\b" for word in giveaways)
    named = re.compile(rf"(?i){library}{words}")
    start = len(seen)
    for docstring in docstrings(library, held_out=held_out):
        for paragraph in re.split(r"\n\s*\n", docstring):
            plain = _MARKUP.sub(lambda match: match[1] or match[2], " ".join(paragraph.split()))
            for sentence in _SENTENCE_END.split(plain):
                long_enough = SHORTEST <= len(sentence.split()) <= LONGEST
                if not long_enough or not _PLAIN.fullmatch(sentence) or named.search(sentence):
                    continue
                if sentence not in seen:
                    seen.add(sentence)
                    yield sentence
    if len(seen) == start:
        raise DataError(f"the library {library!r} was installed without its docstrings")

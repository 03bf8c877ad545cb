"""The demo's data: fixed by the installed versions, its splits disjoint, its labels not given
away."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest

from pyrolora.demo.sentences import LIBRARIES, LONGEST, SHORTEST, UNSEEN, docstrings, sentences
from pyrolora.errors import DataError

MODULE = sys.modules["pyrolora.demo.sentences"]
SIZES = {"train": 12, "test": 6, "unseen": 8}


@pytest.fixture(scope="module")
def data() -> datasets.DatasetDict:
    return sentences(**SIZES)


def test_the_same_versions_give_the_same_sentences(data: datasets.DatasetDict) -> None:
    again = sentences(**SIZES)
    assert {split: list(rows) for split, rows in again.items()} == {
        split: list(rows) for split, rows in data.items()
    }


def test_every_library_has_its_share(data: datasets.DatasetDict) -> None:
    names = data["train"].features["label"].names
    assert names == list(LIBRARIES)
    assert data["test"].features == data["train"].features
    for split in ("train", "test"):
        assert Counter(data[split]["label"]) == dict.fromkeys(range(8), SIZES[split])
    assert Counter(data["unseen"]["label_name"]) == dict.fromkeys(UNSEEN, SIZES["unseen"])


def test_libraries_that_are_unseen_are_no_labels(data: datasets.DatasetDict) -> None:
    assert not set(LIBRARIES) & set(UNSEEN)
    assert not set(data["train"].features["label"].names) & set(data["unseen"]["label_name"])
    assert set(data["unseen"].column_names) == {"text", "label_name"}


def test_no_sentence_stands_twice(data: datasets.DatasetDict) -> None:
    texts = [text for rows in data.values() for text in rows["text"]]
    assert len(set(texts)) == len(texts)


def test_rows_are_mixed(data: datasets.DatasetDict) -> None:
    """Not library after library."""
    labels = data["train"]["label"][:]
    assert labels != sorted(labels)
    assert len(set(labels[: len(labels) // 4])) > 2


def test_no_sentence_names_its_own_library(data: datasets.DatasetDict) -> None:
    names = data["train"].features["label"].names
    rows = [(row["text"], names[row["label"]]) for s in ("train", "test") for row in data[s]]
    rows += [(row["text"], row["label_name"]) for row in data["unseen"]]
    for text, library in rows:
        words = set(re.findall(r"[a-z0-9_]+", text.lower()))
        giveaways = {**LIBRARIES, **UNSEEN}[library]
        assert library not in text.lower()
        assert not words & set(giveaways), text


def test_sentences_are_prose_of_some_length(data: datasets.DatasetDict) -> None:
    for rows in data.values():
        for text in rows["text"]:
            assert SHORTEST <= len(text.split()) <= LONGEST
            assert re.match(r"[A-Z]", text)
            assert text.endswith(".")
            assert not re.search(r"[`\n*=<>{}\[\]]", text), text


def test_more_sentences_begin_with_the_same_ones(data: datasets.DatasetDict) -> None:
    """So that a larger training set is a larger one, not another."""
    more = sentences(train=20, test=6, unseen=8)
    assert set(data["train"]["text"]) < set(more["train"]["text"])


# Docstrings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["h5py", "fsspec"])
def test_files_held_out_and_the_others_make_the_whole(library: str) -> None:
    whole = Counter(docstrings(library))
    held_out = Counter(docstrings(library, held_out=True))
    others = Counter(docstrings(library, held_out=False))
    assert held_out
    assert others
    assert held_out + others == whole


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package to fill."""
    root = tmp_path / "lizard"
    root.mkdir()
    (root / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    return root


def test_docstrings_of_modules_classes_and_functions_are_found(package: Path) -> None:
    source = '''"""Of the module."""
class One:
    """Of the class."""
    def method(self):
        """Of the method."""
async def two():
    """Of the coroutine."""
    "no docstring"
three = """no docstring either"""
def four(): pass
'''
    (package / "module.py").write_text(source)
    (package / "sub").mkdir()
    (package / "sub" / "deep.py").write_text('"""Of a file further down."""')
    assert set(docstrings("lizard")) == {
        *("Of the module.", "Of the class.", "Of the method.", "Of the coroutine."),
        "Of a file further down.",
    }


def test_tests_and_files_that_cannot_be_read_are_left_out(package: Path) -> None:
    (package / "tests").mkdir()
    (package / "tests" / "helpers.py").write_text('"""Of a test."""')
    (package / "test_one.py").write_text('"""Of another test."""')
    (package / "template.py").write_text('"""Of a template."""\n{{ name }} = = 1')
    (package / "latin.py").write_bytes('"""café"""'.encode("latin-1"))
    (package / "null.py").write_bytes(b'"""Of zeros."""\n\x00')
    (package / "good.py").write_text('"""Of a good one."""')
    assert list(docstrings("lizard")) == ["Of a good one."]


def test_an_odd_escape_in_a_source_file_is_nobodys_business(package: Path) -> None:
    """Python warns of it, and under ``-W error`` will not parse the file: no reason to lose it."""
    (package / "escape.py").write_text('"""Of a file."""\npattern = "\\d"\n')
    assert list(docstrings("lizard")) == ["Of a file."]


def test_a_package_is_not_imported(package: Path) -> None:
    (package / "__init__.py").write_text('"""Of the package."""\nraise SystemExit("imported")')
    assert list(docstrings("lizard")) == ["Of the package."]


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="'unicorn' is not installed"):
        list(docstrings("unicorn"))
    monkeypatch.setattr(MODULE, "UNSEEN", {"unicorn": ()})
    with pytest.raises(DataError, match="pip install unicorn"):
        sentences(train=1, test=1, unseen=1)


def test_a_library_without_docstrings_is_named(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "UNSEEN", {"lizard": ()})
    with pytest.raises(DataError, match="'lizard' was installed without its docstrings"):
        sentences(train=1, test=1, unseen=1)


PROSE = "The animals sleep for most of the day in the sun"


@pytest.mark.parametrize(
    ("docstring", "found"),
    [
        (f"{PROSE}.", [f"{PROSE}."]),
        (f"{PROSE}.\n\n{PROSE} and eat.", [f"{PROSE}.", f"{PROSE} and eat."]),
        (f"{PROSE}. {PROSE} and eat.", [f"{PROSE}.", f"{PROSE} and eat."]),
        ("The animals sleep for most\n    of the day in the sun.", [f"{PROSE}."]),
        (f"{PROSE} of ``Africa``.", [f"{PROSE} of Africa."]),
        (f"{PROSE} of :ref:`Africa <there>`.", [f"{PROSE} of Africa."]),
        ("Too short a sentence.", []),
        (" ".join(["The", *["long"] * 40, "sentence."]), []),
        (f"{PROSE} with a lizard.", []),
        (f"{PROSE} with Lizards.", []),
        (f"{PROSE} with sp.Animal.", []),
        (f"{PROSE} with the sp.", []),
        (f"{PROSE} in a special sparse space.", [f"{PROSE} in a special sparse space."]),
        (f"{PROSE} = 3.", []),
        (f">>> {PROSE}.", []),
        (f"Parameters: {PROSE}.", []),
        (f"{PROSE}", []),
    ],
)
def test_what_of_a_docstring_is_a_sentence(
    docstring: str, found: list[str], package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word that gives the library away is that word, not every word that begins like it."""
    (package / "module.py").write_text(f'"""{docstring}"""')
    (package / "other.py").write_text(
        '"""Something else is always said here, in some other words."""'
    )
    rest = "Something else is always said here, in some other words."
    clean = MODULE._clean("lizard", ("sp",), None, set())
    assert [sentence for sentence in clean if sentence != rest] == found

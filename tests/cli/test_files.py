"""Every reader gives the rows that were written, and says in one line what it cannot read."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from problems import reviews

from pyrolora.cli.columns import label_names, labelled, numbers_as_numbers, with_columns
from pyrolora.cli.fingerprint import fingerprint
from pyrolora.cli.reading import read_data
from pyrolora.cli.tables import print_table, writer
from pyrolora.errors import ConfigError, DataError

ROWS = [
    {"text": 'a "good", fine film', "label": 1},
    {"text": "two\nlines,\tone tab", "label": 0},
    {"text": "déjà vu", "label": 1},
]


def read(source: str, split: str | None = None) -> datasets.Dataset:
    return read_data(source, split, ("train", "test"))


def delimited(delimiter: str) -> bytes:
    out = io.StringIO()
    table = csv.DictWriter(out, ["text", "label"], delimiter=delimiter)
    table.writeheader()
    table.writerows(ROWS)
    return out.getvalue().encode()


def parquet() -> bytes:
    out = io.BytesIO()
    pd.DataFrame(ROWS).to_parquet(out)
    return out.getvalue()


CONTENTS: dict[str, Callable[[], bytes]] = {
    "jsonl": lambda: "\n".join(json.dumps(row) for row in ROWS).encode(),
    "json": lambda: json.dumps(ROWS, indent=1).encode(),
    "csv": lambda: delimited(","),
    "tsv": lambda: delimited("\t"),
    "parquet": parquet,
}


def written(folder: Path, name: str, content: str | bytes) -> str:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


def unreadable(source: str, *words: str) -> None:
    """Reading fails, at the latest where the rows are looked at, in one line that names it."""
    with pytest.raises(DataError) as caught:
        list(read(source))
    for word in (Path(source).name, *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONTENTS)
def test_every_kind_of_file_gives_the_rows_that_were_written(kind: str, tmp_path: Path) -> None:
    data = read(written(tmp_path, f"data.{kind}", CONTENTS[kind]()))
    assert isinstance(data, datasets.Dataset)
    rows = [{**row, "label": str(row["label"])} for row in ROWS]  # cells of CSV stay text
    assert list(data) == (rows if kind in ("csv", "tsv") else ROWS)


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    assert list(read(written(tmp_path, "data.json", CONTENTS["jsonl"]()))) == ROWS


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_file_holds_a_text_a_line(end: str, tmp_path: Path) -> None:
    data = read(written(tmp_path, "data.txt", end.join(["a film", "", "bad, bad", ""])))
    assert list(data) == [{"text": "a film"}, {"text": "bad, bad"}], "blank lines are no texts"


@pytest.mark.parametrize("inside", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_only_a_newline_ends_a_line_of_a_text_file(inside: str, tmp_path: Path) -> None:
    """As every other tool counts lines; else predictions would not stand beside their texts."""
    data = read(written(tmp_path, "data.txt", f"one{inside}text\nanother\n"))
    assert data["text"][:] == [f"one{inside}text", "another"]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_rows_of_json_may_leave_out_columns(kind: str, tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b", "label": 1}]
    content = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
    data = read(written(tmp_path, f"data.{kind}", content))
    assert list(data) == [{"text": "a", "label": None}, {"text": "b", "label": 1}]


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_text_may_be_as_long_as_a_book(kind: str, tmp_path: Path) -> None:
    """3 MB in one row."""
    rows = [{"text": "good film, " * 300_000, "label": 1}, {"text": "bad", "label": 0}]
    frame = pd.DataFrame(rows)
    file = tmp_path / f"data.{kind}"
    if kind in ("csv", "tsv"):
        frame.to_csv(file, index=False, sep="," if kind == "csv" else "\t")
    elif kind == "parquet":
        frame.to_parquet(file)
    else:
        frame.to_json(file, orient="records", lines=kind == "jsonl")
    assert read(str(file))["text"][:] == [row["text"] for row in rows]


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "txt"])
def test_a_byte_order_mark_is_no_part_of_the_data(kind: str, tmp_path: Path) -> None:
    """Windows programs put one at the beginning."""
    content = {
        "csv": "text\na\n",
        "json": '[{"text": "a"}]',
        "jsonl": '{"text": "a"}\n',
        "txt": "a\n",
    }[kind]
    data = read(written(tmp_path, f"data.{kind}", "\ufeff" + content))
    assert list(data) == [{"text": "a"}]


def cut_parquet() -> bytes:
    return parquet()[:-20]


DAMAGED: dict[str, tuple[str, str | bytes]] = {
    "no parquet": ("data.parquet", "text,label\na,1\n"),
    "half a parquet": ("data.parquet", cut_parquet()),
    "half an object": ("data.json", '{"text": "a"'),
    "half a list": ("data.json", '[{"text": "a"}, {"te'),
    "a list of numbers": ("data.json", "[1, 2]"),
    "a list of objects and numbers": ("data.json", '[{"text": "a"}, 3]'),
    "a list with a column of two types": ("data.json", '[{"text": "a"}, {"text": 3}]'),
    "an empty list": ("data.json", "[]"),
    "a line that is no JSON": ("data.jsonl", '{"text": "a"}\nnot json\n'),
    "a line that is no object": ("data.jsonl", "3\n"),
    "a row with too few fields": ("data.csv", "text,label\na\n"),
    "lines with a column of two types": ("data.jsonl", '{"text": "a"}\n{"text": 3}\n'),
    "blank lines": ("data.jsonl", "\n\n"),
    "a row with too many fields": ("data.csv", "text,label\na,1,2\n"),
    "a column twice": ("data.csv", "text,text\na,b\n"),
    "names of columns alone": ("data.csv", "text,label\n"),
    "nothing but newlines": ("data.csv", "\n\n"),
    "an open quote": ("data.tsv", 'text\tlabel\n"a\t1\n'),
    "no bytes": ("data.txt", ""),
    "csv in Latin-1": ("data.csv", "text,label\ncafé,1\n".encode("latin-1")),
    "jsonl in Latin-1": ("data.jsonl", '{"text": "café"}\n'.encode("latin-1")),
    "txt in Latin-1": ("data.txt", "café\n".encode("latin-1")),
    "an ending that is none": ("data.docx", "a"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_cannot_be_read_is_said_in_one_line(case: str, tmp_path: Path) -> None:
    unreadable(written(tmp_path, *DAMAGED[case]))


@pytest.mark.parametrize("name", ["gone.csv", "folder/gone.jsonl", "gone"])
def test_a_file_that_is_not_there(name: str, tmp_path: Path) -> None:
    unreadable(str(tmp_path / name), "there is no file")


def test_a_name_is_looked_for_on_the_hub() -> None:
    unreadable("no-such-data", "no file or folder here", "no data set within reach")


# Folders ------------------------------------------------------------------------------------------


def test_a_saved_data_set_is_read_with_its_class_names(tmp_path: Path) -> None:
    data = reviews(6).cast_column("label", datasets.ClassLabel(names=["neg", "pos"]))
    data.save_to_disk(tmp_path / "data")
    found = read(str(tmp_path / "data"))
    assert list(found) == list(data)
    assert found.features == data.features


@pytest.fixture
def splits(tmp_path: Path) -> str:
    data = datasets.DatasetDict(train=reviews(6), test=reviews(3, seed=1))
    data.save_to_disk(tmp_path / "splits")
    return str(tmp_path / "splits")


def test_one_split_is_read_the_one_that_was_asked_for_or_the_first_of_the_usual_ones(
    splits: str,
) -> None:
    first, second = list(reviews(6)), list(reviews(3, seed=1))
    assert list(read_data(splits, None, ("train",))) == first
    assert list(read_data(splits, None, ("test", "train"))) == second
    assert list(read_data(splits, None, ("validation", "test"))) == second
    assert list(read_data(splits, "test", ("train",))) == second


def test_a_split_that_is_not_there(splits: str) -> None:
    with pytest.raises(ConfigError, match=r"no split 'dev'; it has \['test', 'train'\]"):
        read_data(splits, "dev", ("train",))
    with pytest.raises(ConfigError, match=r"no split 'dev' or 'validation'.*--split"):
        read_data(splits, None, ("dev", "validation"))


def test_a_split_of_data_without_splits(tmp_path: Path) -> None:
    source = written(tmp_path, "data.csv", "text,label\na,1\n")
    with pytest.raises(ConfigError, match="leave out --split train"):
        read(source, "train")


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_a_damaged_folder(file: str, damage: str, tmp_path: Path) -> None:
    """Read in one piece, or refused: never an error of another kind, never other rows."""
    reviews(6).save_to_disk(tmp_path / "data")
    part = tmp_path / "data" / file
    if damage == "gone":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:40] if damage == "cut" else b"{}")
    if (file, damage) == ("dataset_info.json", "other"):  # it holds nothing that rows depend on
        assert list(read(str(tmp_path / "data"))) == list(reviews(6))
    else:
        unreadable(str(tmp_path / "data"))


def test_an_empty_folder(tmp_path: Path) -> None:
    unreadable(str(tmp_path), "save_to_disk")


# Columns ------------------------------------------------------------------------------------------

TABLE = datasets.Dataset.from_dict(
    {"title": ["t"], "body": ["b"], "text": ["x"], "label": [0], "verdict": ["v"], "number": [7]}
)


@pytest.mark.parametrize(
    ("text", "label", "row"),
    [
        pytest.param(["title"], None, {"text": "t", "label": 0}, id="a text"),
        pytest.param(["text"], None, {"text": "x", "label": 0}, id="its own name"),
        pytest.param(["title"], "verdict", {"text": "t", "label": "v"}, id="a text and a label"),
        pytest.param(
            ["title", "body"], "verdict", {"text": "t", "text_pair": "b", "label": "v"}, id="a pair"
        ),
        pytest.param(
            ["body", "text"], None, {"text": "b", "text_pair": "x", "label": 0}, id="moved on"
        ),
        pytest.param(["title"], "label", {"text": "t", "label": 0}, id="the label's own name"),
        pytest.param(
            [],
            "verdict",
            {"title": "t", "body": "b", "text": "x", "label": "v", "number": 7},
            id="a label alone",
        ),
        pytest.param([], None, TABLE[0], id="nothing"),
    ],
)
def test_chosen_columns_take_the_names_that_fit_knows(text: Any, label: Any, row: Any) -> None:
    assert with_columns(TABLE, text, label, "data")[0] == row


def test_one_called_labels_is_dropped_when_another_is_the_target() -> None:
    data = TABLE.rename_column("label", "labels")
    assert with_columns(data, [], "verdict", "data")[0] == {
        "title": "t",
        "body": "b",
        "text": "x",
        "label": "v",
        "number": 7,
    }
    assert with_columns(data, ["title"], None, "data")[0] == {"text": "t", "labels": 0}


def test_a_chat_and_a_part_of_an_object_can_be_chosen() -> None:
    talk = [{"role": "user", "content": "hello"}]
    data = datasets.Dataset.from_dict(
        {"talk": [talk], "t": [{"en": "a", "de": "b"}], "note": ["n"], "label": [["x", "y"]]}
    )
    assert with_columns(data, ["talk"], None, "data")[0] == {"messages": talk, "label": ["x", "y"]}
    assert with_columns(data, ["t.en"], "t.de", "data")[0] == {"text": "a", "label": "b"}
    assert label_names(data) == set()


def test_a_column_of_pictures_keeps_its_name() -> None:
    data = datasets.Dataset.from_dict({"picture": ["a.png"], "kind": ["cat"], "note": ["x"]})
    row = {"picture": "a.png", "label": "cat"}
    assert with_columns(data, ["picture"], "kind", "data")[0] == row


NESTED = [
    {
        "choices": ["a", "b, c"],
        "label": [0, 1],
        "answers": {"text": ["é"], "answer_start": [3]},
        "messages": [{"role": "user", "content": "[hello]"}],
        "text": "[1] is no list",
        "number": 2.0,
    }
] * 2


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_table_may_hold_lists_and_objects_as_json(delimiter: str, tmp_path: Path) -> None:
    out = io.StringIO()
    table = csv.writer(out, delimiter=delimiter)
    table.writerow(NESTED[0])
    for row in NESTED:
        table.writerow(v if isinstance(v, str) else json.dumps(v) for v in row.values())
    source = written(tmp_path, "data.csv" if delimiter == "," else "data.tsv", out.getvalue())
    assert list(with_columns(read(source), [], None, source)) == NESTED


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_lists_that_are_written_are_read_again(suffix: str, tmp_path: Path) -> None:
    table = pd.DataFrame(NESTED)
    writer(tmp_path / f"out.{suffix}")(table)
    source = str(tmp_path / f"out.{suffix}")
    assert list(with_columns(read(source), [], None, source)) == NESTED


def test_lists_as_python_prints_them_are_refused(tmp_path: Path) -> None:
    source = written(tmp_path, "data.csv", "text,choices\na,\"['b', 'c']\"\n")
    unreadable(source, "the column 'choices' holds lists or objects that are no JSON", "json.dumps")


@pytest.mark.parametrize(("text", "label"), [(["headline"], None), ([], "headline")])
def test_a_column_that_is_not_there(text: list[str], label: str | None) -> None:
    with pytest.raises(DataError, match=r"data\.csv has no column 'headline'; it has \['title'"):
        with_columns(TABLE, text, label, "data.csv")


@pytest.mark.parametrize(
    ("text", "label"),
    [(["title", "body", "text"], None), (["title", "title"], None), (["title"], "title")],
)
def test_columns_that_cannot_go_together(text: list[str], label: str | None) -> None:
    with pytest.raises(ConfigError, match="--text"):
        with_columns(TABLE, text, label, "data.csv")


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "0"], [1, 0]),
        (["1.5", "-2"], [1.5, -2.0]),
        (["1e-3", "0"], [1e-3, 0.0]),
        (["good", "1"], ["good", "1"]),
        (["1_0", "1_1"], ["1_0", "1_1"]),
        (["nan", "inf"], ["nan", "inf"]),
        (["-inf", "1"], [-math.inf, 1.0]),
        ([None, "1"], [None, 1]),
        ([3, 4], [3, 4]),
    ],
)
@pytest.mark.parametrize("name", ["label", "labels"])
def test_labels_of_text_are_numbers_if_every_one_is(name: str, cells: Any, values: Any) -> None:
    data = datasets.Dataset.from_dict({"text": ["1", "2"], name: cells})
    found = numbers_as_numbers(data)
    assert found[name][:] == values
    assert [type(value) for value in found[name]] == [type(value) for value in values]
    assert found["text"][:] == ["1", "2"], "a text of digits is a text"


def test_known_names_stay_names_and_only_tables_of_text_are_read_for_numbers(
    tmp_path: Path,
) -> None:
    table = written(tmp_path, "data.csv", "text,label\na,1\nb,2\n")
    lines = written(tmp_path, "data.jsonl", '{"text": "a", "label": "1"}\n')

    def labels(source: str, names: set[str]) -> Any:
        return labelled(source, None, (), [], None, names)["label"][:]

    assert labels(table, set()) == labels(table, {"LABEL_0", "good"}) == [1, 2]
    assert labels(table, {"1", "2", "x"}) == labels(table, {"1"}) == ["1", "2"]
    assert labels(lines, set()) == ["1"]


# The same data? -----------------------------------------------------------------------------------


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    file = Path(written(tmp_path, "data.csv", "text,label\na,1\n"))
    first = fingerprint(str(file), reviews(1))
    copy = shutil.copy(file, tmp_path / "copy.csv")
    assert fingerprint(str(copy), reviews(1)) == first
    file.write_text("text,label\na,0\n")
    assert fingerprint(str(file), reviews(1)) != first


def test_the_digest_of_a_folder_is_that_of_its_rows_and_columns(tmp_path: Path) -> None:
    reviews(6).save_to_disk(tmp_path / "one")
    reviews(6, seed=1).save_to_disk(tmp_path / "other")

    def digest(name: str) -> str:
        source = str(tmp_path / name)
        return fingerprint(source, with_columns(read(source), ["text"], None, source))

    assert digest("one") == digest("one")
    assert digest("one") != digest("other")


# Writers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_what_is_written_is_read_again(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"table.{kind}"
    writer(file)(pd.DataFrame(ROWS))
    rows = [{**row, "label": str(row["label"])} for row in ROWS]
    assert list(read(str(file))) == (rows if kind in ("csv", "tsv") else ROWS)


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_computed(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"table\.xlsx; name it \.csv, \.tsv, \.jsonl, \.parquet"):
        writer(tmp_path / "table.xlsx")
    with pytest.raises(ConfigError, match="there is no folder"):
        writer(tmp_path / "gone" / "table.csv")


# Tables that others open ---------------------------------------------------------------------


CELLS = ["=1+1", "+cmd", "-cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\r=1", "-5", "+3.5e2", "plain"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_spreadsheet_runs_no_cell(suffix: str, tmp_path: Path) -> None:
    table = pd.DataFrame({"=text": CELLS, "number": range(-1, len(CELLS) - 1)})
    writer(tmp_path / f"table{suffix}")(table)
    sep = {"sep": "\t"} if suffix == ".tsv" else {}
    with (tmp_path / f"table{suffix}").open(newline="") as stream:
        rows = list(csv.reader(stream, delimiter=sep.get("sep", ",")))
    assert rows[0] == ["'=text", "number"]
    assert [row[0] for row in rows[1:]] == [f"'{c}" for c in CELLS[:6]] + CELLS[6:]
    assert rows[1][1] == "-1"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_other_tables_keep_every_text(suffix: str, tmp_path: Path) -> None:
    writer(tmp_path / f"table{suffix}")(pd.DataFrame({"text": CELLS}))
    assert read_data(str(tmp_path / f"table{suffix}"), None, ())["text"][:] == CELLS


def test_a_table_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "table.csv").symlink_to("victim")
    writer(tmp_path / "table.csv")(pd.DataFrame({"a": [1]}))
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "table.csv").read_text() == "a\n1\n"


def test_a_printed_table_has_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(pd.DataFrame({"a\x1b": ["\x1b[31mred", "=1"], "n": [1, 2]}))
    assert capsys.readouterr().out == "a\\x1b,n\n\\x1b[31mred,1\n'=1,2\n"

"""PEFT's rules for names: the user's expressions and those of a file are matched alike."""

from __future__ import annotations

import pytest

from pyrolora.adapters.names import (
    PYTHON,
    Expressions,
    block_of,
    collapsed,
    is_saved,
    matches,
    selects,
    value_of,
)
from pyrolora.errors import CheckpointError, ConfigError
from pyrolora.peft.patterns import Patterns

NAME = "encoder.layer.11.attention.query"
MATCHERS = pytest.mark.parametrize("expressions", [PYTHON, Patterns()], ids=["user", "file"])


@MATCHERS
@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["query"], True),
        (["attention.query"], True),
        (["uery"], False),
        ([NAME], True),
        ([], False),
        (r".*\.query", True),
        ("query", False),
        (r"encoder\.layer\.(0|11)\..*", True),
        (r".*\.layer\.(0|1)\..*", False),
    ],
)
def test_one_string_is_an_expression_and_a_list_holds_suffixes(
    expressions: Expressions, wanted: str | list[str], expected: bool
) -> None:
    assert selects(wanted, NAME, expressions) is expected


def test_one_string_of_the_users_may_be_a_suffix() -> None:
    assert matches(NAME, "attention.query")
    assert not matches(NAME, "uery")


@MATCHERS
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"query": 4}, 4),
        ({"uery": 4}, 8),
        ({"attention.query": 4, "query": 2}, 4),
        ({r"layer\.\d+\.attention\.query": 4}, 4),
        ({r"^encoder\..*": 4}, 4),
        ({r"^attention\.query": 4}, 8),
        ({"key|query": 4}, 4),
        ({"layer": 4}, 8),
    ],
)
def test_the_first_key_that_matches_the_end_of_the_name_counts(
    expressions: Expressions, values: dict[str, int], expected: int
) -> None:
    assert value_of(NAME, values, 8, expressions) == expected


@pytest.mark.parametrize(
    ("name", "behind", "number"),
    [
        (NAME, None, 11),
        (NAME, "layer", 11),
        (NAME, ["block", "layer"], 11),
        (NAME, "block", None),
        ("decoder.blocks.2.mlp.3.up", None, 2),
        ("decoder.blocks.2.mlp.3.up", "mlp", 3),
        ("lm_head", None, None),
    ],
)
def test_the_number_of_a_block(name: str, behind: str | list[str] | None, number: int) -> None:
    assert block_of(name, behind) == number


def test_a_saved_module_need_not_begin_a_part() -> None:
    assert is_saved(["classifier"], "pre_classifier")


def test_numbers_of_names_collapse() -> None:
    names = ["0.q", "layer.0.q", "layer.11.q", "w1.layer.2", "layer.0.k"]
    assert collapsed(names) == ["#.q", "layer.#.q", "w1.layer.#", "layer.#.k"]


def test_what_is_no_expression_is_named() -> None:
    for rule in (lambda: selects("(", NAME), lambda: value_of(NAME, {"(": 1}, 2)):
        with pytest.raises(ConfigError, match=r"'\(' is not a regular expression.*correct it"):
            rule()
    with pytest.raises(ConfigError, match=r"'\(' is not a regular expression"):
        block_of(NAME, "(")
    with pytest.raises(CheckpointError, match="no regular expression"):
        selects("(", NAME, Patterns())

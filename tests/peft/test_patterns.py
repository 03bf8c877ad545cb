"""Patterns over names of modules: what `re` finds, in bounded time."""

from __future__ import annotations

import random
import re
import time

import pytest

from pyrolora.errors import CheckpointError
from pyrolora.peft.patterns import Patterns

NAMES = ["encoder.layer.0.attention.self.query", "model.layers.11.mlp.up_proj", "vision.q", "", "q"]
PATTERNS = [
    r".*\.(q_proj|query)$",
    r"^(?!.*vision).*(query|up_proj|q)",
    r"[a-z.]+\d+.*",
    r"[^.]+\.(?:layer|layers)\.\d+\..+",
    r"encoder\.layer\.[01]\..*?(query|dense)",
    r"(encoder|model)\.(layer|layers)\.(0|1|11)\.\S+",
    r"q|vision\.q",
    r"vision.q",
    r"(\w+\.){2,5}\w{1,6}",
    r"(?=enc)\w+\..*",
    r".*\bquery\b",
    r".*\B(uery|roj)",
    r"\b.*\b",
    r".*(?<!mlp\.)(query|up_proj|q)",
    r".*(?<=self\.)\w+",
    r"(?<!a)q",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_known_patterns(pattern: str) -> None:
    found = [Patterns().match(pattern, name) for name in NAMES]
    assert found == [re.fullmatch(pattern, name) is not None for name in NAMES]


def test_random_patterns_match_what_re_matches() -> None:
    rng = random.Random(0)
    atoms = ["a", "b", ".", "[ab]", "[^a]", r"\w", r"\.", "(a|b)", "(ab|a)", "(?:b)"]
    for _ in range(2000):
        parts = [
            rng.choice(atoms) + rng.choice(["", "", "*", "+", "?", "{2}", "{1,3}", "*?"])
            for _ in range(rng.randint(1, 4))
        ]
        pattern = (
            rng.choice(["", "^", "(?!b)", "(?=a)", r"\b", r"(?<!a)\B"])
            + "".join(parts)
            + rng.choice(["", "$", r"\b", "(?<=a)", "(?<!b.)"])
        )
        name = "".join(rng.choice("ab.") for _ in range(rng.randint(0, 7)))
        expected = re.fullmatch(pattern, name) is not None
        assert Patterns().match(pattern, name) is expected, (pattern, name)


def test_places_where_a_match_begins_and_ends() -> None:
    assert Patterns().match("self", "x.self.q", starts=[0, 2, 7], ends=[1, 6, 8])
    assert not Patterns().match("^self", "x.self.q", starts=[0, 2, 7], ends=[1, 6, 8])
    assert Patterns().match("(se)+lf", "x.self.q", starts=[2], ends=[6])


@pytest.mark.parametrize(
    "pattern",
    [
        "(.*)*x",
        "(a|a)*b",
        "(a|a)" * 60 + "b",
        "(.*.*.*.*.*.*.*.*.*.*)x",
        "(((a{1000}){1000}){1000})x",
        "(?:a?){60}a{60}b",
        "(" * 50 + ".*" + ")*" * 50 + "x",
    ],
)
def test_no_pattern_runs_for_ever(pattern: str) -> None:
    began = time.monotonic()
    assert not Patterns().match(pattern, "a" * 60)
    assert time.monotonic() - began < 5


def test_steps_are_counted() -> None:
    patterns = Patterns(steps=30)
    assert not patterns.match("(.*)*x", "a")
    with pytest.raises(CheckpointError, match="too long"):
        patterns.match("(.*)*x", "a" * 60)


@pytest.mark.parametrize(
    "pattern", ["(", "*", r"(a)\1", "(?i)a", "(?<=a+)b", "a" * 200_000, "(" * 5000 + ")" * 5000]
)
def test_what_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError):
        Patterns().match(pattern + "x*", "a")

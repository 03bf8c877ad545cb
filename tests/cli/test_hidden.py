"""A run's record keeps no secret, and the command that made it still matches."""

from __future__ import annotations

from typing import Any

import pytest

from pyrolora.cli.hidden import HIDDEN, hidden, hidden_arguments


@pytest.mark.parametrize(
    "name",
    [
        *(
            "hub_token",
            "push_to_hub_token",
            "token",
            "password",
            "api_key",
            "aws_secret_access_key",
        ),
        *("HF_TOKEN", "db.password", "client_secret", "access_key", "credentials"),
    ],
)
def test_a_secret_by_its_name(name: str) -> None:
    assert hidden({name: "abc", "more": [{name: "abc"}]}) == {
        name: HIDDEN,
        "more": [{name: HIDDEN}],
    }
    assert hidden({name: None}) == {name: None}


@pytest.mark.parametrize(
    "options",
    [
        {"include_tokens_per_second": True, "include_num_input_tokens_seen": "all"},
        {"rank_pattern": {"key": 3}, "target_modules": ["query", "key", "token_embedding"]},
        {"max_new_tokens": 3, "tokenizer": "x", "data": "https://host/a.csv?key2=1", "seed": 1},
    ],
)
def test_what_is_none(options: dict[str, Any]) -> None:
    assert hidden(options) == options


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://me:pw@host/data.csv", f"https://{HIDDEN}@host/data.csv"),
        ("https://host/data.csv?token=abc&x=1", f"https://host/data.csv?token={HIDDEN}&x=1"),
        ("hf_abcdefghijklmnopqrst", HIDDEN),
        ("HF_TOKEN=abc", f"HF_TOKEN={HIDDEN}"),
    ],
)
def test_a_secret_in_a_text(text: str, kept: str) -> None:
    assert hidden(text) == kept


def test_the_words_of_a_command() -> None:
    words = [
        *(
            "fit",
            "a.csv",
            "--set",
            "training.hub_token=abc",
            "--set=training.push_to_hub_token=abc",
        ),
        *("--set", 'training.hub={"api_key": "abc", "r": 1}', "--password", "abc", "--seed", "1"),
        *("--set", "guide.kl_weight=0.1", "--model", "https://me:abc@host/m"),
    ]
    kept = hidden_arguments(words)
    assert not any("abc" in word for word in kept)
    assert kept[:3] == words[:3]
    assert kept[-6:-1] == ["--seed", "1", "--set", "guide.kl_weight=0.1", "--model"]

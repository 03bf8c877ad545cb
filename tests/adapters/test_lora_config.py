"""What a ``peft.LoraConfig`` asks for is done, or refused with the reason."""

from __future__ import annotations

from typing import Any

import peft
import pytest

from pyrolora.adapters import as_adapter_config
from pyrolora.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"bias": "all"},
            r"bias='all'\): biases stay as they are; .*modules_to_save; leave it out",
        ),
        ({"trainable_token_indices": [1]}, r"\[1\]\): rows of .*; leave it out"),
        ({"use_dora": True}, r"use_dora=True\): the posterior is one of W"),
        ({"lora_bias": True}, r"lora_bias=True\): the update is s B A x alone"),
        ({"layer_replication": [(0, 1)]}, r"layer_replication=\[\(0, 1\)\]\); leave it out"),
    ],
)
def test_what_is_not_plain_lora_is_refused_with_the_reason(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        as_adapter_config(peft.LoraConfig(target_modules=["query"], **options))


def test_the_blocks_of_a_lora_config_are_taken() -> None:
    given = peft.LoraConfig(
        target_modules=["query"], layers_to_transform=3, layers_pattern="encoder.layer"
    )
    found = as_adapter_config(given)
    assert (found.layers_to_transform, found.layers_pattern) == ([3], "encoder.layer")


def test_the_parameters_of_a_lora_config_are_taken() -> None:
    given = peft.LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj"])
    found = as_adapter_config(given)
    assert (found.target_modules, found.target_parameters) == ([], ["experts.gate_up_proj"])

"""What stands beside the tokens of a prompt reaches the network, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import Rows, llama, tokens
from transformers import LlavaConfig, LlavaForConditionalGeneration

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.errors import DataError

IMAGE, PLACES = 15, 4  # the token of an image, and how many stand for one
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def images(n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    text = torch.randint(4, 14, (n, 3), generator=generator)
    ids = torch.cat([torch.full((n, PLACES), IMAGE), text], 1)
    pixels = torch.randn(n, 3, 8, 8, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", **SIZES, "image_size": 8, "patch_size": 4}
    text = {"model_type": "llama", **SIZES, "num_key_value_heads": 1, "vocab_size": 16}
    config = LlavaConfig(
        vision_config={**vision, "projection_dim": 16},
        text_config={**text, "initializer_range": 0.4, "pad_token_id": 0},
        image_token_id=IMAGE, image_seq_length=PLACES, vision_feature_layer=-1,
    )  # fmt: skip
    network = LlavaForConditionalGeneration(config).eval()
    network.generation_config.eos_token_id = None
    network.generation_config.pad_token_id = 0
    data = images(6)
    rows = [{name: part[i] for name, part in data.items()} for i in range(6)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    for row in rows:
        row["labels"] = row["labels"].masked_fill(row["labels"] == IMAGE, -100)
    return pyrolora.fit(
        network, Rows(rows), "meanfield", epochs=1, task="text-generation", seed=0,
        adapter=AdapterConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip


@pytest.mark.parametrize("several", [1, 2])
def test_texts_are_written_with_their_images(posterior: Posterior, several: int) -> None:
    inputs = images(3)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE]}
    if several > 1:
        options |= {"num_beams": 2, "num_return_sequences": 2}
    found = posterior.generate(inputs, 0, **options)
    merged = posterior.merge()
    expected = merged.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert found.sequences.flatten(0, 1).tolist() == expected.tolist()
    blind = merged.generate(**{n: t for n, t in inputs.items() if n != "pixel_values"}, **options)[
        :, inputs["input_ids"].shape[1] :
    ]
    assert blind.tolist() != expected.tolist()
    with torch.no_grad():
        whole = torch.cat([inputs["input_ids"].repeat_interleave(several, 0), expected], 1)
        pixels = inputs["pixel_values"].repeat_interleave(several, 0)
        logits = merged(input_ids=whole, pixel_values=pixels).logits[:, -6:-1].log_softmax(-1)
    score = logits.gather(-1, expected[..., None]).sum((1, 2))
    torch.testing.assert_close(found.log_likelihood[0].flatten(), score, atol=1e-4, rtol=1e-4)


def test_draws_share_a_pass_and_keep_their_images(posterior: Posterior) -> None:
    inputs = images(2)
    together = posterior.generate(inputs, 3, seed=1, max_new_tokens=4, suppress_tokens=[IMAGE])
    for i in range(2):
        one = {name: part[i : i + 1] for name, part in inputs.items()}
        alone = posterior.generate(one, 3, seed=1, max_new_tokens=4, suppress_tokens=[IMAGE])
        assert alone.sequences[0].tolist() == together.sequences[i].tolist()


def test_what_does_not_reach_the_network_is_refused_by_name(posterior: Posterior) -> None:
    inputs = images(2)
    for name, value in (
        ("inputs_embeds", torch.zeros(2, 7, 16)),
        ("position_ids", torch.arange(7).expand(2, -1)),
        ("token_type_ids", torch.zeros(2, 7)),
        ("caption", ["a", "b"]),
    ):
        with pytest.raises(DataError, match=f"does not pass .*{name}"):
            posterior.generate({**inputs, name: value}, 0, max_new_tokens=2)
    pixels = inputs["pixel_values"][:1]
    with pytest.raises(DataError, match=r"'pixel_values' has 1 rows for 2 prompts"):
        posterior.generate({**inputs, "pixel_values": pixels}, 0, max_new_tokens=2)
    text = pyrolora.fit(
        llama(), tokens(4).remove_columns("labels"), "map", epochs=1, adapter=AdapterConfig(r=1)
    )
    with pytest.raises(DataError, match=r"does not pass \['pixel_values'\]"):
        text.generate({"input_ids": [[4, 5]], "pixel_values": inputs["pixel_values"][:1]}, 0)


def test_padding_of_prompts_that_nothing_marks_is_read_as_in_a_fit() -> None:
    network = llama()  # its padding is 0, and it has a meaning of its own if that ends texts, too
    posterior = pyrolora.fit(network, tokens(8).remove_columns("labels"), "map", epochs=1)
    network.config.pad_token_id = 0
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    plain = posterior.generate(torch.tensor([[4, 5, 6]]), num_samples=0, **options)
    found = posterior.generate(torch.tensor([[4, 5, 6, 0, 0]]), num_samples=0, **options)
    assert found.sequences.equal(plain.sequences)
    network.config.eos_token_id = 0
    with pytest.raises(DataError, match="2 times the token 0, and has no attention_mask"):
        posterior.generate(torch.tensor([[4, 5, 6, 0, 0]]), num_samples=0, **options)

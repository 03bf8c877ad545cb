"""A tiny network that reads pictures and writes text, with its processor."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = ["[PAD]", "[UNK]", "<s>", "</s>", "user", "assistant", ":", "what", "colour", "is", "this"]
COLOURS = {"red": (250, 0, 0), "blue": (0, 0, 250), "green": (0, 250, 0)}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }} {% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
DECODER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "vocab_size": 16,
}
PLACE = 14
"""The number of the token <image>."""
TILES = 5
"""Tokens of a picture: four patches and one for the whole."""


def processor() -> LlavaProcessor:
    words = [*WORDS, *COLOURS]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    words_alone = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="<s>",
        eos_token="</s>",
    )
    words_alone.add_tokens([AddedToken("<image>", special=True)])
    assert words_alone.convert_tokens_to_ids("<image>") == PLACE
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    return LlavaProcessor(
        CLIPImageProcessorPil(**size),
        words_alone,
        patch_size=4,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={
            **sizes,
            "model_type": "clip_vision_model",
            "num_hidden_layers": 1,
            "image_size": 8,
            "patch_size": 4,
        },
        text_config={**DECODER, "model_type": "llama"},
        image_token_id=PLACE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=TILES,
    )
    return LlavaForConditionalGeneration(config).eval()

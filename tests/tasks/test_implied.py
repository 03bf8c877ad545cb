"""The table of checkpoints and data: one task for each pair, or a question with every call."""

from __future__ import annotations

import re
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig, PretrainedConfig

import pyrolora.tasks
from pyrolora.data.examples import as_examples
from pyrolora.errors import ConfigError, PyroLoraError
from pyrolora.tasks.checkpoint import Checkpoint
from pyrolora.tasks.heads import main_input
from pyrolora.tasks.implied import implied

# Data -------------------------------------------------------------------------------------------

TEXT = {"text": ["good", "bad", "dull"]}
PIXELS = [[[0.0] * 4] * 4] * 3
PICTURE = Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8))
SOUND = {"array": [0.0] * 8, "sampling_rate": 16_000}
LAYOUTS: dict[str, Any] = {
    "text": TEXT,
    "class": {**TEXT, "label": [0, 1, 2]},
    "name": {**TEXT, "label": ["a", "b", "c"]},
    "number": {**TEXT, "label": [0.5, 1.5, 2.0]},
    "classes": {**TEXT, "labels": [["a"], ["a", "b"], []]},
    "multi-hot": {**TEXT, "labels": [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]},
    "tags": {"tokens": [["a", "b"], ["c"], ["d"]], "ner_tags": [[0, 1], [1], [0]]},
    "token labels": {"input_ids": [[4, 5, 6]] * 3, "labels": [[-100, 5, 6]] * 3},
    "choices": {"question": TEXT["text"], "choices": [["a", "b"]] * 3, "label": [0, 1, 0]},
    "spans": {
        "question": TEXT["text"],
        "context": ["it is good"] * 3,
        "answers": [{"text": ["good"], "answer_start": [6]}] * 3,
    },
    "pair": {"document": TEXT["text"], "summary": ["a", "b", "c"]},
    "completion": {"prompt": TEXT["text"], "completion": ["a", "b", "c"]},
    "chat": {"messages": [[{"role": "user", "content": "a"}]] * 3},
    "preference": {"chosen": TEXT["text"], "rejected": ["a", "b", "c"]},
    "pixels": {"pixel_values": [PIXELS] * 3, "labels": [0, 1, 1]},
    "pictures": {"image": [PICTURE] * 3, "label": [0, 1, 1]},
    "pictures with chats": {
        "image": [PICTURE] * 3,
        "messages": [[{"role": "user", "content": "a"}]] * 3,
    },
    "sounds": {"audio": [SOUND] * 3, "label": [0, 1, 1]},
}

# Checkpoints ------------------------------------------------------------------------------------

ENCODER = {
    "text": "",
    "class": "classification",
    "name": "classification",
    "number": "regression",
    "classes": "multi-label-classification",
    "multi-hot": "multi-label-classification",
    "tags": "token-classification",
    "token labels": "token-classification",
    "choices": "multiple-choice",
    "spans": "question-answering",
    "pair": "",
    "completion": "",
    "chat": "",
    "preference": "reward-modelling",
    "pixels": "classification",
    "pictures": "classification",
    "pictures with chats": "",
    "sounds": "classification",
}
MASKED = {
    **ENCODER,
    **dict.fromkeys(
        ("text", "pair", "completion", "chat", "pictures with chats"), "fill-mask"
    ),  # which reads one text
    "token labels": "fill-mask | token-classification",
}
LETTERS = "letter-choice | text-choice | text-choice-per-token"
DECODER = {
    **ENCODER,
    "text": "text-generation",
    "class": "classification | text-generation",
    "name": "classification | text-generation",
    "number": "regression | text-generation",
    "classes": "multi-label-classification | text-generation",
    "multi-hot": "multi-label-classification | text-generation",
    "token labels": "text-generation",
    **dict.fromkeys(("pixels", "pictures", "sounds"), "classification | text-generation"),
    "pictures with chats": "text-generation",
    "choices": LETTERS,
    "spans": "question-answering | text-generation",
    "pair": "text-generation",
    "completion": "text-generation",
    "chat": "text-generation",
}
WRITER = {
    **ENCODER,
    **dict.fromkeys(
        ("text", "token labels", "pair", "completion", "chat", "pictures with chats"),
        "text2text-generation",
    ),
    "name": "classification | text2text-generation",
}
BASE_OF_WRITER = {
    **ENCODER,
    **dict.fromkeys(
        ("text", "pair", "completion", "chat", "pictures with chats"), "text2text-generation"
    ),
}
TABLE = {
    **dict.fromkeys(("bert:BertModel", "llama:LlamaModel", "t5:T5EncoderModel"), ENCODER),
    **dict.fromkeys(("bert:BertForSequenceClassification", "t5:T5ForTokenClassification"), ENCODER),
    **dict.fromkeys(("vit:ViTModel", "vit:ViTForImageClassification", "bert:"), ENCODER),
    **dict.fromkeys(("clip:CLIPModel", "wav2vec2:Wav2Vec2Model"), ENCODER),
    "llava:LlavaForConditionalGeneration": {**DECODER, "choices": "multiple-choice"},
    **dict.fromkeys(("bert:BertForMaskedLM", "roberta:RobertaForMaskedLM"), MASKED),
    **dict.fromkeys(("llama:LlamaForCausalLM", "gpt2:GPT2LMHeadModel"), DECODER),
    **dict.fromkeys(("t5:T5ForConditionalGeneration", "bart:BartForConditionalGeneration"), WRITER),
    **dict.fromkeys(("t5:T5Model", "bart:BartModel"), BASE_OF_WRITER),
}


def config_of(name: str) -> PretrainedConfig:
    kind, _, architecture = name.partition(":")
    config = AutoConfig.for_model(kind)
    config.architectures = [architecture] if architecture else None
    return config


@pytest.mark.parametrize("checkpoint", TABLE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_and_data_are_one_task_or_a_question(checkpoint: str, layout: str) -> None:
    data = datasets.Dataset.from_dict(LAYOUTS[layout])
    config = config_of(checkpoint)
    examples = as_examples(data, main_input(config), ("train",))
    read = Checkpoint("folder", config, examples)
    expected = [name for name in TABLE[checkpoint][layout].split(" | ") if name]
    if len(expected) == 1:
        assert implied(read).name == expected[0]
        return
    with pytest.raises(PyroLoraError) as raised:
        implied(read)
    calls = [pyrolora.tasks.registry.find(name).call() for name in expected]
    message = str(raised.value)
    assert sorted(re.findall(r"fit\(\.\.\., (.*?)\) for", message)) == sorted(calls)
    assert all(name in message for name in data.column_names), message
    if calls:
        assert isinstance(raised.value, ConfigError)

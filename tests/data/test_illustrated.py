"""Texts with pictures: tokens, labels and pixels as the processor makes them, and texts written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from llavas import COLOURS, DECODER, PLACE, WORDS, llava, processor
from peft_trainer import Start, lora_layers
from PIL import Image
from problems import Rows, arguments
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LlavaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Trainer,
)

import pyrolora
from pyrolora import AdapterConfig, TextOptions
from pyrolora.data import prepare
from pyrolora.errors import DataError
from pyrolora.posterior import Posterior
from pyrolora.tasks import task_for


def picture(colour: str, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 5, (10, 12, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).astype(np.uint8))


def said(role: str, text: str, *more: Any) -> dict[str, Any]:
    return {"role": role, "content": [*more, {"type": "text", "text": text}] if more else text}


def chats(n: int = 6) -> list[dict[str, Any]]:
    """Pictures beside chats of several lengths."""
    names = [[*COLOURS][i % 3] for i in range(n)]
    asked = ["what colour", "what colour is this"]
    return [
        {
            "images": [picture(name, i)],
            "messages": [said("user", asked[i % 2]), said("assistant", name)],
        }
        for i, name in enumerate(names)
    ]


def inside(row: dict[str, Any]) -> dict[str, Any]:
    """The chat with its picture in its first message."""
    first, *rest = row["messages"]
    part = {"type": "image", "image": row["images"][0]}
    return {"messages": [said("user", first["content"], part), *rest]}


def batch_of(data: Any, network: Any, **options: Any) -> dict[str, Tensor]:
    made = prepare(data, network, task_for(network), processor(), **options)
    return made.collate([made.examples[i] for i in range(len(made))])


def own(data: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The processor's own batch of whole chats, with the tokens of pictures masked by hand."""
    made = processor().apply_chat_template(
        [inside(row)["messages"] for row in map(structured, data)],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right", "add_special_tokens": False},
    )
    hidden = (made["attention_mask"] == 0) | (made["input_ids"] == PLACE)
    return {**made, "labels": made["input_ids"].masked_fill(hidden, -100)}


def structured(row: dict[str, Any]) -> dict[str, Any]:
    first, answer = row["messages"]
    part = {"type": "text", "text": answer["content"]}
    return {**row, "messages": [first, {"role": "assistant", "content": [part]}]}


def pixels(batch: dict[str, Tensor]) -> Tensor:
    assert batch["pixel_values_pieces"].eq(1).all()
    return batch["pixel_values"].flatten(0, 1)


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_a_batch_of_chats_is_the_processors_own(place: str) -> None:
    data = chats()
    batch = batch_of(data if place == "beside" else [inside(row) for row in data], llava())
    expected = own(data)
    assert torch.equal(pixels(batch), expected["pixel_values"])
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[name], expected[name]), name


ARRAYS: dict[str, Any] = {
    "a list": lambda array, _: [array],
    "alone": lambda array, _: array,
    "channels first": lambda array, _: [array.transpose(2, 0, 1)],
    "a tensor": lambda array, _: [torch.tensor(array)],
    "real numbers": lambda array, _: [array.astype(float)],
    "a path": lambda _, path: [path],
    "a path alone": lambda _, path: path,
}


@pytest.mark.parametrize("form", ARRAYS)
def test_pictures_may_be_arrays_and_files(form: str, tmp_path: Path) -> None:
    data = chats(2)
    for i, row in enumerate(data):
        row["images"][0].save(tmp_path / f"{i}.png")
        array = np.asarray(row["images"][0])
        row["images"] = ARRAYS[form](array, tmp_path / f"{i}.png")
    assert torch.equal(pixels(batch_of(data, llava())), own(chats(2))["pixel_values"])


def pairs(kind: str) -> list[dict[str, Any]]:
    made = []
    for row in chats():
        question, answer = row["messages"]
        columns = {
            "messages": {"prompt": [question], "completion": [answer]},
            "texts": {
                "prompt": f"<image> {question['content']}",
                "completion": f" {answer['content']}",
            },
            "question": {"question": question["content"], "answer": answer["content"]},
        }[kind]
        made.append({"image": row["images"][0], **columns})
    return made


@pytest.mark.parametrize("kind", ["messages", "texts", "question"])
def test_of_prompts_and_completions_these_are_learnt(kind: str) -> None:
    batch = batch_of(pairs(kind), llava())
    learnt = [row[row != -100].tolist() for row in batch["labels"]]
    ids = dict(zip(COLOURS, range(len(WORDS), len(WORDS) + 3), strict=True))
    assert learnt == [[ids[[*COLOURS][i % 3]], 3] for i in range(6)]
    assert torch.equal(pixels(batch), own(chats())["pixel_values"])


def test_map_equals_peft_and_the_trainer(tmp_path: Path) -> None:
    """On examples with as many labels each: the Trainer's loss is a mean over tokens."""
    data = chats()[::2]
    start = Start()
    args = arguments(tmp_path, per_device_train_batch_size=3, max_steps=4)
    posterior = pyrolora.fit(
        llava(),
        data,
        "map",
        tokenizer=processor(),
        adapter=AdapterConfig(r=2, lora_alpha=4),
        training=args,
        callbacks=start,
    )
    assert all("language_model" in name for name in start.factors)
    options = {"r": 2, "lora_alpha": 4, "target_modules": list(start.factors)}
    model = peft.get_peft_model(llava(), peft.LoraConfig(**options))
    layers = lora_layers(model, start.factors)
    batch = own(data)
    rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(3)]
    Trainer(model=model, args=args, train_dataset=Rows(rows)).train()  # type: ignore[arg-type]
    for name, (A, B) in posterior.bank.matrices(posterior.bank.means()).items():
        torch.testing.assert_close(A, layers[name].lora_A["default"].weight, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(B, layers[name].lora_B["default"].weight, rtol=1e-3, atol=1e-5)


# A fit -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Posterior:
    folder = tmp_path_factory.mktemp("llava")
    llava().save_pretrained(folder)
    processor().save_pretrained(folder)
    args = arguments(tmp_path_factory.mktemp("fit"), max_steps=3, learning_rate=3e-2)
    posterior = pyrolora.fit(folder, chats(), "montec", training=args)
    assert isinstance(posterior.tokenizer, LlavaProcessor)
    return posterior


def log_likelihood(network: Any, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["labels"][:, 1:]
    inputs = {name: t for name, t in batch.items() if name != "labels"}
    logits = network(**inputs).logits[:, :-1].transpose(1, 2)
    return -cross_entropy(logits, labels, ignore_index=-100, reduction="none").sum(1)


@torch.no_grad()
def test_draws_are_networks_with_their_weights(fitted: Posterior, tmp_path: Path) -> None:
    found = fitted.predict(chats(), draws=[0, 1]).log_likelihood
    assert found is not None
    for draw, values in enumerate(found):
        fitted.to_peft(tmp_path / str(draw), draw=draw)
        adapted = peft.PeftModel.from_pretrained(llava(), tmp_path / str(draw))
        torch.testing.assert_close(values, log_likelihood(adapted, own(chats())))


def test_a_text_is_scored_the_same_alone_and_with_others(fitted: Posterior) -> None:
    several = {**chats(1)[0], "images": [picture("red"), picture("blue")]}
    none = {"images": [], "messages": [said("user", "what is this"), said("assistant", "red")]}
    data = [*chats(2), several, none]
    together = fitted.predict(data, draws=[0, 1, 2]).log_likelihood
    alone = [fitted.predict([row], draws=[0, 1, 2]).log_likelihood for row in data]
    torch.testing.assert_close(together, torch.cat(alone, 1))  # type: ignore[arg-type]


def test_texts_are_written_by_the_pictures(fitted: Posterior) -> None:
    options = {"max_new_tokens": 3, "do_sample": False, "min_new_tokens": 3}
    rows = [{**row, "messages": row["messages"][:1]} for row in chats(4)]
    asked = [inside(row)["messages"] for row in rows]
    inputs = processor().apply_chat_template(
        asked,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, "padding_side": "left", "add_special_tokens": False},
    )
    size = inputs["input_ids"].shape[1]
    true = fitted.merge().generate(**inputs, **options)[:, size:]
    for form in (rows, asked, dict(inputs)):
        written = fitted.generate(form, 0, **options)
        assert torch.equal(written.sequences[:, 0], true)
    draws = fitted.generate(rows, 2, **options)
    assert draws.sequences.shape == (4, 2, 3)
    others = [{**row, "images": [picture("green", 9)]} for row in rows]
    unlike = fitted.generate(others, 0, **options)
    assert not torch.allclose(unlike.log_likelihood[0], draws.log_likelihood[0])


def test_a_loaded_posterior_reads_and_writes(fitted: Posterior, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    loaded = pyrolora.load(tmp_path)
    found = loaded.predict(chats(), draws=[1]).log_likelihood
    assert torch.equal(found, fitted.predict(chats(), draws=[1]).log_likelihood)  # type: ignore[arg-type]
    rows = [{"image": picture("red"), "text": "<image> what"}]
    assert (
        loaded.generate(rows, 0, max_new_tokens=2, do_sample=False).texts
        == fitted.generate(rows, 0, max_new_tokens=2, do_sample=False).texts
    )


RED = picture("red")
WRONG: dict[str, tuple[Any, str]] = {
    "no place": ({"image": RED, "text": "what"}, "example 0: it has 1 pictures, .* places for 0"),
    "two places": ({"image": RED, "text": "<image> <image>"}, "places for 2 pictures"),
    "up to one": (
        inside({**chats(1)[0], "images": [np.asarray(RED) / 255.0]}),
        "the processor divides by 255",
    ),
    "several or one": (
        {"image": np.zeros((3, 9, 9), np.uint8), "text": "<image>"},
        r"\(3, 9, 9\) may be one picture with its channels first, or 3 grey ones",
    ),
    "both": (
        {**inside(chats(1)[0]), "images": [RED]},
        "in its messages and in the column 'images'",
    ),
    "an address": (
        {
            "messages": [
                said("user", "what", {"type": "image", "url": "http://a"}),
                said("assistant", "red"),
            ]
        },
        "names the address of a picture",
    ),
    "missing": ({"image": None, "text": "what"}, "its 'image' is missing"),
    "two columns": ({"image": RED, "mask": RED, "text": "<image>"}, "which of the columns"),
}


@pytest.mark.parametrize("case", WRONG)
def test_pictures_without_a_place(case: str) -> None:
    row, words = WRONG[case]
    with pytest.raises(DataError, match=words):
        batch_of([row], llava())


def test_pictures_that_nobody_reads_are_no_silence(fitted: Posterior) -> None:
    with pytest.raises(DataError, match=r"tokenizer=AutoProcessor\.from_pretrained"):
        prepare(chats(), llava(), task_for(llava()), processor().tokenizer)
    row = {"image": picture("red"), "question": "what", "choices": ["red", "blue"]}
    with pytest.raises(DataError, match="this task reads texts alone"):
        fitted.predict([row])
    with pytest.raises(DataError, match="a place for a picture, '<image>', and no picture"):
        fitted.generate(["<image> what"], 0)


def test_a_picture_is_not_cut() -> None:
    with pytest.raises(DataError, match="those of its pictures included"):
        pyrolora.fit(
            llava(), chats(), "map", tokenizer=processor(), texts=TextOptions(max_length=6)
        )


# Patches of pictures of several sizes ------------------------------------------------------------


def qwen() -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 8, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config={**DECODER, "vocab_size": 40, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 4, "spatial_merge_size": 2},
        image_token_id=39,
        video_token_id=38,
        vision_start_token_id=37,
        vision_end_token_id=36,
    )
    made = Qwen2VLForConditionalGeneration(config).eval()
    made.generation_config.eos_token_id = None
    return made


def tokenised() -> list[dict[str, Any]]:
    """Tokens with one or two pictures of several sizes, as a processor makes them."""
    rows = []
    for sizes in ([(4, 4)], [(2, 4)], [(4, 4), (2, 2)], [(2, 2)]):
        ids = [5]
        for height, width in sizes:
            ids += [37, *[39] * (height * width // 4), 36]
        ids += torch.randint(6, 30, (len(ids) % 3 + 3,)).tolist()
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "mm_token_type_ids": [int(i == 39) for i in ids],
                "pixel_values": torch.randn(sum(h * w for h, w in sizes), 96),
                "image_grid_thw": torch.tensor([(1, h, w) for h, w in sizes]),
                "labels": [-100 if i >= 36 else i for i in ids],
            }
        )
    return rows


def test_patches_of_several_pictures_per_row(tmp_path: Path) -> None:
    rows = tokenised()
    args = arguments(tmp_path, max_steps=2, learning_rate=3e-2)
    words = processor().tokenizer
    posterior = pyrolora.fit(qwen(), Rows(rows), "montec", tokenizer=words, training=args)
    together = posterior.predict(Rows(rows), draws=[0, 1]).log_likelihood
    alone = [posterior.predict(Rows([r]), draws=[0, 1]).log_likelihood for r in rows]
    torch.testing.assert_close(together, torch.cat(alone, 1))  # type: ignore[arg-type]
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    inputs = {
        name: pad_sequence([torch.tensor(r[name]) for r in rows], True, 0, padding_side="left")
        for name in per_token
    }
    inputs |= {n: torch.cat([r[n] for r in rows]) for n in ("pixel_values", "image_grid_thw")}
    options = {"max_new_tokens": 3, "do_sample": False}
    true = posterior.merge().generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(posterior.generate(inputs, 0, **options).sequences[:, 0], true)
    with pytest.raises(DataError, match="cannot be told which rows are whose; generate for one"):
        posterior.generate({**inputs, "pixel_values": inputs["pixel_values"][1:]}, 0, **options)

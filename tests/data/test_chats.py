"""Chats, prompts and completions: their tokens and labels are those of TRL's trainer."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import trl
from problems import Rows, chat_tokenizer, llama
from tokenizers import processors
from trl import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from pyrolora import TextOptions
from pyrolora.data import prepare
from pyrolora.errors import ConfigError, DataError
from pyrolora.tasks import CausalLM

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHAT = [
    {"role": "user", "content": "Hi you"},
    {"role": "assistant", "content": "Hello me"},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "Yes."},
]
TURN = {"prompt": CHAT[:3], "completion": CHAT[3:]}
PLAIN = ["gemma", "llama3", "lfm2", "phi3", "qwen2_5_vl", "qwen3_instruct_2507"]
"""Templates without ``{% generation %}``, whose turns begin where TRL's variants for training mark
them."""
MARKED = ["gemma3", "gptoss", "llama3", "phi3_5", "qwen2_5", "qwen3"]
NETWORK = llama(vocab_size=320, max_position_embeddings=2048)
THOUGHTS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def told(name: str) -> Any:
    """The tokenizer of a template, with its marks as special tokens."""
    found = {*re.findall(r"<[|]?[A-Za-z_]+[|]?>", template(name))}
    return chat_tokenizer(template(name), sorted(found - {*THOUGHTS}))


def by_trl(
    rows: list[dict[str, Any]],
    tokenizer: Any,
    chat_template: str | None = None,
    *,
    completion_only_loss: bool = True,
    packing: bool = False,
    **options: Any,
) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels as TRL's trainer prepares them."""
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=chat_template, completion_only_loss=completion_only_loss
    )
    usual = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    args = {**usual, **options}
    data = datasets.Dataset.from_list(rows)
    made: Any = SFTTrainer._prepare_dataset(
        trainer, data, tokenizer, SimpleNamespace(**args), packing, None, "train"
    )
    return list(zip(made["input_ids"], made["labels"], strict=True))


def prepared(rows: Any, tokenizer: Any, **options: Any) -> Any:
    task = CausalLM()
    task.texts = TextOptions(**options) if options else None
    return prepare(rows, NETWORK, task, tokenizer, to_pack=True)


def by_us(rows: Any, tokenizer: Any, **options: Any) -> list[tuple[list[int], list[int]]]:
    data = prepared(rows, tokenizer, **options)
    batches = (data.collate([data.examples[i]]) for i in range(len(data)))
    return [(b["input_ids"][0].tolist(), b["labels"][0].tolist()) for b in batches]


def learnt(rows: Any, tokenizer: Any, **options: Any) -> list[str]:
    """The texts that are learnt."""
    made = by_us(rows, tokenizer, **options)
    return [tokenizer.decode([t for t in labels if t != -100]) for _, labels in made]


# Against TRL ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PLAIN, *(f"{name}_training" for name in MARKED)])
def test_chats_are_those_of_trl(name: str) -> None:
    tokenizer = told(name)
    for rows in ([{"messages": CHAT}], [TURN]):
        assert by_us(rows, tokenizer) == by_trl(rows, tokenizer)
    loose = {"completion_only_loss": False}
    assert by_us([TURN], tokenizer, **loose) == by_trl([TURN], tokenizer, **loose)


@pytest.mark.parametrize("name", [*PLAIN, *(f"{name}_training" for name in MARKED)])
def test_what_the_assistant_says_is_that_of_trl_in_all_turns(name: str) -> None:
    tokenizer, marked = told(name), None
    if name in PLAIN:
        marked = template(f"{name}_training")
    for rows in ([{"messages": CHAT}], [TURN]):
        ours = by_us(rows, tokenizer, assistant_only_loss=True)
        assert ours == by_trl(rows, tokenizer, marked, assistant_only_loss=True)


def test_turns_of_a_template_that_writes_earlier_ones_differently() -> None:
    """Qwen3 writes the thoughts of the last turn alone."""
    said = learnt([{"messages": CHAT}], told("qwen3"), assistant_only_loss=True)
    assert said == ["Hello me<|im_end|>\n<think>\n\n</think>\n\nYes.<|im_end|>\n"]


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "one two"}, {"text": "three</s>"}],
        [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "", "completion": "5</s>"}],
        [{"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}],
        [{"messages": CHAT, "chat_template_kwargs": {"add_generation_prompt": True}}],
    ],
    ids=lambda rows: "+".join(rows[0]),
)
@pytest.mark.parametrize("limit", [1024, 4])
@pytest.mark.filterwarnings("ignore:.* have .* 4 tokens")
def test_texts_and_cuts_are_those_of_trl(rows: Any, limit: int) -> None:
    tokenizer = chat_tokenizer()
    made = by_us(rows, tokenizer, max_length=limit)
    kept = [(ids, labels) for ids, labels in made if {*labels} != {-100}]  # the rest TRL leaves out
    assert kept == by_trl([dict(row) for row in rows], tokenizer, max_length=limit)


def test_tools_reach_the_template() -> None:
    tool = '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'
    rows = [{"messages": CHAT, "tools": tool}, {"messages": CHAT, "tools": None}]
    tokenizer = told("qwen2_5")
    ours = by_us(rows, tokenizer)
    assert ours == by_trl(rows, tokenizer)
    assert ['"add"' in tokenizer.decode(ids) for ids, _ in ours] == [True, False]


def test_packed_rows_have_the_texts_of_trl() -> None:
    rows = [{"text": "x" * size} for size in (9, 3, 7, 2, 5, 1, 4)]
    ours = by_us(rows, chat_tokenizer(), packing=True, max_length=12)
    theirs = by_trl(rows, chat_tokenizer(), packing=True, max_length=12)
    assert sorted(len(ids) for ids, _ in ours) == sorted(len(ids) for ids, _ in theirs)
    data = prepared(rows, chat_tokenizer(), packing=True, max_length=12)
    assert (len(data), data.num_examples) == (len(theirs), 7)
    for row in data.examples:
        starts = [i for i, place in enumerate(row["position_ids"]) if place == 0]
        assert [i for i, label in enumerate(row["labels"]) if label == -100] == starts


# Forms ----------------------------------------------------------------------------------------


def test_two_sides_of_a_talk_are_a_chat_or_joined() -> None:
    rows: list[tuple[dict[str, str], str, str]] = [
        ({"question": "2+2?", "answer": "4"}, "2+2?", "4"),
        ({"instruction": "Add", "input": "2 2", "output": "4"}, "Add\n\n2 2", "4"),
        ({"instruction": "Add", "input": "", "output": "4"}, "Add", "4"),
    ]
    plain = chat_tokenizer()
    plain.chat_template = None
    for row, asked, answer in rows:
        whole = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        tokenizer = chat_tokenizer()
        (made,) = by_us([row], tokenizer)
        assert tokenizer.decode(made[0]) == whole
        assert learnt([row], tokenizer) == [f"{answer}<|im_end|>\n"]
        assert plain.decode(by_us([row], plain)[0][0]) == f"{asked}\n{answer}</s>"
        assert learnt([row], plain) == [f"{answer}</s>"]


def test_chats_alone_and_their_origins_are_read() -> None:
    tokenizer = chat_tokenizer()
    expected = by_us([{"messages": CHAT}], tokenizer)
    assert by_us([CHAT], tokenizer) == expected
    assert by_us([{"chat": CHAT, "id": 3}], tokenizer) == expected
    with pytest.warns(UserWarning, match=r"\['source'\] are not read"):
        assert by_us([{"messages": CHAT, "source": "web"}], tokenizer) == expected


def test_a_named_column_of_texts_is_read() -> None:
    assert learnt([{"body": "a b"}], chat_tokenizer(), dataset_text_field="body") == ["a b</s>"]


def test_sharegpt_has_its_own_names_of_roles() -> None:
    rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    assert learnt(rows, chat_tokenizer(), assistant_only_loss=True) == ["b<|im_end|>\n"]


def test_a_template_that_writes_bos_is_given_no_second_one() -> None:
    tokenizer = told("llama3")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    for rows in ([{"messages": CHAT}], [TURN], [{"prompt": "<s>a", "completion": "b"}]):
        ((ids, _),) = by_us(rows, tokenizer)
        assert ids.count(tokenizer.bos_token_id) == 1


def test_eos_ends_a_chat_whose_template_marks_no_end() -> None:
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert learnt([{"messages": CHAT}], tokenizer)[0].endswith("assistant: Yes.\n</s>")


def test_two_masks_of_tokens_count_where_both_do() -> None:
    row = {
        "input_ids": [5, 6, 7, 8],
        "completion_mask": [0, 0, 1, 1],
        "assistant_masks": [0, 1, 1, 0],
    }
    assert by_us([row], None) == by_trl([row], chat_tokenizer())
    ((_, labels),) = by_us([row], None, completion_only_loss=False, assistant_only_loss=True)
    assert labels == [-100, 6, 7, -100]


@pytest.mark.filterwarnings("ignore:1 of 1 texts have more than 3")
def test_rows_of_tokens_are_cut_where_a_length_is_given() -> None:
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}
    assert by_us([row], None) == [(row["input_ids"], row["labels"])]
    assert by_us([row], None, max_length=3) == [([5, 6, 7], [-100, 6, 7])]
    with pytest.raises(DataError, match=r"max_length=3 cuts the rows of .*, and Rows makes"):
        by_us(Rows([row]), None, max_length=3)
    assert by_us(Rows([row]), None, max_length=None) == [(row["input_ids"], row["labels"])]


# Warnings and errors --------------------------------------------------------------------------


def test_what_is_cut_is_counted_and_named() -> None:
    rows = [{"prompt": "x" * size, "completion": "yes"} for size in (2, 8, 12)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = prepared(rows, chat_tokenizer(), max_length=10)
    said = [str(warning.message) for warning in caught]
    assert any(
        "2 of 3 texts have more than 10 tokens and are cut there, at max_l" in s for s in said
    )
    assert any("1 examples have nothing to learn in their first 10 tokens, such as example 2;" in s
               for s in said)  # fmt: skip
    assert data.labels.ne(-100).sum(1).tolist() == [4, 2, 0]


def test_a_prompt_that_melts_into_its_completion_is_named() -> None:
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.warns(UserWarning, match="1 of 1 prompts end with other tokens"):
        assert learnt([TURN], tokenizer) == ["Yes.</s>"]


BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"
NO_TOOLS = "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}"
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "search"}}]}
RESULT = {"role": "tool", "content": "It rains"}
LAST = "{% for m in messages %}{{ messages[-1].content }}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("rows", "chat_template", "options", "words"),
    [
        ([{"messages": CHAT}], "", {}, "has no chat template; set tokenizer.chat_template"),
        ([{"messages": CHAT, "text": "a b"}], BARE, {}, r"'text' here, .* \['messages'\], too"),
        ([{"messages": CHAT, "prompt": "a b"}], BARE, {}, r"\['prompt'\], too"),
        ([{"messages": CHAT, "loss_masks": [1]}], BARE, {}, r"\['loss_masks'\]"),
        ([{"messages": CHAT, "labels": [1]}], BARE, {}, r"\['labels'\], too"),
        ([{"messages": []}, {"messages": CHAT}], BARE, {}, "example 0: a chat must be a list"),
        ([{"messages": [{"role": "user", "content": None}]}], BARE, {}, "has no content"),
        ([{"messages": [{"role": None, "content": "a"}]}], BARE, {}, "a message has no role"),
        ([{"messages": CHAT}], "{{ raise_exception('no') }}", {}, "cannot write .*: no"),
        ([{"messages": CHAT}], "a", {}, "leaves out a message of the role 'user', 'Hi you'"),
        ([{"messages": CHAT, "tools": "[{"}], BARE, {}, "the tools of an example are no JSON"),
        ([{"messages": CHAT, "tools": [{"name": "search"}]}], BARE, {}, "leaves out a tool, 'sea"),
        ([{"messages": [CHAT[0], CALL, RESULT, CHAT[3]]}], BARE, {}, "leaves out a tool call"),
        ([{"messages": [CHAT[0], RESULT, CHAT[3]]}], NO_TOOLS, {}, "the role 'tool', 'It rains'"),
        ([{"messages": CHAT[:1]}], BARE, {"assistant_only_loss": True}, "assistant says nothing"),
        ([{"messages": CHAT}], LAST, {"assistant_only_loss": True}, "{% generation %} and"),
        ([{"messages": CHAT[1:]}], BARE, {"assistant_only_loss": True}, "the chat begins with it"),
        ([{"messages": "[]"}], BARE, {}, "'messages' holds texts, and a chat is a list"),
        ([{"text": "a"}, {"text": "b", "answer": "c"}], BARE, {}, r"\['answer'\], too"),
        ([{"content": "a"}], BARE, {"dataset_text_field": "body"}, "dataset_text_field='body'"),
        ([{"text": "a"}], BARE, {"assistant_only_loss": True}, "'text' hold no chats"),
        ([{"prompt": "a", "completion": "b"}], BARE, {"assistant_only_loss": True}, "no chats"),
        ([{"text": "a"}], BARE, {"completion_only_loss": True}, "has no completion, only 'text'"),
        ([{"messages": CHAT}], BARE, {"completion_only_loss": True}, "only 'messages'"),
        ([{"input_ids": [5, 6]}], BARE, {"completion_only_loss": True}, "no 'completion_mask'"),
        ([{"input_ids": [5, 6]}], BARE, {"assistant_only_loss": True}, "no 'assistant_masks'"),
        ([{"prompt": "a", "completion": None}], BARE, {}, "missing values alone"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}], BARE, {},
         "'prompt' has missing values"),
        ([{"prompt": CHAT, "completion": CHAT[3:]}], BARE, {}, "nothing is left to be written"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_words(
    rows: Any, chat_template: str, options: Any, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        prepared(rows, chat_tokenizer(chat_template), **options)


def test_chats_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(DataError, match="holds chats and there is no tokenizer"):
        prepared([{"messages": CHAT}], None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 1}, "max_length must be a whole number >= 2"),
        ({"max_length": "long"}, "max_length must be"),
        ({"packing": 1}, "packing must be True or False"),
        ({"completion_only_loss": "yes"}, "completion_only_loss must be True or False"),
        ({"assistant_only_loss": None}, "assistant_only_loss must be True or False"),
        ({"dataset_text_field": ""}, "dataset_text_field must be the name of a column"),
    ],
)
def test_options_are_checked(options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TextOptions(**options)

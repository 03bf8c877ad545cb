"""``--set PART.OPTION=VALUE`` becomes the options of the Python interface, or a clear error."""

from __future__ import annotations

from typing import Any

import pytest

from pyrolora import AdapterConfig, RankAllocation
from pyrolora.cli.settings import TAKEN, build, check_training, parse
from pyrolora.errors import ConfigError
from pyrolora.guides import MonteCLoRA


def test_nothing_set_is_nothing_for_every_part() -> None:
    assert parse([]) == {"guide": {}, "adapter": {}, "texts": {}, "training": {}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1", 0.1),
        ("1e-3", 1e-3),
        ("4", 4),
        ("true", True),
        ("null", None),
        ('["query", "value"]', ["query", "value"]),
        ('{"key": 4}', {"key": 4}),
        ('"4"', "4"),
        ("gaussian", "gaussian"),
        ("lora-ga", "lora-ga"),
        (".*attention.*(query|key)", ".*attention.*(query|key)"),
        ("a=b", "a=b"),
        ("", ""),
        ("True", True),
        ("None", None),
        (" 4 ", 4),
    ],
)
def test_a_value_is_json_or_else_a_string(text: str, value: Any) -> None:
    parsed = parse([f"adapter.option={text}"])["adapter"]["option"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_settings_are_sorted_by_part() -> None:
    parsed = parse(
        ["guide.kl_weight=1", "training.optim=sgd", " adapter.r =2", "guide.sparse=true"]
    )
    assert parsed == {
        "guide": {"kl_weight": 1, "sparse": True},
        "adapter": {"r": 2},
        "texts": {},
        "training": {"optim": "sgd"},
    }


@pytest.mark.parametrize(
    "setting", ["", "r=4", "adapter.r", "adapter=4", "adapter.=4", ".r=4", "model.r=4", "Guide.a=1"]
)
def test_what_is_no_setting_is_shown_how_to_write_one(setting: str) -> None:
    with pytest.raises(
        ConfigError, match=r"PART\.OPTION=VALUE.*guide, adapter, texts, training"
    ) as error:
        parse([setting])
    assert repr(setting) in str(error.value)


def test_a_setting_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"guide\.kl_weight was given twice"):
        parse(["guide.kl_weight=1", "guide.kl_weight=2"])


def test_options_are_built_with_their_defaults() -> None:
    assert build(MonteCLoRA, "guide", {"kl_weight": 0.5}) == MonteCLoRA(kl_weight=0.5)
    assert build(AdapterConfig, "adapter", {}) == AdapterConfig()


def test_ranks_that_move_are_a_name_or_their_options() -> None:
    parsed = parse(["adapter.rank_allocation=alora"])["adapter"]
    assert build(AdapterConfig, "adapter", parsed) == AdapterConfig(rank_allocation="alora")
    parsed = parse(['adapter.rank_allocation={"importance": "snr", "rounds": 4}'])["adapter"]
    expected = RankAllocation(importance="snr", rounds=4)
    assert build(AdapterConfig, "adapter", parsed).allocation == expected


def test_an_unknown_option_is_named_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        build(AdapterConfig, "adapter", {"rank": 4})
    for word in ("--set adapter.rank", "AdapterConfig has no such option", "lora_alpha"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "part", "option", "value"),
    [
        (AdapterConfig, "adapter", "r", "two"),
        (AdapterConfig, "adapter", "r", 0),
        (AdapterConfig, "adapter", "lora_alpha", "large"),
        (AdapterConfig, "adapter", "lora_dropout", "high"),
        (AdapterConfig, "adapter", "lora_dropout", None),
        (AdapterConfig, "adapter", "rank_pattern", 3),
        (AdapterConfig, "adapter", "modules_to_save", "classifier"),
        (MonteCLoRA, "guide", "kl_weight", "heavy"),
        (MonteCLoRA, "guide", "kl_weight", float("nan")),
        (MonteCLoRA, "guide", "kl_warmup", "soon"),
        (MonteCLoRA, "guide", "num_components", 1.5),
        (MonteCLoRA, "guide", "latent", ["A"]),
        (MonteCLoRA, "guide", "sparse", "maybe"),
        (MonteCLoRA, "guide", "sparse", 1),
        (AdapterConfig, "adapter", "use_rslora", "no"),
        (AdapterConfig, "adapter", "target_modules", 3),
        (AdapterConfig, "adapter", "rank_allocation", 3),
        (AdapterConfig, "adapter", "rank_allocation", "adalora"),
        (AdapterConfig, "adapter", "rank_allocation", {"rank": 3}),
    ],
)
def test_a_value_that_an_option_cannot_have_is_refused(
    kind: type, part: str, option: str, value: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(kind, part, {option: value})
    assert option in str(caught.value) or repr(option) in str(caught.value)


@pytest.mark.parametrize("option", TAKEN)
def test_an_argument_of_the_trainer_that_has_its_own_name_here_is_refused(option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_training({option: 1})
    assert f"--set training.{option}" in str(caught.value)
    assert TAKEN[option] in str(caught.value)


def test_an_argument_that_the_trainer_does_not_have_is_refused() -> None:
    check_training({"gradient_accumulation_steps": 2, "weight_decay": 0.1})
    with pytest.raises(ConfigError, match=r"training\.warp: TrainingArguments has no such option"):
        check_training({"weight_decay": 0.1, "warp": 9})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("weight_decay", "heavy"),
        ("max_steps", "x"),
        ("max_steps", 1.5),
        ("bf16", "maybe"),
        ("max_grad_norm", [1]),
        ("optim", 3),
    ],
)
def test_an_argument_of_the_trainer_of_another_type_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        check_training({option: value})
    assert f"training.{option}" in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("weight_decay", 0), ("weight_decay", 0.1), ("optim", "sgd"), ("bf16", False)),
        *(("lr_scheduler_type", "cosine"), ("eval_strategy", "epoch"), ("max_steps", -1)),
        *(("lr_scheduler_kwargs", {"num_cycles": 1}), ("save_steps", 0.5), ("warmup_steps", 10)),
        *(("eval_steps", None), ("report_to", "none"), ("dataloader_num_workers", 0)),
    ],
)
def test_arguments_of_the_trainer_of_their_types_pass(option: str, value: Any) -> None:
    check_training({option: value})

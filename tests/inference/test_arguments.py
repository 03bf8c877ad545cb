"""The Trainer's arguments are pyrolora's defaults unless they are given; what would do nothing is
refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import bert, tokens
from transformers import TrainingArguments

import pyrolora
from pyrolora import defaults
from pyrolora.errors import ConfigError
from pyrolora.inference import check_arguments, training_arguments
from pyrolora.inference.arguments import UNUSED


def test_the_defaults_are_pyroloras(tmp_path: Path) -> None:
    args = training_arguments(tmp_path / "run")
    assert args.num_train_epochs == defaults.EPOCHS
    assert args.learning_rate == defaults.LEARNING_RATE
    assert args.per_device_train_batch_size == defaults.BATCH_SIZE
    assert args.per_device_eval_batch_size == defaults.BATCH_SIZE
    assert args.seed == defaults.SEED
    assert args.output_dir == str(tmp_path / "run")
    assert args.report_to == []
    assert args.remove_unused_columns is False
    assert args.label_names == ["labels"]
    assert not (tmp_path / "run").exists(), "arguments alone write nothing"


def test_what_is_given_replaces_the_defaults(tmp_path: Path) -> None:
    args = training_arguments(
        tmp_path, epochs=2.5, learning_rate=0.5, batch_size=3, seed=0, weight_decay=0.1,
        gradient_accumulation_steps=4, per_device_eval_batch_size=7, logging_steps=11,
    )  # fmt: skip
    assert (args.num_train_epochs, args.learning_rate, args.seed) == (2.5, 0.5, 0)
    assert (args.per_device_train_batch_size, args.per_device_eval_batch_size) == (3, 7)
    assert (args.weight_decay, args.gradient_accumulation_steps) == (0.1, 4)
    assert args.logging_steps == 11


def test_checkpoints_are_written_unless_they_are_not_wanted(tmp_path: Path) -> None:
    kept = training_arguments(tmp_path)
    assert kept.save_strategy == "steps"
    assert kept.save_steps == pytest.approx(1 / 10)
    assert kept.save_total_limit == 2
    assert training_arguments(tmp_path, save=False).save_strategy == "no"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("epochs", [0, -1, float("nan"), float("inf"), "5", None, True]),
        ("learning_rate", [0, -1e-3, float("nan"), float("inf"), "0.1", None]),
        ("batch_size", [0, -1, 2.0, "8", None, True]),
        ("seed", [-1, 1.5, "0", None, 2**32, 2**70]),
    ],
)
def test_values_out_of_range_are_refused_by_name(
    name: str, values: list[Any], tmp_path: Path
) -> None:
    """A seed has 32 bits, as NumPy's generator has it, which the Trainer sets."""
    for value in values:
        options: dict[str, Any] = {name: value}
        with pytest.raises(ConfigError) as caught:
            training_arguments(tmp_path, **options)
        assert name in str(caught.value)
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 1), ("seed", 0), ("seed", 2**32 - 1), ("epochs", 0.1)]
)
def test_values_at_the_edge_of_the_range_pass(name: str, value: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {name: value}
    training_arguments(tmp_path, **options)


def test_numpys_numbers_are_taken_as_pythons(tmp_path: Path) -> None:
    given = {"epochs": np.int64(3), "seed": np.int64(1), "batch_size": np.int32(8)}
    args = training_arguments(tmp_path, learning_rate=np.float32(0.5), **given)
    found = (args.num_train_epochs, args.seed, args.per_device_train_batch_size)
    assert found == (3.0, 1, 8)
    assert [type(value) for value in found] == [float, int, int]
    assert type(args.learning_rate) is float


# Checkpoints --------------------------------------------------------------------------------------


@dataclass
class WithOptions(TrainingArguments):
    """As TRL's ``SFTConfig`` is one."""

    packing: bool = False
    max_length: int = 64


@dataclass
class Renamed(TrainingArguments):
    """A class of a user's own, which adds no option."""


def test_a_class_with_options_of_its_own_is_refused_by_their_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a WithOptions, .* \(packing=True\)"):
        check_arguments(WithOptions(str(tmp_path), packing=True))
    with pytest.raises(ConfigError, match=r"\(packing, max_length\)"):
        check_arguments(WithOptions(str(tmp_path)))
    check_arguments(Renamed(str(tmp_path)))


@pytest.mark.parametrize("name", [*UNUSED])
def test_an_option_that_would_do_nothing_is_refused_by_name(name: str, tmp_path: Path) -> None:
    neutral, reason = UNUSED[name]
    training = TrainingArguments(str(tmp_path), report_to="none")
    assert getattr(training, name) in (neutral, None), "the reason is for another default"
    setattr(training, name, not neutral if isinstance(neutral, bool) else 1)
    with pytest.raises(ConfigError, match=f"{name}=.*{reason.split(',')[0]}"):
        check_arguments(training)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="float16 has an effect there")
def test_float16_without_a_device_for_it_is_refused(tmp_path: Path) -> None:
    training = TrainingArguments(str(tmp_path), report_to="none", fp16=True)
    with pytest.raises(ConfigError, match="fp16=True has no effect on a CPU"):
        check_arguments(training)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "lomo"}, "optim='lomo' cannot be used: .*lomo_optim"),
        ({"report_to": ["clearml"]}, "report_to='clearml' cannot be used: .*clearml"),
        ({"lr_scheduler_kwargs": {"cycles": 1}}, "'linear' cannot be used .*'cycles'"),
    ],
    ids=["optim", "report_to", "schedule"],
)
def test_what_the_trainer_cannot_use_is_refused_by_name(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    training = TrainingArguments(str(tmp_path), **{"report_to": "none", **options})
    with pytest.raises(ConfigError, match=message):
        pyrolora.fit(bert(), tokens(8), "map", training=training)


def test_an_order_that_cannot_be_gone_on_with_is_refused_in_a_resume(tmp_path: Path) -> None:
    options = {"train_sampling_strategy": "group_by_length", "report_to": "none", "use_cpu": True}
    check_arguments(TrainingArguments(str(tmp_path), **options))
    with pytest.raises(ConfigError, match=r"group_by_length.*cannot be resumed"):
        check_arguments(TrainingArguments(str(tmp_path), resume_from_checkpoint="x", **options))


def test_options_with_an_effect_and_those_of_pyrolora_pass(tmp_path: Path) -> None:
    check_arguments(training_arguments(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.5))
    check_arguments(TrainingArguments(str(tmp_path), warmup_steps=3, logging_nan_inf_filter=False))


@pytest.mark.parametrize("training", [{"learning_rate": 1e-3}, "args", 3])
def test_what_is_no_training_arguments_is_refused(training: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be a transformers\.TrainingArguments"):
        check_arguments(training)

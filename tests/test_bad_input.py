"""Wrong inputs: an own error that says what was wrong, before any step, and a clean network.

Every case goes through `refused`, which checks the three together.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import peft
import pytest
import torch
from problems import Rows, bert, llama, mlp, reviews, tokenizer, tokens
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)

import pyrolora
from pyrolora import AdapterConfig, Posterior, PyroLoraError, guides
from pyrolora.adapters import Wrapper
from pyrolora.errors import (
    BindingError,
    ConfigError,
    DataError,
    NonFiniteError,
    SaveError,
    TargetError,
    UnknownNameError,
)

THIN = AdapterConfig(r=1)  # fits the smallest layer of the plain networks
NAN, INF = float("nan"), float("inf")
X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def snapshot(network: nn.Module) -> dict[str, Any]:
    """What a failed fit must not change; the first parameter is frozen, so that flags differ."""
    return {
        "modules": [(name, type(module)) for name, module in network.named_modules()],
        "flags": [(name, p.requires_grad) for name, p in network.named_parameters()],
        "gradients": [name for name, p in network.named_parameters() if p.grad is not None],
        "checkpointing": getattr(network, "is_gradient_checkpointing", None),
        "modes": [module.training for module in network.modules()],
    }


def refused(
    error: type[PyroLoraError], words: str, steps: list[int], model: Any, data: Any, **options: Any
) -> None:
    """Fit and expect ``error`` whose message holds the comma-separated ``words``."""
    network = model if isinstance(model, nn.Module) else nn.Identity()
    first = next(network.parameters(), None)
    if first is not None:
        first.requires_grad_(False)
    before = snapshot(network)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(PyroLoraError) as caught:
        pyrolora.fit(model, data, **options)
    assert isinstance(caught.value, error), repr(caught.value)
    assert_says(caught.value, words)
    assert steps == []
    assert snapshot(network) == before
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def assert_says(error: BaseException, words: str) -> None:
    message = str(error)
    for word in re.split(r",\s*", words):
        assert word in message, f"{word!r} is not in {message!r}"


# Data ---------------------------------------------------------------------------------------------


def relabelled(labels: list[Any]) -> datasets.Dataset:
    data = tokens(len(labels)).remove_columns("labels")
    return data.add_column("labels", labels)


def spoiled(value: float) -> Tensor:
    x = X.clone()
    x[5, 2] = value
    return x


def rows_of(x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    return [{"inputs": a.tolist(), "labels": b.item()} for a, b in zip(x, y, strict=True)]


def no_pad_tokenizer() -> Any:
    made = tokenizer()
    made.pad_token = None
    return made


def texts(*values: str | None) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(values), "label": [0] * len(values)})


def streamed_splits() -> datasets.IterableDatasetDict:
    return datasets.IterableDatasetDict({"train": tokens().to_iterable_dataset()})


SEQUENCES: dict[str, tuple[Callable[[], Any], str, dict[str, Any]]] = {
    "no rows": (lambda: tokens().select([]), "empty, 0 examples", {}),
    "no rows in a list": (list, "empty, 0 examples", {}),
    "no rows in a torch data set": (lambda: Rows([]), "empty, 0 examples", {}),
    "no labels": (
        lambda: tokens().remove_columns("labels"),
        "no labels, 'label', input_ids, rename_column",
        {},
    ),
    "labels under another name": (
        lambda: tokens().rename_column("labels", "target"),
        "no labels, 'label', input_ids, rename_column",
        {},
    ),
    "no labels in a torch data set": (
        lambda: Rows([{"input_ids": torch.tensor([4, 5])}]),
        "no labels, input_ids",
        {},
    ),
    "a label too high": (
        lambda: relabelled([0, 1, 2, 1]),
        "2 classes, from 0 to 2, num_labels=3",
        {},
    ),
    "a negative label": (lambda: relabelled([0, -1, 1]), "labels must be >= 0, -1", {}),
    "a float label": (lambda: relabelled([0.0, 1.0]), "whole-number, float, 'regression'", {}),
    "a list as label": (lambda: relabelled([[0, 1], [1, 0]]), "one whole-number label, (2, 2)", {}),
    "a name as label": (lambda: relabelled(["yes", "no"]), "numbers, 'yes', map", {}),
    "a missing label": (lambda: relabelled([0, None, 1]), "no label, example 1", {}),
    "raw text without a tokenizer": (lambda: reviews(4), "raw text (text), tokenizer=", {}),
    "a tokenizer without padding": (
        lambda: texts("a good film", "dull"),
        "no padding token, tokenizer.pad_token =",
        {"tokenizer": no_pad_tokenizer},
    ),
    "ragged tokens without a tokenizer": (
        lambda: [{"input_ids": [4] * n, "labels": 0} for n in (2, 3)],
        "differ in length, tokenizer=",
        {},
    ),
    "a missing text": (
        lambda: texts("a good film", None),
        "'text', missing",
        {"tokenizer": tokenizer},
    ),
    "no column of use": (
        lambda: datasets.Dataset.from_dict({"height": [1.0], "label": [0]}),
        "height, BertForSequenceClassification, input_ids",
        {},
    ),
    "ambiguous text": (
        lambda: datasets.Dataset.from_dict({"x": ["a"], "y": ["b"], "z": ["c"], "label": [0]}),
        "'x', 'y', 'z', select_columns",
        {"tokenizer": tokenizer},
    ),
    "raw text in a torch data set": (
        lambda: Rows([{"text": "a good film", "label": 1}, {"text": "dull", "label": 0}]),
        "text",
        {"tokenizer": tokenizer},
    ),
    "no such split": (
        lambda: datasets.DatasetDict({"dev": tokens()}),
        "'train', ['dev'], data['dev']",
        {},
    ),
    "a stream": (lambda: tokens().to_iterable_dataset(), "a stream, max_steps", {}),
    "a dictionary of streams": (streamed_splits, "a stream, max_steps", {}),
    "a number": (lambda: 3, "datasets.Dataset, got int", {}),
    "nothing": (lambda: None, "datasets.Dataset, got NoneType", {}),
    "a path": (lambda: "train.csv", "as a list, datasets.Dataset.from_json", {}),
    "a list of numbers": (lambda: [1, 2], "dicts or texts, got int", {}),
    "a dictionary of columns": (lambda: tokens().to_dict(), "got dict", {}),
    "a data frame": (lambda: tokens().to_pandas(), "got DataFrame", {}),
}


@pytest.mark.parametrize("case", SEQUENCES)
def test_data_of_sequences_that_cannot_be_used(case: str, steps: list[int]) -> None:
    data, words, options = SEQUENCES[case]
    made = {name: value() for name, value in options.items()}
    refused(DataError, words, steps, bert(), data(), **made)


@pytest.mark.parametrize("case", ["no labels", "a label too high", "no rows", "a missing label"])
def test_evaluation_data_is_checked_before_training(case: str, steps: list[int]) -> None:
    data, words, _ = SEQUENCES[case]
    refused(DataError, words, steps, bert(), tokens(), eval_data=data())


PLAIN: dict[str, tuple[Any, str]] = {
    "nan in a tuple": ((spoiled(NAN), Y), "'inputs', example 5, not finite"),
    "infinity in a tuple": ((spoiled(INF), Y), "'inputs', example 5, not finite"),
    "nan in a list": (rows_of(spoiled(NAN), Y), "'inputs', example 5, not finite"),
    "infinity in a list": (rows_of(spoiled(-INF), Y), "'inputs', example 5, not finite"),
    "nan in pairs": (Rows(list(zip(spoiled(NAN), Y, strict=True))), "example 5, not finite"),
    "lengths that differ": ((X, Y[:3]), "differ in length, 12, 3"),
    "three tensors": ((X, X, Y), "(inputs, labels), 3"),
    "an empty tuple": ((), "(inputs, labels), 0"),
    "no rows": ((X[:0], Y[:0]), "empty, 0 examples"),
    "features only": ((X,), "no labels, inputs"),
    "a negative label": ((X, Y - 1), "labels must be >= 0, -1"),
    "a label too high": ((X, Y + 1), "3 classes, 3"),
    "float labels": ((X, Y.float()), "whole-number, float, 'regression'"),
    "examples that are arrays": (X.numpy(), "(input, label), ndarray"),
}


@pytest.mark.parametrize("case", PLAIN)
def test_data_of_plain_networks_that_cannot_be_used(case: str, steps: list[int]) -> None:
    data, words = PLAIN[case]
    refused(DataError, words, steps, mlp(), data, task="classification", adapter=THIN)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_regression_needs_finite_labels(bad: float, steps: list[int]) -> None:
    y = torch.ones(12)
    y[7] = bad
    words = f"label of example 7, {bad}"
    options = {"task": "regression", "adapter": THIN}
    refused(DataError, words, steps, mlp(outputs=1), (X, y), **options)


def test_regression_needs_one_label_an_example(steps: list[int]) -> None:
    y = torch.ones(12, 2)
    options = {"task": "regression", "adapter": THIN}
    refused(DataError, "one number, (12, 2)", steps, mlp(outputs=1), (X, y), **options)


@pytest.mark.parametrize(
    ("network", "data"),
    [
        pytest.param(bert, lambda: relabelled([0.5] * 4), id="transformer"),
        pytest.param(mlp, lambda: (X, Y.float()), id="plain"),
    ],
)
def test_regression_needs_one_output(network: Any, data: Any, steps: list[int]) -> None:
    options = {"task": "regression", "adapter": THIN}
    refused(DataError, "one output", steps, network(), data(), **options)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[99] * 8] * 2, "0..15, 99, tokenizer"),
        ([[-3] * 8] * 2, "-100, -3"),
        ([[-100] * 8] * 2, "-100, nothing to learn"),
        ([0, 1], "token id per position, int64"),
    ],
)
def test_token_labels_that_cannot_be_used(labels: Any, words: str, steps: list[int]) -> None:
    refused(DataError, words, steps, llama(), relabelled(labels))


# The network --------------------------------------------------------------------------------------


def test_a_plain_network_needs_a_likelihood(steps: list[int]) -> None:
    words = "Sequential, task=, classification, regression, text-generation"
    refused(ConfigError, words, steps, mlp(), (X, Y))


@pytest.mark.parametrize("model", [3, None, {"a": 1}])
def test_a_model_of_another_kind_is_refused(model: Any, steps: list[int]) -> None:
    refused(ConfigError, f"model must be, {type(model).__name__}", steps, model, tokens())


@pytest.mark.parametrize("name", ["nobody/no-such-model", "/no/such/folder", "no-such-model"])
def test_a_name_that_leads_to_no_model_is_refused(name: str, steps: list[int]) -> None:
    refused(ConfigError, f"cannot load, {name}, folder, hub id", steps, name, tokens())


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_without_a_model_is_refused(kind: Any, tmp_path: Path, steps: list[int]) -> None:
    refused(ConfigError, f"cannot load, {tmp_path}", steps, kind(tmp_path), tokens())


def test_a_folder_without_weights_is_refused(tmp_path: Path, steps: list[int]) -> None:
    bert().config.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    refused(ConfigError, f"cannot load, {tmp_path}", steps, str(tmp_path), tokens())


def test_a_folder_without_a_tokenizer_serves_tokenised_data(tmp_path: Path) -> None:
    """Tokens of one length need no tokenizer, so that a folder without one is no error."""
    bert().save_pretrained(tmp_path)
    posterior = pyrolora.fit(str(tmp_path), tokens(), guide="map", epochs=1)
    assert posterior.predict(tokens(4), num_samples=1).probs.shape == (4, 2)


def test_a_decoder_that_classifies_needs_a_padding_token(steps: list[int]) -> None:
    config = LlamaConfig(**{**llama().config.to_dict(), "pad_token_id": None, "num_labels": 2})
    words = "LlamaForSequenceClassification, pad_token_id, tokenizer.pad_token_id"
    refused(ConfigError, words, steps, LlamaForSequenceClassification(config).eval(), tokens())


# Adapters -----------------------------------------------------------------------------------------

TARGETS: dict[str, tuple[dict[str, Any], type[PyroLoraError], str]] = {
    "nothing matches": (
        {"target_modules": ["q_proj"]},
        TargetError,
        "q_proj, BertForSequenceClassification, layer.#.attention.self.query, all-linear",
    ),
    "everything is excluded": (
        {"exclude_modules": ["query", "key", "value"]},
        TargetError,
        "without, query, output.dense",
    ),
    "an empty list": ({"target_modules": []}, TargetError, "[], attention.self.query"),
    "no regular expression": (
        {"target_modules": "query("},
        ConfigError,
        "query(, regular expression",
    ),
    "no such module to save": (
        {"modules_to_save": ["scorer"]},
        TargetError,
        "scorer, 'classifier'",
    ),
    "a rank above the layer's size": (
        {"r": 17},
        ConfigError,
        "rank 17, attention.self.query, in 16, r <= 16, rank_pattern",
    ),
    "a rank of one layer above its size": (
        {"rank_pattern": {"key": 40}},
        ConfigError,
        "rank 40, attention.self.key, r <= 16",
    ),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_that_the_network_does_not_have(case: str, steps: list[int]) -> None:
    options, error, words = TARGETS[case]
    refused(error, words, steps, bert(), tokens(), adapter=AdapterConfig(**options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "'r', >= 1, 0"),
        ({"r": -2}, "'r', >= 1, -2"),
        ({"r": 2.5}, "'r', whole number, 2.5"),
        ({"r": True}, "'r', whole number, True"),
        ({"rank_pattern": {"query": 0}}, "'query', >= 1, 0"),
        ({"lora_alpha": 0}, "'lora_alpha', > 0, 0"),
        ({"lora_alpha": NAN}, "'lora_alpha', > 0, nan"),
        ({"lora_alpha": INF}, "'lora_alpha', inf"),
        ({"alpha_pattern": {"query": -1}}, "'query', > 0, -1"),
        ({"lora_dropout": 1.0}, "lora_dropout, [0; 1), 1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout, [0; 1), -0.1"),
        ({"lora_dropout": NAN}, "lora_dropout, nan"),
        ({"lora_dropout": None}, "lora_dropout, None"),
        ({"use_rslora": "no"}, "use_rslora, True or False, 'no'"),
        ({"rank_pattern": None}, "rank_pattern, mapping, None"),
        ({"alpha_pattern": [4]}, "alpha_pattern, mapping, [4]"),
        ({"target_modules": 5}, "target_modules, names of modules, 5"),
        ({"target_modules": {"query": 1}}, "target_modules, names of modules"),
        ({"exclude_modules": [1]}, "exclude_modules, names of modules, [1]"),
        ({"modules_to_save": 5}, "modules_to_save, names of modules, 5"),
        (
            {"init_lora_weights": "zeros"},
            "init_lora_weights, 'zeros', kaiming, gaussian, lora-ga, pissa, olora",
        ),
    ],
)
def test_adapter_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AdapterConfig(**options)
    assert_says(caught.value, words.replace("[0; 1)", "[0"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "LoraConfig(use_dora=True), leave it out"),
        ({"bias": "all"}, "LoraConfig(bias='all'), leave it out"),
        (
            {"init_lora_weights": "orthogonal"},
            "init_lora_weights, 'orthogonal', kaiming, lora-ga, pissa",
        ),
    ],
)
def test_variants_of_lora_in_a_peft_config(
    options: dict[str, Any], words: str, steps: list[int]
) -> None:
    adapter = peft.LoraConfig(target_modules=["query"], **options)
    refused(ConfigError, words, steps, bert(), tokens(), adapter=adapter)


class Unused(nn.Module):
    """Two linear layers, of which the second one's product is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + 0.0 * self.second(x)


class Coded(nn.Linear):
    """A weight that is stored as whole numbers."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float(), self.bias)


@pytest.mark.parametrize(
    ("network", "options", "words"),
    [
        (mlp(), {"init_lora_weights": "lora-ga", "r": 2}, "2 r = 4, layer '2', 3, r <= 1"),
        (Unused(), {"init_lora_weights": "lora-ga"}, "'second', is zero, exclude_modules"),
        (
            nn.Sequential(Coded()),
            {"init_lora_weights": "lora-ga"},
            "layer '0', torch.int8, unquantised, 'kaiming'",
        ),
        (
            nn.Sequential(Coded()),
            {"init_lora_weights": "pissa"},
            "layer '0', torch.int8, unquantised, 'kaiming'",
        ),
    ],
    ids=["rank", "unused", "quantised, gradient", "quantised, weight"],
)
def test_a_start_that_cannot_be_had(
    network: nn.Module, options: dict[str, Any], words: str, steps: list[int]
) -> None:
    adapter = AdapterConfig(**{"r": 1, **options})
    how = {"task": "classification", "adapter": adapter}
    refused(ConfigError, words, steps, network, (X, Y), **how)


def test_a_start_from_a_gradient_meets_labels_that_do_not_fit_as_any_fit_does(
    steps: list[int],
) -> None:
    adapter = AdapterConfig(r=1, init_lora_weights="lora-ga")
    how = {"task": "classification", "adapter": adapter}
    refused(DataError, "3", steps, mlp(outputs=2), (X, Y), **how)


@pytest.mark.parametrize("adapter", [8, {"r": 8}, "lora"])
def test_an_adapter_of_another_kind_is_refused(adapter: Any, steps: list[int]) -> None:
    words = f"AdapterConfig, peft.LoraConfig, {type(adapter).__name__}"
    refused(ConfigError, words, steps, bert(), tokens(), adapter=adapter)


# Guides and likelihoods ---------------------------------------------------------------------------


def test_an_unknown_guide_is_answered_with_the_names(steps: list[int]) -> None:
    words = ", ".join(["'montecarlo'", *guides.available()])
    refused(UnknownNameError, words, steps, bert(), tokens(), guide="montecarlo")


@pytest.mark.parametrize("guide", [guides.MAP, 3])
def test_a_guide_of_another_kind_is_answered_with_the_names(guide: Any, steps: list[int]) -> None:
    words = ", ".join(["guide must be", *guides.available()])
    refused(ConfigError, words, steps, bert(), tokens(), guide=guide)


def test_an_unknown_likelihood_is_answered_with_the_names(steps: list[int]) -> None:
    words = "'poisson', classification, regression, text-generation"
    refused(UnknownNameError, words, steps, bert(), tokens(), task="poisson")


FLAGS = ["no", "False", 1, None]
COMMON: dict[str, list[Any]] = {
    "kl_weight": [-1.0, NAN, INF],
    "kl_weight_against": ["median"],
    "kl_warmup": [-0.1, 1.1, NAN, None, "0.1"],
    "scale_learning_rate": [0.0, -1.0, NAN, INF],
    "draws_per_batch": [0, -1, 1.5],
    "scale_updates": ["adam", False],
    "hold_back": [-0.1, 1.0, NAN, "0.1"],
}
GAUSSIAN: dict[str, list[Any]] = {
    **COMMON,
    "prior_scale": [0.0, -1.0, NAN, INF],
    "init_scale": [0.0, -1.0, NAN, INF],
    "units": ["width", 1.0],
    "prior_mean": ["x", 0.0, None],
}
OUT_OF_RANGE: dict[type[guides.Guide], dict[str, list[Any]]] = {
    guides.MAP: {
        **COMMON,
        "draws_per_batch": [0, 2],
        "prior_scale": [0.0, -1.0, NAN, INF],
        "latent": ["C"],
    },
    guides.MeanField: {
        **GAUSSIAN,
        "latent": ["C", "BA"],
    },
    guides.Flat: {
        "rho": [0.0, -0.1, NAN, INF],
        "inner": ["montec", None, guides.Flat()],
        "at_prediction": FLAGS,
    },
    guides.Laplace: {
        "prior_scale": [0.0, -1.0, NAN, INF],
        "tune": ["evidence"],
        "linearised": ["yes", 1],
        "latent": ["C"],
        "curvature": ["dense", None],
        "num_draws": [0, 1.5],
    },
    guides.Ensemble: {"members": [0, 1, 2.5], "side_by_side": FLAGS},
    guides.SWAG: {
        "start": [-0.1, 1.0, NAN, "half"],
        "snapshots": [1, 2.5],
        "rank": [1, 100],
        "latent": ["C"],
        "prior_scale": [0.0, -1.0, NAN, INF],
    },
    guides.Dropout: {
        "p": [0.0, 1.0, NAN, "half", None],
        "unit": ["token"],
        "draws_per_batch": [0, 1.5],
    },
    guides.LowRank: {
        **GAUSSIAN,
        "rank": [0, 1.5],
        "latent": ["C"],
    },
    guides.NUTS: {
        "inner": [guides.MAP(), guides.Flat(), guides.Laplace(), guides.Ensemble(), "montec"],
        "chains": [0, 1.5],
        "num_samples": [0],
        "warmup_steps": [0],
        "target_accept_prob": [0.0, 1.0, NAN, "high"],
        "max_tree_depth": [0],
    },
    guides.MonteCLoRA: {
        **COMMON,
        "num_components": [0, -1, 2.5],
        "sample_scale": [0.0, -1.0, NAN, INF],
        "component_prior": ["paper"],
        "covariance": ["lowrank"],
        "prior_mean": ["x", 0.0, None],
        "units": ["width", 1.0],
        "df_per_rank": [0.5, NAN, INF],
        "concentration": [0.0, -1.0, NAN, INF],
        "init_covariance": [0.0, -1.0, NAN, INF],
        "cooperation": [-0.1, NAN, INF],
        "latent": ["C"],
        "learn_sample_scale": FLAGS,
        "sparse": FLAGS,
    },
}
OUT_OF_RANGE = {kind: {"head": ["x", None], **own} for kind, own in OUT_OF_RANGE.items()}
OPTION_CASES = [
    pytest.param(kind, name, value, id=f"{kind.name}-{name}={value}")
    for kind, options in OUT_OF_RANGE.items()
    for name, values in options.items()
    for value in values
]


@pytest.mark.parametrize(("kind", "name", "value"), OPTION_CASES)
def test_guide_options_out_of_range(kind: Any, name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{name: value})
    assert_says(caught.value, f"{name} must be, {value!r}")


@pytest.mark.parametrize("kind", OUT_OF_RANGE)
def test_every_option_of_a_guide_that_has_a_range_is_tested(kind: Any) -> None:
    assert {f.name for f in dataclasses.fields(kind)} == set(OUT_OF_RANGE[kind])


@pytest.mark.parametrize("kind", OUT_OF_RANGE)
def test_an_unknown_guide_option_is_a_type_error(kind: Any) -> None:
    with pytest.raises(TypeError, match="num_chains"):
        kind(num_chains=4)


# Training -----------------------------------------------------------------------------------------


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
        **options,
    )


@pytest.mark.parametrize(
    "shortcut", [{"epochs": 2}, {"learning_rate": 0.1}, {"batch_size": 4}, {"seed": 1}]
)
def test_a_shortcut_beside_training_arguments(
    shortcut: dict[str, Any], tmp_path: Path, steps: list[int]
) -> None:
    words = f"{next(iter(shortcut))}, training=, TrainingArguments"
    training = arguments(tmp_path)
    refused(ConfigError, words, steps, bert(), tokens(), training=training, **shortcut)


def test_an_output_folder_beside_training_arguments(tmp_path: Path, steps: list[int]) -> None:
    options = {"training": arguments(tmp_path), "output_dir": tmp_path}
    refused(ConfigError, "output_dir, training=", steps, bert(), tokens(), **options)


def test_targets_as_peft_keeps_them_are_saved(tmp_path: Path) -> None:
    """As a set, whose order a file cannot have; None is PEFT's default."""
    options = {"target_modules": {"value", "query"}, "modules_to_save": {"classifier"}}
    adapter = AdapterConfig(r=1, **options)
    pyrolora.fit(bert(), tokens(), "map", epochs=1, adapter=adapter, output_dir=tmp_path)
    config = pyrolora.load(tmp_path, bert()).bank.config
    assert config.target_modules == ["query", "value"]
    assert config == adapter
    assert AdapterConfig(target_modules=None) == AdapterConfig()


@pytest.mark.parametrize("guide", ["map", "nuts"])
def test_an_output_folder_that_cannot_be(guide: str, tmp_path: Path, steps: list[int]) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for bad in (file, file / "below"):
        words = f"output_dir='{bad}' cannot be made a folder"
        refused(ConfigError, words, steps, bert(), tokens(), guide=guide, output_dir=bad)
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", -1),
        ("epochs", NAN),
        ("epochs", INF),
        ("learning_rate", 0.0),
        ("learning_rate", -0.1),
        ("learning_rate", NAN),
        ("learning_rate", INF),
        ("batch_size", 0),
        ("batch_size", -4),
        ("batch_size", 2.5),
        ("seed", -1),
        ("seed", 1.5),
    ],
)
def test_shortcuts_out_of_range(name: str, value: Any, steps: list[int]) -> None:
    refused(ConfigError, f"{name} must be, {value!r}", steps, bert(), tokens(), **{name: value})


def test_an_evaluation_schedule_needs_evaluation_data(tmp_path: Path, steps: list[int]) -> None:
    training = arguments(tmp_path, eval_strategy="epoch")
    words = "eval_strategy, epoch, eval_data="
    refused(ConfigError, words, steps, bert(), tokens(), training=training)


CHECKPOINTING = pytest.mark.parametrize(
    "prefix",
    [
        "activation",
        pytest.param(
            "gradient",
            marks=pytest.mark.filterwarnings(
                "ignore:`gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning"
            ),
        ),
    ],
)


@CHECKPOINTING
def test_reentrant_checkpointing_is_refused(prefix: str, tmp_path: Path, steps: list[int]) -> None:
    options = {
        f"{prefix}_checkpointing": True,
        f"{prefix}_checkpointing_kwargs": {"use_reentrant": True},
    }
    words = "use_reentrant=True, no gradient, use_reentrant=False"
    refused(ConfigError, words, steps, bert(), tokens(), training=arguments(tmp_path, **options))


@CHECKPOINTING
def test_a_network_without_checkpointing_is_refused(
    prefix: str, tmp_path: Path, steps: list[int]
) -> None:
    training = arguments(tmp_path, **{f"{prefix}_checkpointing": True})
    options = {"training": training, "task": "classification", "adapter": THIN}
    refused(ConfigError, "Sequential, checkpointing", steps, mlp(), (X, Y), **options)


@CHECKPOINTING
def test_a_fit_switches_checkpointing_off_again(prefix: str, tmp_path: Path) -> None:
    network = bert()
    training = arguments(tmp_path, **{f"{prefix}_checkpointing": True})
    pyrolora.fit(network, tokens(), guide="map", training=training)
    assert not network.is_gradient_checkpointing
    assert not network.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("callbacks", ["x", [1], 5, ValueError, [None]])
def test_callbacks_that_are_none_are_refused(callbacks: Any, steps: list[int]) -> None:
    refused(ConfigError, "callbacks, TrainerCallback", steps, bert(), tokens(), callbacks=callbacks)


class Interrupt(TrainerCallback):
    """The user's Ctrl-C, or a bug in a callback, in the middle of training."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise self.error("stop")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_fit_puts_the_network_back(error: type[BaseException]) -> None:
    network = bert()
    network.get_input_embeddings().requires_grad_(False)
    before = snapshot(network)
    with pytest.raises(error, match="stop"):
        pyrolora.fit(network, tokens(), epochs=1, callbacks=[Interrupt(error)])
    assert snapshot(network) == before


def test_a_failed_fit_leaves_an_older_posterior_of_the_network_working() -> None:
    network = bert()
    older = pyrolora.fit(network, tokens(), guide="map", epochs=1)
    expected = older.predict(tokens(), num_samples=0).probs
    with pytest.raises(RuntimeError, match="stop"):
        pyrolora.fit(network, tokens(), epochs=1, callbacks=[Interrupt(RuntimeError)])
    torch.testing.assert_close(older.predict(tokens(), num_samples=0).probs, expected)
    older.detach()
    assert not any(isinstance(module, Wrapper) for module in network.modules())


def full_disk(*given: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


def full_tokenizer(*given: Any, **options: Any) -> None:
    raise Exception("No space left on device")  # as Rust's tokenizers say it


@pytest.mark.parametrize("fault", [full_disk, full_tokenizer])
def test_a_posterior_that_cannot_be_written_is_not_lost(
    fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pyrolora.report.publish.write_folder", fault)
        with pytest.raises(SaveError, match="No space left") as caught:
            pyrolora.fit(bert(), tokens(), "map", epochs=1, output_dir=tmp_path)
    kept = caught.value.posterior
    kept.save(tmp_path / "elsewhere")
    again = pyrolora.load(tmp_path / "elsewhere", bert())
    torch.testing.assert_close(again.predict(tokens(), 0).probs, kept.predict(tokens(), 0).probs)


def test_a_save_that_fails_does_not_hide_why_the_fit_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyrolora.report.publish.write_folder", full_disk)
    options = {"epochs": 3, "learning_rate": 1e38, "output_dir": tmp_path}
    with pytest.raises(NonFiniteError) as caught:
        pyrolora.fit(bert(), tokens(), "map", **options)
    assert isinstance(caught.value.posterior, Posterior)
    assert any("No space left" in note for note in caught.value.__notes__)


def test_one_callback_needs_no_list() -> None:
    with pytest.raises(RuntimeError, match="stop"):
        pyrolora.fit(bert(), tokens(), epochs=1, callbacks=Interrupt(RuntimeError))


@pytest.mark.parametrize(
    ("labels", "warned"),
    [
        (lambda x: 2.0 + x, False),
        (lambda x: 2000 + 5 * x, True),
        (lambda x: 1e4 * x, True),
        (lambda x: 2.0 + 0 * x, True),
    ],
    ids=["near", "far", "wide", "constant"],
)
def test_labels_that_a_network_does_not_reach_are_told(labels: Any, warned: bool) -> None:
    data = (X, labels(torch.linspace(-2, 2, len(X))))
    options = {"task": "regression", "epochs": 1, "adapter": AdapterConfig(r=1)}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        pyrolora.fit(mlp(outputs=1), data, "map", **options)
    assert any("standardise them" in str(w.message) for w in found) == warned


def test_what_is_not_trained_is_not_told_where_it_may_not_get() -> None:
    network = mlp(outputs=1)
    with torch.no_grad():
        network[2].bias += 5000
        data = (X, network(X).flatten() + torch.linspace(-1, 1, len(X)))
    options = {"task": "regression", "epochs": 1, "adapter": AdapterConfig(r=1)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        given = pyrolora.fit(network, data, "map", **options)
        data[1][:] *= 300
        pyrolora.fit(given, data, "laplace", eval_data=data)


@pytest.mark.parametrize("seed", [-1, 2**70, 1.5, "0"])
def test_a_seed_that_no_generator_takes(seed: Any, posterior: Posterior) -> None:
    with pytest.raises(ConfigError, match="seed must be"):
        posterior.predict(tokens(4), 2, seed=seed)


def test_draws_of_something_else_have_no_factors(posterior: Posterior) -> None:
    with pytest.raises(ConfigError, match=r"have no site 'mixture_weights', they have \['x'\]"):
        posterior.factors({"x": torch.zeros(2)})


# Using a posterior --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def posterior() -> Iterator[Posterior]:
    torch.manual_seed(0)
    fitted = pyrolora.fit(bert(), reviews(8), tokenizer=tokenizer(), epochs=1, seed=0)
    yield fitted
    fitted.detach()


USES: dict[str, Callable[[Posterior, Any], Any]] = {
    "predict": lambda p, n: p.predict(reviews(4), num_samples=n),
    "evaluate": lambda p, n: p.evaluate(reviews(4), num_samples=n),
    "log_likelihood": lambda p, n: p.log_likelihood(reviews(4), num_samples=n),
    "sample": lambda p, n: p.sample(n),
    "to_arviz": lambda p, n: p.to_arviz(num_samples=n),
}


@pytest.mark.parametrize("count", [-1, 2.5, True, "4"])
@pytest.mark.parametrize("use", USES)
def test_the_number_of_draws_is_a_whole_number(use: str, count: Any, posterior: Posterior) -> None:
    with pytest.raises(ConfigError, match=f"num_samples must be.*{re.escape(repr(count))}"):
        USES[use](posterior, count)


@pytest.mark.parametrize("size", [0, -1, 2.5])
@pytest.mark.parametrize("use", ["predict", "evaluate", "log_likelihood"])
def test_the_batch_size_of_a_prediction_is_positive(
    use: str, size: Any, posterior: Posterior
) -> None:
    with pytest.raises(ConfigError, match=f"batch_size must be.*{size}"):
        getattr(posterior, use)(reviews(4), num_samples=1, batch_size=size)


@pytest.mark.parametrize("use", ["evaluate", "log_likelihood"])
def test_scores_need_labels(use: str, posterior: Posterior) -> None:
    data = reviews(4).remove_columns("label")
    with pytest.raises(DataError, match=r"no labels.*'label'"):
        getattr(posterior, use)(data, num_samples=1)


def test_the_pointwise_log_likelihood_needs_data(posterior: Posterior) -> None:
    with pytest.raises(ConfigError, match="log_likelihood=True needs data="):
        posterior.to_arviz(10, log_likelihood=True)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: reviews(4).select([]), "empty"),
        (list, "empty"),
        (lambda: [3.5], "dicts or texts, float"),
        (lambda: texts("good", None), "'text', missing"),
        (lambda: texts("good").remove_columns("label").add_column("label", [5]), "2 classes, 5"),
        (lambda: texts("good").add_column("labels", [5]), "two labels, 'label', 'labels'"),
    ],
)
def test_data_that_cannot_be_predicted(data: Any, words: str, posterior: Posterior) -> None:
    with pytest.raises(DataError) as caught:
        posterior.predict(data(), num_samples=1)
    assert_says(caught.value, words)


DETACHED: dict[str, Callable[[Posterior], Any]] = {
    "predict": lambda p: p.predict(tokens(4), num_samples=2),
    "evaluate": lambda p: p.evaluate(tokens(4), num_samples=2),
    "log_likelihood": lambda p: p.log_likelihood(tokens(4), num_samples=2),
    "to_arviz with data": lambda p: p.to_arviz(4, data=tokens(4)),
    "model": lambda p: p.model({n: torch.tensor(c) for n, c in tokens(4).to_dict().items()}),
}


@pytest.mark.parametrize("use", DETACHED)
def test_a_detached_posterior_says_how_to_get_it_back(use: str) -> None:
    fitted = pyrolora.fit(bert(), tokens(), guide="map", epochs=1)
    fitted.detach()
    with pytest.raises(BindingError, match=r"detached.*pyrolora\.load\(path, model\)"):
        DETACHED[use](fitted)


def test_a_data_frame_is_no_posterior_data(posterior: Posterior) -> None:
    with pytest.raises(DataError, match="got DataFrame"):
        posterior.predict(pd.DataFrame({"text": ["good"]}), num_samples=1)


@pytest.mark.parametrize("options", [{"kl_weight": 0.5}, {"kl_warmup": 0.1}])
def test_map_refuses_a_weight_for_a_prior_that_it_does_not_have(options) -> None:
    with pytest.raises(ConfigError, match="prior_scale"):
        guides.MAP(**options)
    guides.MAP(**options, prior_scale=1.0)


@pytest.mark.parametrize("option", [{"label_smoothing_factor": 0.1}, {"neftune_noise_alpha": 5.0}])
def test_trainer_options_that_the_elbo_cannot_use_are_refused(option, tmp_path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", **option)
    with pytest.raises(ConfigError, match=next(iter(option))):
        pyrolora.fit(bert(), tokens(), training=args)


def test_a_peft_model_one_text_and_an_impossible_interval_are_refused() -> None:
    import peft

    network = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ConfigError, match="LoraConfig"):
        pyrolora.fit(network, tokens())
    posterior = pyrolora.fit(bert(), tokens(), tokenizer=tokenizer(), epochs=1)
    with pytest.raises(DataError, match="as a list"):
        posterior.predict("a good film")
    for mass in (0.0, 1.0, 1.5):
        with pytest.raises(ConfigError, match="mass"):
            posterior.predict(tokens(), num_samples=2).interval(mass)
    with torch.no_grad(), pytest.raises(ConfigError, match="gradients"):
        pyrolora.fit(bert(), tokens())


def test_numpys_float64_features_are_taken() -> None:
    x = torch.randn(8, 4, dtype=torch.float64).numpy()
    posterior = pyrolora.fit(
        mlp(), (x, np.arange(8) % 3), task="classification",
        adapter=AdapterConfig(r=2), epochs=1,
    )  # fmt: skip
    assert posterior.predict((x,), num_samples=2).draws.shape == (2, 8, 3)

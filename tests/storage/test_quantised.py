"""Networks that transformers has quantised, by the libraries that do it on a CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from problems import arguments, llama
from torch import nn
from transformers import AutoModelForCausalLM

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import CheckpointError
from pyrolora.storage.dequantise import dequantised, quantised_modules

IDS = torch.randint(4, 16, (8, 6), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "attention_mask": [1] * 6, "labels": row} for row in IDS.tolist()]
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}


def nf4() -> Any:
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return transformers.BitsAndBytesConfig(load_in_4bit=True, **options)


def int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    llama(**SIZES, num_key_value_heads=4).save_pretrained(folder)
    return folder


def loaded(hosted: Path, how: Any = None) -> Any:
    options = {} if how is None else {"quantization_config": how}
    return AutoModelForCausalLM.from_pretrained(hosted, dtype=torch.float32, **options)


@pytest.fixture(scope="module", params=[nf4, int8])
def case(request: Any, hosted: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A network, a fit on it, and the folder of the fit."""
    library = "bitsandbytes" if request.param is nf4 else "torchao"
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed; `make verify` runs this with it")
    network = loaded(hosted, request.param())
    folder = tmp_path_factory.mktemp("fit")
    config = AdapterConfig(r=2, target_modules="all-linear")
    posterior = pyrolora.fit(network, ROWS, "montec", adapter=config, training=arguments(folder))
    posterior.save(folder / "saved")
    return request.param, posterior, folder / "saved"


def test_every_layer_learns_and_the_folder_alone_brings_it_back(case: Any) -> None:
    _, posterior, saved = case
    updates = posterior.bank.update_norms(posterior.model.program.mean())
    assert len(posterior.bank.specs) == 14
    assert (updates > 0).all()
    again = pyrolora.load(saved)
    assert type(again.base.config.quantization_config) is type(
        posterior.base.config.quantization_config
    )
    assert again.evaluate(ROWS, 2, seed=0) == posterior.evaluate(ROWS, 2, seed=0)
    texts = posterior.generate([[5, 6]], 2, max_new_tokens=2, seed=0)
    assert texts.log_likelihood.isfinite().all()


def test_a_network_that_was_saved_with_its_codes_comes_back_by_name(
    case: Any, hosted: Path, tmp_path: Path
) -> None:
    how, posterior, _ = case
    loaded(hosted, how()).save_pretrained(tmp_path / "codes")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "codes", dtype=torch.float32)
    config = AdapterConfig(r=2, target_modules="all-linear")
    training = arguments(tmp_path)
    fitted = pyrolora.fit(base, ROWS, "montec", adapter=config, training=training)
    assert fitted.evaluate(ROWS, 0) == posterior.evaluate(ROWS, 0)
    fitted.save(tmp_path / "saved")
    again = pyrolora.load(tmp_path / "saved")
    assert len(quantised_modules(again.base)) == 14
    assert again.evaluate(ROWS, 2, seed=0) == fitted.evaluate(ROWS, 2, seed=0)


def test_another_precision_is_a_warning_and_another_network_an_error(
    case: Any, hosted: Path
) -> None:
    _, posterior, saved = case
    with pytest.warns(UserWarning, match=r"14 layers have other numbers, by their rounding"):
        again = pyrolora.load(saved, loaded(hosted))
    plain, coded = (p.evaluate(ROWS, 0)["nll"] for p in (again, posterior))
    assert 0 < abs(plain - coded) < 0.05
    other = loaded(hosted)
    other.model.norm.weight.data.mul_(2)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is not the one"):
        pyrolora.load(saved, other)


def test_a_layer_of_it_is_the_plain_one_with_the_weight_that_it_computes_with(
    case: Any, hosted: Path
) -> None:
    how, posterior, _ = case
    network, plain = loaded(hosted, how()), loaded(hosted)
    modules = quantised_modules(network)
    assert len(modules) == 14
    x = torch.randn(5, 64)
    linear = [module for module in plain.modules() if isinstance(module, nn.Linear)]
    for layer, before in zip(modules, linear[:14], strict=True):
        found = dequantised(layer, torch.float32)
        torch.testing.assert_close(
            found(x), layer(x), rtol=0, atol=5e-3
        )  # its kernel's own rounding
        step = before.weight.abs().max() / (127 if how is int8 else 4)
        assert 0 < (found.weight - before.weight).abs().max() < step
    with torch.no_grad():
        merged = posterior.merge(dequantize=True)
        found = merged(IDS).logits
        expected = posterior.model.network(
            {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
            posterior.model.program.mean(),
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    assert not hasattr(merged.config, "quantization_config")
    assert not quantised_modules(merged)

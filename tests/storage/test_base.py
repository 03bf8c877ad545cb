"""The network of a posterior is the one that it was fitted on, or it is refused by name."""

from __future__ import annotations

import copy
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from problems import bert, bert_mlm, gpt2, llama, mask_tokenizer, reviews, tokenizer
from test_digest import coded
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    PreTrainedModel,
    SwinConfig,
)

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.adapters.new_weights import own_new_weights
from pyrolora.errors import CheckpointError
from pyrolora.storage import check_base, check_description, describe_base, load_base
from pyrolora.storage.configuration import differences, kept, restore

TEXTS = reviews(8).remove_columns("label")


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `llama()`."""
    folder = tmp_path_factory.mktemp("hosted")
    llama(hidden_size=32, initializer_range=0.3).save_pretrained(folder)
    return folder


def loaded(folder: Path, **changes: Any) -> LlamaForCausalLM:
    network: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(folder, **changes)
    return network


def fitted(network: nn.Module, **options: Any) -> Posterior:
    adapter = AdapterConfig(r=2, **options)
    settings: dict[str, Any] = {"epochs": 1, "seed": 0, "learning_rate": 0.05}
    return pyrolora.fit(network, TEXTS, "map", tokenizer=tokenizer(), adapter=adapter, **settings)


def nll(posterior: Posterior) -> float:
    return posterior.evaluate(TEXTS, 0)["nll"]


def described(network: nn.Module) -> dict[str, Any]:
    """The description as a file holds it."""
    description: dict[str, Any] = json.loads(
        json.dumps(describe_base(network, []), allow_nan=False)
    )
    check_description(description)
    return description


# Its weights --------------------------------------------------------------------------------------


def test_a_merged_network_is_not_what_its_first_name_loads(hosted: Path, tmp_path: Path) -> None:
    first = fitted(loaded(hosted))
    merged: Any = first.merge()
    second = fitted(merged)
    second.save(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"changed in memory.*save_pretrained.*model="):
        pyrolora.load(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"not the one that was adapted.*save_pretrained"):
        pyrolora.load(tmp_path / "run", hosted)
    merged.save_pretrained(tmp_path / "merged")
    assert nll(pyrolora.load(tmp_path / "run", tmp_path / "merged")) == nll(second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_number_that_was_changed_in_memory_is_seen(
    dtype: torch.dtype, hosted: Path, tmp_path: Path
) -> None:
    network = loaded(hosted, dtype=dtype)
    with torch.no_grad():
        network.model.norm.weight[3] *= 1.01
    fitted(network).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is not the one"):
        pyrolora.load(tmp_path)


def test_what_is_saved_is_the_network_of_the_fit_whatever_comes_after(
    hosted: Path, tmp_path: Path
) -> None:
    network = loaded(hosted)
    posterior = fitted(network)
    expected = nll(posterior)
    with torch.no_grad():
        network.model.norm.weight *= 2
    network.config.pad_token_id = 5
    network.half()
    posterior.save(tmp_path)
    again = pyrolora.load(tmp_path)
    assert nll(again) == expected
    assert again.base.config.pad_token_id == 0
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is not the one"):
        pyrolora.load(tmp_path, network)


@pytest.mark.parametrize(
    ("fit_in", "load_in"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_a_copy_in_another_precision_is_the_same_network(
    fit_in: torch.dtype, load_in: torch.dtype, hosted: Path, tmp_path: Path
) -> None:
    posterior = fitted(loaded(hosted, dtype=fit_in))
    posterior.save(tmp_path)
    again = pyrolora.load(tmp_path, loaded(hosted, dtype=fit_in).to(load_in))
    assert nll(again) == pytest.approx(nll(posterior), abs=0.02)


def test_running_statistics_belong_to_the_network() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    description = described(network())
    check_base(network(), [], description)
    other = network()
    other(torch.randn(5, 4))
    with pytest.raises(CheckpointError, match=r"'1.running_mean' is not the one"):
        check_base(other, [], description)


def test_an_offloaded_network_is_the_same() -> None:
    description = described(bert())
    network = cpu_offload(bert())
    assert network.get_parameter("classifier.weight").is_meta
    assert describe_base(network, [])["weights"] == description["weights"]
    check_base(network, [], description)
    with pytest.raises(CheckpointError, match="is not the one"):
        check_base(cpu_offload(bert(seed=1)), [], description)


def test_another_class_with_the_same_weights_is_another_network() -> None:
    class Louder(BertForSequenceClassification):
        pass

    with pytest.raises(CheckpointError, match=r"is a Louder; .*fitted on a BertForSequence"):
        check_base(Louder(bert().config), ["bert", "classifier"], described_without_weights())


def described_without_weights() -> dict[str, Any]:
    return describe_base(bert(), [], weights=False)


def test_a_quantised_network_is_no_plain_one() -> None:
    description = described(coded())
    check_base(coded(), [], description)
    plain = nn.Linear(4, 4, bias=False)
    for network, other in ((plain, coded()), (coded(), plain)):  # nothing says it is the same
        with pytest.raises(CheckpointError, match=r"quantised layers of this Linear.*no other we"):
            check_base(network, [], described(other))
    with pytest.raises(CheckpointError, match=r"'weight.codes' is not the one"):
        check_base(coded(1), [], description)


def test_a_network_in_another_precision_is_known_by_its_other_weights() -> None:
    def network(first: nn.Module, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(first, nn.Linear(4, 3))

    plain = nn.Linear(4, 4, bias=False)
    for fitted_on, here in ((coded(), plain), (plain, coded())):
        description = described(network(fitted_on))
        with pytest.warns(UserWarning, match=r"codes int8.*1 layers have other.*2 other weights"):
            check_base(network(here), [], description)
        with pytest.raises(CheckpointError, match=r"'1.bias' is not the one that was adapted"):
            check_base(network(here, 1), [], description)
    with pytest.raises(CheckpointError, match=r"'0.weight.codes' is not the one"):
        check_base(network(coded(1)), [], described(network(coded())))


def test_a_network_without_a_name_is_told_at_save(
    hosted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitted(loaded(hosted)).save(tmp_path / "named")
    assert not caplog.records
    posterior = fitted(llama())
    posterior.save(tmp_path / "built")
    assert "LlamaForCausalLM, has no hub id or folder to come back from" in caplog.text
    posterior.base.save_pretrained(tmp_path / "network")  # as it says
    assert nll(pyrolora.load(tmp_path / "built", tmp_path / "network")) == nll(posterior)


class Repacked(nn.Linear):
    """Changes its weight when its state is asked for, as bitsandbytes' 4-bit layer does."""

    def _save_to_state_dict(self, *args: Any) -> None:
        self.weight.data.mul_(2)
        super()._save_to_state_dict(*args)


def test_saving_does_not_ask_the_network_for_its_state() -> None:
    network = nn.Sequential(nn.Linear(4, 4), Repacked(4, 3))
    rows = (torch.randn(8, 4), torch.arange(8) % 3)
    options: dict[str, Any] = {"task": "classification", "epochs": 1}
    posterior = pyrolora.fit(network, rows, "map", adapter=AdapterConfig(r=2), **options)
    before = posterior.predict(rows, 0).probs
    state = posterior.model.own_state()
    assert torch.equal(posterior.predict(rows, 0).probs, before)
    assert not any(name.startswith("base.") for name in state)


# Its configuration --------------------------------------------------------------------------------

OVERRIDES: dict[str, Any] = {
    "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "rms_norm_eps": 0.5,
    "hidden_act": "gelu",
    "num_hidden_layers": 1,
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override_comes_back_and_a_network_without_it_is_refused(
    name: str, hosted: Path, tmp_path: Path
) -> None:
    posterior = fitted(loaded(hosted, **{name: OVERRIDES[name]}))
    posterior.save(tmp_path)
    again = pyrolora.load(tmp_path)
    assert getattr(again.base.config, name) == OVERRIDES[name]
    assert nll(again) == nll(posterior)
    assert nll(pyrolora.load(tmp_path, hosted)) == nll(posterior)
    words = "weights" if name == "num_hidden_layers" else name
    with pytest.raises(CheckpointError, match=words):
        pyrolora.load(tmp_path, loaded(hosted))


def test_what_does_not_change_the_function_is_let_through(hosted: Path) -> None:
    description = described(loaded(hosted))
    network = loaded(hosted, attn_implementation="eager", attention_dropout=0.3)
    network.config.use_cache = False
    network.config.output_attentions = True
    network.config.id2label = {0: "no", 1: "yes"}
    network.config.problem_type = "regression"
    network.config.architectures = ["Other"]
    check_base(network, [], description)


def test_a_name_that_is_not_known_counts(hosted: Path) -> None:
    network = loaded(hosted)
    network.config.attention_sink = 4
    with pytest.raises(CheckpointError, match=r"attention_sink=4.*fitted with None"):
        check_base(network, [], described(loaded(hosted)))
    with pytest.raises(CheckpointError, match=r"attention_sink=None.*fitted with 4"):
        check_base(loaded(hosted), [], described(network))


def test_nested_configurations_are_kept_compared_and_set() -> None:
    text = {"model_type": "llama", "num_hidden_layers": 2, "rms_norm_eps": 1e-6}
    ours, theirs = (
        LlavaConfig(vision_config={"model_type": "clip_vision_model"}, text_config=text)
        for _ in range(2)
    )
    ours.text_config.rms_norm_eps = 0.25
    ours.text_config.rope_parameters = OVERRIDES["rope_parameters"]
    ours.vision_config.num_hidden_layers = 3
    saved = json.loads(json.dumps(kept(ours)))
    assert {name for name, *_ in differences(theirs, saved)} == {
        "text_config.rms_norm_eps",
        "text_config.rope_parameters.factor",
        "text_config.rope_parameters.rope_type",
        "vision_config.num_hidden_layers",
    }
    assert restore(theirs, saved, most=64)
    assert not list(differences(theirs, saved))


@pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id"])
def test_tokens_that_the_function_does_not_read_may_differ(name: str) -> None:
    """As people set them after loading; a classifier reads the padding token."""
    network = llama()
    saved = describe_base(network, [])
    other = copy.deepcopy(network)
    setattr(other.config, name, 7)
    check_base(other, [], saved)
    config = LlamaConfig(**llama().config.to_diff_dict() | {"pad_token_id": 0})
    classifier = LlamaForSequenceClassification(config)
    saved = describe_base(classifier, ["score"])
    setattr(classifier.config, name, 7)
    with pytest.raises(CheckpointError, match=f"{name}=7"):
        check_base(classifier, ["score"], saved)


# New weights --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_pooler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier's base without a pooler: a masked language model."""
    folder = tmp_path_factory.mktemp("mlm")
    bert_mlm().save_pretrained(folder)
    mask_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("change", [copy.deepcopy, lambda network: network])
def test_weights_that_are_tied_are_not_new(without_pooler: Path, change: Any) -> None:
    """A checkpoint has them under one name, and copies have lost the marks of transformers."""
    network = BertForMaskedLM.from_pretrained(without_pooler)
    assert own_new_weights(change(network), []) == []


def test_new_weights_belong_to_the_posterior(without_pooler: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 2, "learning_rate": 0.05, "output_dir": tmp_path}
    adapter = AdapterConfig(r=2, target_modules="all-linear")
    with pytest.warns(RuntimeWarning, match=r"new weights in bert\.pooler: not in the checkpoint"):
        posterior = pyrolora.fit(str(without_pooler), reviews(8), "map", adapter=adapter, **options)
    assert list(posterior.model.attachment.heads) == ["classifier", "bert.pooler"]
    assert not any("pooler" in name for name in posterior.bank.specs)
    own = posterior.model.named_heads()["bert.pooler"][0].get_parameter("dense.weight")
    drawn = posterior.base.get_parameter("bert.pooler.base_layer.dense.weight")
    assert not torch.equal(own, drawn)  # it was trained
    expected = posterior.predict(reviews(4), 0).probs
    for model in (None, without_pooler):
        assert torch.equal(pyrolora.load(tmp_path, model).predict(reviews(4), 0).probs, expected)
    merged: Any = posterior.merge()
    assert torch.equal(merged.bert.pooler.dense.weight, own)


def test_new_weights_are_known_by_the_checkpoint_too(without_pooler: Path) -> None:
    """A copy has lost the marks that transformers set, as a network on another device has."""
    loaded = AutoModelForSequenceClassification.from_pretrained(without_pooler)
    network = copy.deepcopy(loaded)
    with pytest.warns(RuntimeWarning, match=r"new weights in bert\.pooler"):
        assert own_new_weights(network, ["classifier"]) == ["bert.pooler"]
    network.config._name_or_path = "nowhere"
    assert own_new_weights(network, ["classifier"]) == []


@pytest.mark.parametrize("make", [bert_mlm, lambda: gpt2(tie_word_embeddings=True)])
def test_a_tied_weight_is_read_under_another_name(make: Callable[[], Any], tmp_path: Path) -> None:
    """The checkpoint has the weight once, and a copy of the network has lost the marks."""
    make().save_pretrained(tmp_path)
    loaded = type(make()).from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert own_new_weights(loaded, []) == own_new_weights(copy.deepcopy(loaded), []) == []


def test_new_weights_that_an_adapter_does_not_have_belong_to_its_posterior(
    without_pooler: Path, tmp_path: Path
) -> None:
    config = {"vocab_size": 17, "initializer_range": 0.3}
    fit_options: dict[str, Any] = {"tokenizer": mask_tokenizer(), "epochs": 1}
    pyrolora.fit(bert(**config), reviews(8), "map", **fit_options).to_peft(tmp_path / "adapter")
    network = AutoModelForSequenceClassification.from_pretrained(without_pooler)
    with pytest.warns(RuntimeWarning, match=r"new weights in bert\.pooler"):
        posterior = pyrolora.from_peft(tmp_path / "adapter", network, tokenizer=mask_tokenizer())
    posterior.save(tmp_path / "run")
    again = pyrolora.load(tmp_path / "run")
    expected = posterior.predict(reviews(4), 0).probs
    assert torch.equal(again.predict(reviews(4), 0).probs, expected)


@pytest.mark.parametrize("network", [bert, lambda: copy.deepcopy(bert())])
def test_a_network_that_was_not_loaded_has_no_new_weights(network: Callable[[], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = pyrolora.fit(network(), reviews(4), "map", tokenizer=tokenizer(), epochs=1)
    assert list(posterior.model.attachment.heads) == ["classifier"]


# A file chooses no code ---------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import LlamaForCausalLM
Path({marker!r}).touch()
class Planted(LlamaForCausalLM):
    pass
"""


class Pickled:
    """Touches a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A folder with a network, and with code that its configuration names."""
    folder = tmp_path / "planted"
    llama().save_pretrained(folder)
    (folder / "planted.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["auto_map"] = {
        "AutoModelForCausalLM": "planted.Planted",
        "AutoConfig": "planted.Config",
    }
    file.write_text(json.dumps(config))
    return folder


def test_code_beside_the_network_does_not_run(planted: Path, tmp_path: Path) -> None:
    description = {**described(llama()), "name_or_path": str(planted)}
    network = load_base(description)
    assert type(network) is LlamaForCausalLM
    for kind in ("Planted", "pipeline", "AutoModel", "PreTrainedModel", "torch", "__import__"):
        with pytest.raises(CheckpointError, match=f"a {kind}, is no class"):
            load_base({**description, "class": kind})
    assert not (tmp_path / "marker").exists()


def test_code_runs_where_the_call_says_so(planted: Path, tmp_path: Path) -> None:
    file = planted / "config.json"
    config = json.loads(file.read_text())
    config["auto_map"].pop("AutoConfig")
    file.write_text(json.dumps(config))
    description = {**described(llama()), "class": "Planted"}
    network = load_base(description, str(planted), trust_remote_code=True)
    assert type(network).__name__ == "Planted"
    assert (tmp_path / "marker").exists()


def test_a_pickle_beside_the_network_is_not_read(planted: Path, tmp_path: Path) -> None:
    (planted / "model.safetensors").unlink()
    (planted / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled(tmp_path / "marker")))
    description = {**described(llama()), "name_or_path": str(planted)}
    for name in (None, str(planted)):
        with pytest.raises(CheckpointError, match=r"cannot load the posterior's network"):
            load_base(description, name)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "config.json", "model.safetensors"])
def test_a_folder_with_more_or_other_than_files_is_not_read(name: str, planted: Path) -> None:
    (planted / name).unlink(missing_ok=True)
    if name == "adapter_config.json":
        (planted / name).write_text('{"peft_type": "LORA"}')
    else:
        os.mkfifo(planted / name)  # a reader would wait for ever
    with pytest.raises(CheckpointError, match=f"no plain network: it has, or names, '{name}'"):
        load_base({**described(llama()), "name_or_path": str(planted)})


@pytest.mark.parametrize("shard", ["inside/pipe.safetensors", "../pipe.safetensors", "weights.bin"])
def test_weights_elsewhere_are_not_read(shard: str, planted: Path) -> None:
    (planted / "model.safetensors").unlink()
    (planted / "inside").mkdir()
    if shard == "weights.bin":
        torch.save(llama().state_dict(), planted / shard)
    else:
        os.mkfifo(planted / shard)  # a reader would wait for ever
    index = {"metadata": {}, "weight_map": dict.fromkeys(llama().state_dict(), shard)}
    (planted / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"no plain network: it has, or names, '{shard}'"):
        load_base({**described(llama()), "name_or_path": str(planted)})


def test_weights_in_several_files_are_read(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    load_base({**described(llama()), "name_or_path": str(tmp_path)})


def test_a_file_in_the_place_of_a_folder_is_not_read(planted: Path) -> None:
    file = planted / "config.json"  # transformers would read the weights from it, as a pickle
    with pytest.raises(CheckpointError, match="is no folder"):
        load_base({**described(llama()), "name_or_path": str(file)})


def test_the_layers_of_several_stages_are_counted_together() -> None:
    config = SwinConfig(depths=[2, 2, 6, 2])
    saved = {**kept(config), "depths": [60] * 3000}  # each is few
    with pytest.raises(CheckpointError, match="more than the 64 that"):
        restore(config, saved, most=64)
    assert restore(config, {**saved, "depths": [2, 2, 18, 2]}, most=64)
    assert config.depths == [2, 2, 18, 2]


def test_a_relative_name_is_looked_for_where_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama().save_pretrained(tmp_path / "network")
    monkeypatch.chdir(tmp_path)
    description = described(LlamaForCausalLM.from_pretrained("./network"))
    load_base(description)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"no such folder in .*other"):
        load_base(description)


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", None])
def test_a_folder_that_is_quantised_otherwise_than_the_network_is_refused(
    method: str | None, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    settings = {"quantization_config": {"quant_method": method}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    description = {**described(llama()), "name_or_path": str(tmp_path)}
    with pytest.raises(CheckpointError, match=f"quantised by '{method}', and the posterior's is"):
        load_base(description)


CHOICES: dict[str, Any] = {
    "trust_remote_code": True,
    "auto_map": {"AutoModelForCausalLM": "planted.Planted"},
    "attn_implementation": "somebody/kernel",
    "_attn_implementation": "somebody/kernel",
    "_attn_implementation_internal": "somebody/kernel",
    "experts_implementation": "somebody/kernel",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "custom_pipelines": {"x": {"impl": "planted.Planted"}},
    "_name_or_path": "somebody/else",
    "weights_only": False,
    "use_safetensors": False,
    "gguf_file": "planted.gguf",
    "subfolder": "..",
    "device_map": "auto",
    "state_dict": {},
    "transformers_weights": "planted.bin",
    "torchscript": True,
    "backbone": "hf_hub:somebody/else",
    "model_type": "bert",
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_saved_configuration_chooses_nothing(name: str, planted: Path, tmp_path: Path) -> None:
    file = planted / "config.json"
    config = {**json.loads(file.read_text()), "attn_implementation": "somebody/kernel"}
    file.write_text(json.dumps(config))
    description = {**described(llama()), "name_or_path": str(planted)}
    plain: PreTrainedModel = load_base(description)
    description["config"] = {**description["config"], name: CHOICES[name]}
    check_description(description)
    network = load_base(description)
    assert network.config.to_dict() == plain.config.to_dict()
    assert network.config._attn_implementation in ("sdpa", "eager")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000, more than the"),
        ("hidden_act", "https://somewhere", "hidden_act='https://somewhere'"),
        ("hidden_act", ["silu"], "hidden_act="),
        ("rms_norm_eps", "1e-5", "rms_norm_eps='1e-5'"),
        ("rope_parameters", {"rope_type": "linear", "path": "x"}, "rope_parameters="),
        ("vocab_size", 10**7, "twice as large"),
        ("hidden_size", 10**12, "cannot load|twice as large"),
        ("rope_parameters", {"rope_type": "unknown"}, "cannot load"),
        ("rope_parameters", {"rope_type": "linear", "factor": "many"}, "cannot load"),
    ],
    ids=str,
)
def test_a_saved_value_that_no_configuration_has(
    name: str, value: Any, words: str, hosted: Path
) -> None:
    description = described(loaded(hosted))
    description["config"][name] = value
    with pytest.raises(CheckpointError, match=words):
        load_base(description)

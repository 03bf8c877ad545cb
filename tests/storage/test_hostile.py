"""Folders that somebody prepared: digests computed again, other kinds of files, planted code."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import resource
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import bert, llama, reviews, tokenizer, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

import pyrolora
from pyrolora import AdapterConfig, guides
from pyrolora.errors import CheckpointError
from pyrolora.storage import digest_of

META = "posterior.json"
GUIDES = {
    "montec": guides.MonteCLoRA(covariance="full", learn_sample_scale=True),
    "meanfield": guides.MeanField(),
    "laplace": guides.Laplace(prior_scale=1.0),
    "ensemble": guides.Ensemble(members=2),
    "swag": guides.SWAG(rank=2, snapshots=2),
    "nuts": guides.NUTS(chains=1, num_samples=4, warmup_steps=2, max_tree_depth=1),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved posterior per guide, that of montec with a tokenizer, and an adapter of PEFT's."""
    root = tmp_path_factory.mktemp("hostile")
    network = bert()
    for name, guide in GUIDES.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the chains of NUTS do not agree")
            posterior = pyrolora.fit(
                network,
                reviews(8) if name == "montec" else tokens(8),
                guide=guide,
                tokenizer=tokenizer() if name == "montec" else None,
                adapter=AdapterConfig(r=2),
                epochs=2,
                batch_size=4,
                seed=0,
            )
        posterior.save(root / name)
        if name == "meanfield":
            posterior.to_peft(root / "peft")
        posterior.detach()
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(originals[name], tmp_path / name))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the description and compute every digest again."""
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    meta["sha256"] = hashlib.sha256((folder / meta["state_file"]).read_bytes()).hexdigest()
    if meta["tokenizer"] is not None:
        top = folder / meta["tokenizer"]
        meta["tokenizer_files"] = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in top.iterdir()
        }
    change(meta)
    meta["digest"] = digest_of(meta)
    (folder / META).write_text(json.dumps(meta), encoding="utf-8")


def set_tensor(folder: Path, suffix: str, change: Callable[[Tensor], Tensor]) -> None:
    file = next(folder.glob("*.safetensors"))
    state = load_file(file)
    name = next(name for name in state if name.endswith(suffix))
    state[name] = change(state[name])
    save_file(state, file, {"format": "pt"})
    if (folder / META).exists():
        edit(folder, lambda meta: None)


def refused(folder: Path, words: str = ".", read: Any = pyrolora.load) -> None:
    """A `CheckpointError`, and the network as it was, in the mode that it was in."""
    network = bert().train()
    network.classifier.eval()
    before = [(name, type(m), m.training) for name, m in network.named_modules()]
    flags = [p.requires_grad for p in network.parameters()]
    with pytest.raises(CheckpointError, match=words):
        read(folder, network)
    assert [(name, type(m), m.training) for name, m in network.named_modules()] == before
    assert [p.requires_grad for p in network.parameters()] == flags


@pytest.mark.parametrize("name", [*GUIDES, "peft"])
def test_the_copies_load(name: str, copy: Any) -> None:
    read = pyrolora.from_peft if name == "peft" else pyrolora.load
    assert read(copy(name), bert()).predict(tokens(4), 2).probs.shape[0] == 4


# The description ----------------------------------------------------------------------------------


def test_one_changed_value_of_the_description_is_told(copy: Any) -> None:
    folder = copy("montec")
    content = (folder / META).read_text(encoding="utf-8")
    changed = content.replace('"sample_scale": ', '"sample_scale": 1')
    assert changed != content
    (folder / META).write_text(changed, encoding="utf-8")
    refused(folder, "its digest differs")


SIZES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "components": ("montec", lambda m: m["guide"]["options"].update(num_components=10**9)),
    "members": ("ensemble", lambda m: m["guide"]["options"].update(members=10**9)),
    "draws": ("nuts", lambda m: m["guide"]["options"].update(num_samples=10**10)),
    "snapshots": ("swag", lambda m: m["guide"]["options"].update(rank=10**9, snapshots=10**9)),
    "a rank": ("meanfield", lambda m: m["layers"][0].update(rank=10**9)),
    "features": ("laplace", lambda m: m["layers"][0].update(in_features=10**9)),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_size_is_compared_before_anything_is_allocated(case: str, copy: Any) -> None:
    name, change = SIZES[case]
    folder = copy(name)
    edit(folder, change)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # KiB


VALUES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an unknown entry": lambda m: m.update(trust_remote_code=True),
    "an unknown option": lambda m: m["guide"]["options"].update(weights_only=False),
    "an option that is missing": lambda m: m["guide"]["options"].pop("sample_scale"),
    "an unknown option of a layer": lambda m: m["layers"][0].update(x=1),
    "an option of the adapter of another type": lambda m: m["adapter"].update(r="8"),
    "a pattern of another type": lambda m: m["adapter"].update(rank_pattern={"a": "b"}),
    "a guide around guides": lambda m: m["guide"].update(name="flat+" * 400 + "map"),
    "a folder outside": lambda m: m.update(state_file=".."),
    "a path": lambda m: m.update(tokenizer="/etc"),
    "a name without an encoding": lambda m: m.update(classes=["\ud800"]),
    "a name without an end": lambda m: m.update(classes=["a" * 10**6]),
    "a layer twice": lambda m: m["layers"].append(m["layers"][0]),
    "true for one": lambda m: m.update(num_examples=True),
    "a deep history": lambda m: m.update(history=[{"a": json.loads("[" * 50 + "]" * 50)}]),
    "a history in words": lambda m: m.update(history=[{"elbo": "high", "step": 1}]),
    "a history without steps": lambda m: m.update(history=[{"elbo": 1.0}]),
    "a number beyond all": lambda m: m["settings"].update(seed=10**100),
    "settings of settings": lambda m: m["settings"].update(seed={"a": {}}),
    "a scaling of another type": lambda m: m["layers"][0].update(scaling=True),
    "another likelihood": lambda m: m.update(task="causal lm"),
    "a prior that is none": lambda m: m.update(prior={"name": "map", "options": {}}),
}


@pytest.mark.parametrize("case", VALUES)
def test_a_value_that_no_save_writes(case: str, copy: Any) -> None:
    folder = copy("montec")
    edit(folder, VALUES[case])
    refused(folder, "restore it from a copy")


@pytest.mark.parametrize("depth", [30, 200, 300, 450, 900, 990, 5000])
@pytest.mark.parametrize("name", ["montec", "peft"])
def test_nests_of_every_depth(name: str, depth: int, copy: Any) -> None:
    """One limit is the parser's, another that of what walks through the value."""
    folder = copy(name)
    file = folder / ("adapter_config.json" if name == "peft" else META)
    text = file.read_text(encoding="utf-8").rstrip().rstrip("}")
    nest = '{"a":' * depth + "1" + "}" * depth
    file.write_text(f'{text}, "unknown": {nest}}}', encoding="utf-8")
    network = bert()
    with pytest.raises(pyrolora.PyroLoraError):
        (pyrolora.from_peft if name == "peft" else pyrolora.load)(folder, network)


def test_classes_are_taken(copy: Any) -> None:
    folder = copy("montec")
    edit(folder, lambda meta: meta.update(classes=["good", "bad"]))
    assert pyrolora.load(folder, bert()).options.name == "montec"


def test_a_number_of_the_history_that_was_not_finite_is_nan_again(copy: Any) -> None:
    folder = copy("montec")
    edit(folder, lambda meta: meta.update(history=[{"elbo": None, "step": 1, "mine": None}]))
    (entry,) = pyrolora.load(folder, bert()).history
    assert math.isnan(entry["elbo"])
    assert entry["mine"] is None


# The tensors --------------------------------------------------------------------------------------


def _first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


TENSORS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "one NaN": ("montec", "B_loc", _first(float("nan"))),
    "one infinity": ("montec", "A_loc", _first(float("inf"))),
    "a NaN in the head": ("montec", "classifier.weight", _first(float("nan"))),
    "an infinite scale": ("meanfield", "A_scale", _first(200.0)),
    "a scale of zero": ("meanfield", "A_scale", _first(-200.0)),
    "an infinite factor": ("montec", "scale_tril", _first(200.0)),
    "a negative eigenvalue": ("laplace", "values_A_0", _first(-1.0)),
    "eigenvectors that are none": ("laplace", "rows_A_0", lambda t: t + 0.5),
    "a negative precision": ("laplace", "precision", lambda t: -t),
    "a negative variance": ("swag", "variance", _first(-1.0)),
    "draws that are none": ("nuts", "diverging", _first(2.0)),
    "double precision": ("montec", "A_loc", Tensor.double),
    "whole numbers": ("montec", "A_loc", Tensor.long),
    "NaN in PEFT's B": ("peft", "lora_B.weight", _first(float("nan"))),
    "whole numbers in PEFT's A": ("peft", "lora_A.weight", Tensor.long),
    "infinity in PEFT's head": ("peft", "classifier.bias", _first(float("-inf"))),
    "beyond float32": ("peft", "lora_A.weight", lambda t: _first(1e300)(t.double())),
}


@pytest.mark.parametrize("case", TENSORS)
def test_values_that_a_parameter_cannot_have(case: str, copy: Any) -> None:
    name, suffix, change = TENSORS[case]
    folder = copy(name)
    set_tensor(folder, suffix, change)
    refused(folder, read=pyrolora.from_peft if name == "peft" else pyrolora.load)


def test_numbers_that_are_too_large_together_are_told_by_predict(copy: Any) -> None:
    folder = copy("montec")
    set_tensor(folder, "B_loc", lambda tensor: tensor.fill_(1e38))
    posterior = pyrolora.load(folder, bert())
    with pytest.raises(pyrolora.PyroLoraError, match="NaN or infinity"):
        posterior.predict(tokens(4), 2)


# The tokenizer ------------------------------------------------------------------------------------


def words_of(folder: Path) -> Path:
    return next(folder.glob("tokenizer-*"))


def test_one_bit_of_the_tokenizer_is_told(copy: Any) -> None:
    folder = copy("montec")
    file = words_of(folder) / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b'"good"', b'"gooc"', 1))
    refused(folder, "SHA-256")


@pytest.mark.parametrize("planted", ["evil.py", "vocab.pkl", "config.json", "tokenizer.txt"])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_file_more(planted: str, sealed: bool, copy: Any) -> None:
    folder = copy("montec")
    (words_of(folder) / planted).write_bytes(pickle.dumps({}))
    if sealed:
        edit(folder, lambda meta: None)
    refused(folder, planted)


def test_a_file_less(copy: Any) -> None:
    folder = copy("montec")
    (words_of(folder) / "tokenizer_config.json").unlink()
    refused(folder, "has no 'tokenizer_config.json'")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "code": ({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, "trust_remote_code=True"),
    "a class that is none": ({"tokenizer_class": "BertModel"}, "'BertModel'"),
    "an unknown class": ({"tokenizer_class": "Evil"}, "'Evil'"),
    "a class of another type": ({"tokenizer_class": 3}, "no tokenizer"),
    "no class": ({"tokenizer_class": None}, "no tokenizer"),
    "another file": ({"vocab_file": "/etc/passwd"}, "vocab_file"),
    "other files": ({"init_inputs": ["/etc/passwd"]}, "init_inputs"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_chooses_neither_code_nor_files(
    case: str, copy: Any, tmp_path: Path
) -> None:
    changes, words = CONFIGS[case]
    folder = copy("montec")
    file = words_of(folder) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    marker = tmp_path / "ran"
    if case == "code":
        (words_of(folder) / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    edit(folder, lambda meta: None)
    refused(folder, words)
    assert not marker.exists()


def test_a_save_forgets_what_the_tokenizer_was_loaded_from(tmp_path: Path) -> None:
    """transformers keeps such entries of a configuration, and the folder has to load again."""
    words = tokenizer()
    words.init_kwargs |= {"auto_map": {"AutoTokenizer": ["a.B", None]}, "merges_file": "/x"}
    posterior = pyrolora.fit(bert(), reviews(8), guide="map", tokenizer=words, epochs=1)
    posterior.save(tmp_path)
    assert pyrolora.load(tmp_path, bert()).tokenizer("a good film") == words("a good film")


def test_a_tokenizer_that_was_tampered_with_is_replaced_by_a_save(copy: Any) -> None:
    folder = copy("montec")
    posterior = pyrolora.load(folder, bert())
    posterior.save(folder)
    (words_of(folder) / "tokenizer.json").write_text("{}")
    posterior.save(folder)
    assert pyrolora.load(folder, bert()).tokenizer is not None


# Kinds of files -----------------------------------------------------------------------------------


def _pipe(file: Path) -> None:
    os.mkfifo(file)


PLANTED: dict[str, Callable[[Path], None]] = {
    "pipe": _pipe,
    "device": lambda file: file.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "link to nothing": lambda file: file.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("what", [META, "adapters-*", "tokenizer-*/tokenizer.json"])
def test_a_name_that_is_no_file(kind: str, what: str, copy: Any) -> None:
    folder = copy("montec")
    file = next(folder.glob(what))
    file.unlink()
    PLANTED[kind](file)
    refused(folder)


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("what", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_name_that_is_no_file_of_an_adapter(kind: str, what: str, copy: Any) -> None:
    folder = copy("peft")
    (folder / what).unlink()
    PLANTED[kind](folder / what)
    refused(folder, read=pyrolora.from_peft)


def test_links_to_files_are_read(copy: Any, tmp_path: Path) -> None:
    """The hub's cache is made of them."""
    folder = copy("montec")
    for i, file in enumerate(f for f in folder.rglob("*") if f.is_file()):
        blob = file.rename(tmp_path / f"blob{i}")
        file.symlink_to(blob)
    assert pyrolora.load(folder, bert()).tokenizer is not None


def test_a_save_follows_no_link(copy: Any, tmp_path: Path) -> None:
    folder = copy("montec")
    posterior = pyrolora.load(folder, bert())
    posterior.save(folder)
    victim = tmp_path / "victim"
    (victim / "sub").mkdir(parents=True)
    (victim / "file").write_text("mine")
    for file in [folder / META, next(folder.glob("adapters-*"))]:
        file.unlink()
        file.symlink_to(victim / "file")
    shutil.rmtree(words_of(folder))
    (folder / json.loads(_meta_of(posterior, tmp_path))["tokenizer"]).symlink_to(victim / "sub")
    posterior.save(folder)
    assert (victim / "file").read_text() == "mine"
    assert not any((victim / "sub").iterdir())
    assert pyrolora.load(folder, bert()).tokenizer is not None


def _meta_of(posterior: Any, tmp_path: Path) -> str:
    posterior.save(tmp_path / "fresh")
    return (tmp_path / "fresh" / META).read_text(encoding="utf-8")


# PEFT's patterns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "(.*)*x"},
        {"exclude_modules": "(a|a)*(.*)*x"},
        {"alpha_pattern": {"(.*)*x": 4}},
        {"rank_pattern": {"(.*.*.*.*.*.*.*.*)x": 2}},
        {"rank_pattern": {"a": "2"}},
        {"modules_to_save": ["(.*)*x"]},
        {"r": 10**12},
        {"r": True},
        {"target_modules": {"a": 1}},
        {"lora_alpha": None},
        {"use_rslora": "yes"},
    ],
    ids=str,
)
def test_options_of_an_adapter_are_bounded(changes: dict[str, Any], copy: Any) -> None:
    """At once: an error, or the adapter as it is, where a pattern matches nothing."""
    folder = copy("peft")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    try:
        pyrolora.from_peft(folder, bert()).predict(tokens(4), 0)
    except pyrolora.PyroLoraError:
        return
    assert next(iter(changes)).endswith(("pattern", "modules"))


def test_a_pickle_is_never_read(copy: Any, tmp_path: Path) -> None:
    folder = copy("peft")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, "a pickle", read=pyrolora.from_peft)


def test_code_beside_a_named_model_is_run_on_request_alone(copy: Any, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    model = tmp_path / "model"
    llama().save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(pyrolora.PyroLoraError):
        pyrolora.from_peft(copy("peft"), str(model))
    assert not marker.exists()


def test_a_flag_that_is_no_flag(copy: Any) -> None:
    with pytest.raises(pyrolora.PyroLoraError, match="trust_remote_code must be True or False"):
        pyrolora.load(copy("montec"), bert(), trust_remote_code="no")  # type: ignore[arg-type]
    assert torch.is_grad_enabled()

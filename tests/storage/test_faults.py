"""Damaged, edited and foreign posteriors: a helpful error, and the network as it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import bert, llama, mlp, reviews, tokenizer, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pyrolora
from pyrolora import AdapterConfig, Posterior, PyroLoraError
from pyrolora.errors import CheckpointError, ConfigError
from pyrolora.storage import digest_of

META = "posterior.json"


def named(folder: Path, key: str) -> Path:
    """The file or folder that the description names: ``state_file`` or ``tokenizer``."""
    return folder / json.loads((folder / META).read_text(encoding="utf-8"))[key]


def state_of(folder: Path) -> Path:
    return named(folder, "state_file")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole saved posterior of `bert()`, with a tokenizer."""
    folder = tmp_path_factory.mktemp("original") / "run"
    posterior = pyrolora.fit(
        bert(),
        reviews(8),
        tokenizer=tokenizer(),
        adapter=AdapterConfig(r=2),
        epochs=1,
        seed=0,
    )
    posterior.save(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "run"))


def refused(folder: Path, network: nn.Module | None, words: list[str]) -> PyroLoraError:
    """Load and expect an error of ours whose message holds ``words``, and a clean network."""
    network = bert() if network is None else network
    first = next(network.parameters())
    first.requires_grad_(False)
    kinds = [(name, type(module)) for name, module in network.named_modules()]
    flags = [(name, p.requires_grad) for name, p in network.named_parameters()]
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(PyroLoraError) as caught:
        pyrolora.load(folder, network)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"
    assert [(name, type(module)) for name, module in network.named_modules()] == kinds
    assert [(name, p.requires_grad) for name, p in network.named_parameters()] == flags
    assert all(torch.equal(network.state_dict()[name], t) for name, t in weights.items())
    return caught.value


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], *, seal: bool = True) -> None:
    """Change the description in place, or replace it by what ``change`` returns; with ``seal`` it
    gets the digest that it needs, as another program would write it."""
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    result = change(meta)
    meta = meta if result is None else result
    if seal and isinstance(meta, dict):
        meta["digest"] = digest_of(meta)
    (folder / META).write_text(json.dumps(meta), encoding="utf-8")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors and the digest that guards them, as another program would."""
    file = state_of(folder)
    state = load_file(file)
    change(state)
    save_file(state, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    edit(folder, lambda meta: meta.update(sha256=digest))


def test_the_undamaged_copy_loads(folder: Path) -> None:
    assert pyrolora.load(folder, bert()).predict(reviews(4), num_samples=2).probs.shape == (4, 2)


# The folder ---------------------------------------------------------------------------------------


def test_a_file_is_no_folder_to_save_to(tmp_path: Path) -> None:
    file = tmp_path / "posterior"
    file.write_text("mine")
    posterior = pyrolora.fit(bert(), tokens(8), guide="map", epochs=1, adapter=AdapterConfig(r=1))
    with pytest.raises(ConfigError, match="is a file"):
        posterior.save(file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: None])
def test_what_is_no_saved_posterior(make: Any, tmp_path: Path) -> None:
    """An empty folder, a file, and nothing at all."""
    path = tmp_path / "run"
    make(path)
    error = refused(path, None, [str(path), "no saved posterior", "posterior.save"])
    assert isinstance(error, CheckpointError)


@pytest.mark.parametrize("part", ["description", "tensors", "tokenizer"])
def test_a_missing_file_is_named(part: str, folder: Path) -> None:
    if part == "tokenizer":
        gone = named(folder, "tokenizer")
        shutil.rmtree(gone)
    else:
        gone = folder / META if part == "description" else state_of(folder)
        gone.unlink()
    error = refused(folder, None, [str(folder), gone.name])
    assert isinstance(error, CheckpointError)


@pytest.mark.parametrize("key", ["state_file", "tokenizer"])
def test_a_name_that_leaves_the_folder_is_not_followed(key: str, folder: Path) -> None:
    """The description of a posterior from elsewhere names files of its own folder only."""
    there = named(folder, key).rename(folder.parent / "elsewhere")
    edit(folder, lambda meta: meta.update({key: f"../{there.name}"}))
    assert isinstance(refused(folder, None, [str(folder)]), CheckpointError)


def test_a_missing_tokenizer_of_a_relative_folder_is_not_looked_for_on_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``run/tokenizer-…`` reads as a hub id."""
    name = named(folder, "tokenizer").name
    shutil.rmtree(folder / name)
    monkeypatch.chdir(folder.parent)
    error = refused(Path(folder.name), None, [name])
    assert isinstance(error, CheckpointError)
    assert "huggingface.co" not in str(error)


def test_a_folder_of_another_program(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    refused(tmp_path, None, [str(tmp_path), "no saved posterior", META])


# The tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 0.999])
def test_truncated_tensors(share: float, folder: Path) -> None:
    file = state_of(folder)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    error = refused(folder, None, [file.name, "SHA-256", "truncated", "restore"])
    assert isinstance(error, CheckpointError)


@pytest.mark.parametrize("place", [0, 100, -1])
def test_one_edited_byte(place: int, folder: Path) -> None:
    file = state_of(folder)
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))
    error = refused(folder, None, [file.name, "SHA-256", "edited", "restore"])
    assert isinstance(error, CheckpointError)


def test_truncated_tensors_with_a_new_digest(folder: Path) -> None:
    file = state_of(folder)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    edit(folder, lambda meta: meta.update(sha256=digest))
    error = refused(folder, None, [file.name, "cannot read"])
    assert isinstance(error, CheckpointError)


def longest(state: dict[str, Tensor]) -> str:
    return max(state, key=lambda name: state[name].numel())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        pytest.param(lambda s: s.pop(longest(s)), "missing", id="one is missing"),
        pytest.param(lambda s: s.update(other=torch.zeros(2)), "other", id="one too many"),
        pytest.param(lambda s: s.update({longest(s): torch.zeros(3)}), "(3,)", id="shape"),
    ],
)
def test_tensors_of_another_kind(change: Any, word: str, folder: Path) -> None:
    rewrite(folder, change)
    assert isinstance(refused(folder, None, [word]), CheckpointError)


# The description ----------------------------------------------------------------------------------

KEYS = [
    *("format", "format_version", "state_file", "sha256", "tokenizer", "guide", "task"),
    *("adapter", "layers", "heads", "base", "num_examples", "settings", "history"),
]


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_of_the_description(key: str, folder: Path) -> None:
    edit(folder, lambda meta: meta.pop(key) and None)
    error = refused(folder, None, [str(folder)])
    assert isinstance(error, CheckpointError)
    if key not in ("format", "format_version", "state_file", "sha256"):
        assert f"'{key}'" in str(error)


EDITED = ["edited", "restore"]
OTHER_HEADS = ["weights", "classifier.weight", "load that model"]


def weight_of(meta: dict[str, Any]) -> dict[str, Any]:
    return next(iter(meta["base"]["weights"].values()))


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "another format": (lambda m: m.update(format="gguf"), [META, "pyrolora"]),
    "another format version": (
        lambda m: m.update(format_version=99),
        ["format version 99", "reads 2", "install"],
    ),
    "a list": (lambda m: [1, 2], [META, "pyrolora"]),
    "a text": (lambda m: "posterior", [META, "pyrolora"]),
    "a guide that exists": (lambda m: m["guide"].update(name="map"), ["num_components", *EDITED]),
    "a guide that does not": (
        lambda m: m["guide"].update(name="vae"),
        ["'vae'", "guides.register"],
    ),
    "an unknown option": (lambda m: m["guide"]["options"].update(warp=9), ["warp", *EDITED]),
    "an option out of range": (
        lambda m: m["guide"]["options"].update(sample_scale=-1),
        ["sample_scale", "-1"],
    ),
    "an option of another type": (
        lambda m: m["guide"]["options"].update(sample_scale="large"),
        ["sample_scale", "'large'", *EDITED],
    ),
    "another structure of the guide": (
        lambda m: m["guide"]["options"].update(covariance="full"),
        ["missing", "scale_tril"],
    ),
    "another likelihood": (lambda m: m.update(task="regression"), ["noise_scale"]),
    "an unknown likelihood": (lambda m: m.update(task="poisson"), ["'poisson'"]),
    "another rank": (lambda m: [row.update(rank=3) for row in m["layers"]] and None, ["shape"]),
    "no layers": (lambda m: m.update(layers=[]), ["no layers", *EDITED]),
    "a layer that is not there": (lambda m: m["layers"][-1].update(name="nowhere"), ["nowhere"]),
    "layers without a name": (lambda m: m["layers"][0].pop("name") and None, ["'name'", *EDITED]),
    "a head that is not there": (lambda m: m.update(heads=["scorer"]), OTHER_HEADS),
    "no heads": (lambda m: m.update(heads=[]), OTHER_HEADS),
    "a head that is an adapted layer": (
        lambda m: m.update(heads=[m["layers"][0]["name"]]),
        OTHER_HEADS,
    ),
    "a number of examples in words": (
        lambda m: m.update(num_examples="many"),
        ["num_examples", "'many'", *EDITED],
    ),
    "no examples": (lambda m: m.update(num_examples=0), ["num_examples", "0", *EDITED]),
    "a history that is none": (lambda m: m.update(history=3), EDITED),
    "an adapter rank of zero": (lambda m: m["adapter"].update(r=0), ["'r'", "0"]),
    "guide as a text": (lambda m: m.update(guide="montec"), EDITED),
    "base as a text": (lambda m: m.update(base="bert"), ["base", "'bert'"]),
    "a rank in words": (lambda m: m["layers"][0].update(rank="two"), EDITED),
    "a rank below zero": (lambda m: m["layers"][0].update(rank=-2), EDITED),
    "a scaling in words": (lambda m: m["layers"][0].update(scaling="large"), EDITED),
    "heads as numbers": (lambda m: m.update(heads=[3]), ["heads", *EDITED]),
    "no digests": (lambda m: m["base"].pop("weights") and None, ["weights"]),
    "digests of nothing": (lambda m: m["base"].update(weights={}), ["no digests", *EDITED]),
    "digests as a list": (lambda m: m["base"].update(weights=[1.0]), ["weights", "1.0"]),
    "a digest without a shape": (lambda m: weight_of(m).pop("shape") and None, ["shape"]),
    "a digest without bits": (lambda m: weight_of(m).update(bits={}), ["weights", "digests"]),
    "a digest of another length": (
        lambda m: weight_of(m).update(bits={"float32": "00"}),
        ["weights", "digests"],
    ),
    "a dtype that is none": (lambda m: m["base"].update(dtype="load"), ["base.dtype", "'load'"]),
    "a class that is no name": (lambda m: m["base"].update({"class": "os.system"}), ["class"]),
    "a configuration that is too deep": (
        lambda m: m["base"]["config"].update(deep=json.loads("[" * 30 + "]" * 30)),
        ["deep", "nested too deep"],
    ),
    "a number that is too large": (
        lambda m: m["base"]["config"].update(vocab_size=10**400),
        ["vocab_size"],
    ),
    "no tokenizer, and its files": (
        lambda m: m.update(tokenizer=None, tokenizer_files={"tokenizer.json": "0" * 64}),
        ["tokenizer_files", *EDITED],
    ),
    "a state file that is not there": (
        lambda m: m.update(state_file="adapters-000000000000.safetensors"),
        [META, "adapters-000000000000.safetensors", "missing"],
    ),
    "an empty name of the state file": (lambda m: m.update(state_file=""), ["state_file", *EDITED]),
    "another digest": (lambda m: m.update(sha256="0" * 64), ["adapters-", "SHA-256", "restore"]),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edited_description(case: str, folder: Path) -> None:
    change, words = EDITS[case]
    edit(folder, change)
    error = refused(folder, None, words)
    if "edited" in words:
        assert str(folder) in str(error)


@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x04\x95", b"\xff\xfe", b"not json"])
def test_a_description_that_is_no_json(content: bytes, folder: Path) -> None:
    (folder / META).write_bytes(content)
    error = refused(folder, None, [META, "damaged", "JSON"])
    assert isinstance(error, CheckpointError)


def test_a_truncated_description(folder: Path) -> None:
    content = (folder / META).read_bytes()
    (folder / META).write_bytes(content[: len(content) // 2])
    assert isinstance(refused(folder, None, [META, "damaged"]), CheckpointError)


# The tokenizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer(name: str, folder: Path) -> None:
    file = named(folder, "tokenizer") / name
    file.write_bytes(file.read_bytes()[:40])
    assert isinstance(refused(folder, None, ["tokenizer"]), CheckpointError)


def test_an_empty_tokenizer_folder(folder: Path) -> None:
    tokens_folder = named(folder, "tokenizer")
    shutil.rmtree(tokens_folder)
    tokens_folder.mkdir()
    assert isinstance(refused(folder, None, ["tokenizer"]), CheckpointError)


# Another network ----------------------------------------------------------------------------------


def changed(module: str) -> nn.Module:
    """The network of the fit but for the weights of one module without an adapter."""
    network = bert()
    with torch.no_grad():
        for parameter in network.get_submodule(module).parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return network


def shortened() -> nn.Module:
    """The network of the fit without its last layer."""
    network = bert()
    encoder = network.bert.encoder
    encoder.layer = encoder.layer[:1]
    return network


FITTED_ON = "fitted on a BertForSequenceClassification"
FOREIGN: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "another architecture": (llama, ["LlamaForCausalLM", FITTED_ON]),
    "a plain network": (mlp, ["Sequential", FITTED_ON]),
    "other weights": (
        lambda: bert(seed=1),
        ["weight", "not the one", FITTED_ON, "load that model"],
    ),
    "another size": (lambda: bert(hidden_size=32), ["weight", "shape", "32", "16", FITTED_ON]),
    "fewer layers": (shortened, ["encoder.layer.1", "missing", FITTED_ON]),
    "other labels": (lambda: bert(num_labels=3), ["classifier", "(2, 16)", "(3, 16)"]),
    "a regression network": (lambda: bert(num_labels=1), ["(2, 16)", "(1, 16)"]),
    "other embeddings": (
        lambda: changed("bert.embeddings"),
        ["bert.embeddings", "not the one", FITTED_ON, "load that model"],
    ),
    "another feed-forward layer": (
        lambda: changed("bert.encoder.layer.1.intermediate"),
        ["bert.encoder.layer.1.intermediate", "not the one", FITTED_ON, "load that model"],
    ),
}
FOREIGN_LAYOUT = ["another architecture", "a plain network", "another size", "fewer layers"]


@pytest.mark.parametrize("case", FOREIGN)
def test_a_network_that_the_posterior_was_not_fitted_on(case: str, folder: Path) -> None:
    make, words = FOREIGN[case]
    assert isinstance(refused(folder, make(), words), CheckpointError)


@pytest.mark.parametrize("case", FOREIGN_LAYOUT)
def test_a_network_of_another_layout_is_refused_with_what_to_do(case: str, folder: Path) -> None:
    refused(folder, FOREIGN[case][0](), ["load that model"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_copy_of_the_network_is_the_same_network(
    dtype: torch.dtype, folder: Path
) -> None:
    expected = pyrolora.load(folder, bert()).predict(reviews(4), num_samples=0).probs
    got = pyrolora.load(folder, bert().to(dtype)).predict(reviews(4), num_samples=0).probs
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0.0)


def test_a_network_that_was_built_in_memory_has_to_be_passed(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"BertForSequence.*pyrolora\.load\(path, model\)"):
        pyrolora.load(folder)


def fitted_from_disk(tmp_path: Path) -> Path:
    """A saved posterior whose network came from a folder."""
    bert().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    posterior = pyrolora.fit(str(tmp_path / "base"), reviews(8), guide="map", epochs=1)
    posterior.save(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("damage", ["gone", "no weights", "no config", "truncated weights"])
def test_a_network_folder_that_was_damaged_since(damage: str, tmp_path: Path) -> None:
    run, base = fitted_from_disk(tmp_path), tmp_path / "base"
    weights = base / "model.safetensors"
    if damage == "gone":
        shutil.rmtree(base)
    elif damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        (weights if damage == "no weights" else base / "config.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        pyrolora.load(run)
    assert str(base) in str(caught.value)
    assert "pyrolora.load(path, model)" in str(caught.value)


def test_a_network_folder_with_other_weights_since(tmp_path: Path) -> None:
    run = fitted_from_disk(tmp_path)
    bert(seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="not the one that was adapted") as caught:
        pyrolora.load(run)
    assert str(tmp_path / "base") in str(caught.value)
    assert "load that model" in str(caught.value)


# Another posterior of the same network ------------------------------------------------------------


@pytest.mark.parametrize("damage", ["head", "layer shape"])
def test_a_failed_load_leaves_an_older_posterior_of_the_network_working(
    damage: str, folder: Path
) -> None:
    network = bert()
    older: Posterior = pyrolora.fit(network, tokens(), guide="map", epochs=1)
    expected = older.predict(tokens(), num_samples=0).probs
    kinds = [type(module) for module in network.modules()]
    if damage == "head":
        edit(folder, lambda meta: meta.update(heads=["scorer"]))
    else:
        edit(folder, lambda meta: [layer.update(rank=3) for layer in meta["layers"]] and None)
    with pytest.raises(CheckpointError):
        pyrolora.load(folder, network)
    assert [type(module) for module in network.modules()] == kinds
    torch.testing.assert_close(older.predict(tokens(), num_samples=0).probs, expected)

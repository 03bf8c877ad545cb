"""A saved posterior is the same posterior: here, in a new process, and over an older one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import bert, llama, mlp, reviews, tokenizer, tokens
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import pyrolora
from pyrolora import AdapterConfig, Posterior, guides
from pyrolora.errors import CheckpointError, SaveError
from pyrolora.predictive import Prediction
from pyrolora.storage.digest import digest

META = "posterior.json"
X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


@dataclass(frozen=True)
class Problem:
    """A network, its data, and whether a folder of its own can bring it back."""

    network: Callable[[], nn.Module]
    data: Callable[[], Any]
    task: str
    hosted: bool = True


def scored() -> Any:
    return reviews(10).map(lambda row: {"label": 2.5 * row["label"] - 1.0})


PROBLEMS = {
    "classification": Problem(bert, lambda: reviews(10), "classification"),
    "regression": Problem(lambda: bert(num_labels=1), scored, "regression"),
    "text-generation": Problem(
        llama, lambda: reviews(10).remove_columns("label"), "text-generation"
    ),
    "plain": Problem(mlp, lambda: (X, Y), "classification", hosted=False),
}
GUIDES = {"map": guides.MAP(), "montec": guides.MonteCLoRA()}
CASES = [(problem, guide) for problem in PROBLEMS for guide in GUIDES]
every_case = pytest.mark.parametrize(("problem", "guide"), CASES)


def fitted(problem: str, guide: Any, model: Any, **options: Any) -> Posterior:
    case = PROBLEMS[problem]
    words = tokenizer() if case.hosted and isinstance(model, nn.Module) else None
    return pyrolora.fit(
        model,
        case.data(),
        guide=guide,
        tokenizer=words,
        task=case.task,
        **{
            "adapter": AdapterConfig(r=2),
            "epochs": 2,
            "learning_rate": 0.02,
            "batch_size": 5,
            "seed": 7,
            **options,
        },
    )


def numbers(prediction: Prediction) -> dict[str, Tensor]:
    """All that a prediction says."""
    names = ("draws", "entropy", "aleatoric", "log_likelihood")
    found = {name: getattr(prediction, name, None) for name in names}
    return {name: value.contiguous() for name, value in found.items() if value is not None}


def predicted(posterior: Posterior, problem: str) -> dict[str, Tensor]:
    return numbers(posterior.predict(PROBLEMS[problem].data(), num_samples=5, seed=3))


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=1e-6, equal_nan=True)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def state_of(folder: Path) -> Path:
    """The file of tensors that the description names."""
    return folder / json.loads((folder / META).read_text(encoding="utf-8"))["state_file"]


def tokenizer_of(folder: Path) -> Path | None:
    name = json.loads((folder / META).read_text(encoding="utf-8"))["tokenizer"]
    return folder / name if name else None


def parts(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@dataclass
class Saved:
    """Every case fitted and saved once, its network in a folder where it has one."""

    root: Path
    posteriors: dict[tuple[str, str], Posterior]
    expected: dict[tuple[str, str], dict[str, Tensor]]
    bases: dict[str, dict[str, str]]

    def path(self, problem: str, guide: str) -> Path:
        return self.root / f"{problem}-{guide}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    root = tmp_path_factory.mktemp("saved")
    made = Saved(root, {}, {}, {})
    for name, case in PROBLEMS.items():
        if case.hosted:
            network: Any = case.network()
            network.save_pretrained(root / "bases" / name)
            tokenizer().save_pretrained(root / "bases" / name)
            made.bases[name] = digests(root / "bases" / name)
    for problem, guide in CASES:
        hosted = PROBLEMS[problem].hosted
        model = str(root / "bases" / problem) if hosted else PROBLEMS[problem].network()
        posterior = fitted(problem, GUIDES[guide], model)
        made.posteriors[problem, guide] = posterior
        made.expected[problem, guide] = predicted(posterior, problem)
        posterior.save(made.path(problem, guide))
    return made


def reload(saved: Saved, problem: str, guide: str) -> Posterior:
    network = None if PROBLEMS[problem].hosted else PROBLEMS[problem].network()
    return pyrolora.load(saved.path(problem, guide), network)


# The same process ---------------------------------------------------------------------------------


@every_case
def test_a_loaded_posterior_predicts_the_same(problem: str, guide: str, saved: Saved) -> None:
    assert_close(predicted(reload(saved, problem, guide), problem), saved.expected[problem, guide])


@every_case
def test_a_network_that_is_passed_is_used(problem: str, guide: str, saved: Saved) -> None:
    network = PROBLEMS[problem].network()
    again = pyrolora.load(saved.path(problem, guide), network)
    assert again.base is network
    assert_close(predicted(again, problem), saved.expected[problem, guide])


@every_case
def test_a_posterior_loads_beside_the_one_that_wrote_it(
    problem: str, guide: str, saved: Saved
) -> None:
    """Both share one network."""
    writer = saved.posteriors[problem, guide]
    again = pyrolora.load(saved.path(problem, guide), writer.base)
    assert_close(predicted(again, problem), saved.expected[problem, guide])
    again.detach()
    assert_close(predicted(writer, problem), saved.expected[problem, guide])


@every_case
def test_every_tensor_and_every_draw_comes_back(problem: str, guide: str, saved: Saved) -> None:
    writer, again = saved.posteriors[problem, guide], reload(saved, problem, guide)
    state = again.model.own_state()
    assert set(state) == set(writer.model.own_state())
    for name, tensor in writer.model.own_state().items():
        assert torch.equal(state[name], tensor), name
    draws = again.sample(3, seed=1)
    for name, value in writer.sample(3, seed=1).items():
        assert torch.equal(draws[name], value), name


@every_case
def test_history_settings_and_options_come_back(problem: str, guide: str, saved: Saved) -> None:
    writer, again = saved.posteriors[problem, guide], reload(saved, problem, guide)
    assert again.history == writer.history
    assert any("loss" in entry for entry in again.history)
    assert again.settings == writer.settings
    assert again.settings["seed"] == 7
    assert again.options == writer.options
    assert again.bank.config == writer.bank.config
    assert again.bank.specs == writer.bank.specs
    assert again.model.num_examples == writer.model.num_examples
    assert again.task.name == writer.task.name
    assert again.guide is not None
    assert not any(module.training for module in again.model.modules())


@pytest.mark.parametrize("problem", ["classification", "regression", "text-generation"])
def test_the_tokenizer_comes_back(problem: str, saved: Saved) -> None:
    again = reload(saved, problem, "montec")
    text = ["a good film", "dull"]
    assert again.tokenizer(text)["input_ids"] == tokenizer()(text)["input_ids"]
    assert again.tokenizer.pad_token == "[PAD]"
    prediction = again.predict(text, num_samples=2)
    assert len(prediction.entropy) == 2
    assert torch.isfinite(prediction.entropy.nanmean())


def test_without_a_tokenizer_none_comes_back(saved: Saved) -> None:
    assert reload(saved, "plain", "map").tokenizer is None


@pytest.mark.parametrize(
    ("guide", "adapter"),
    [
        pytest.param(
            guides.MonteCLoRA(
                latent="AB",
                covariance="full",
                component_prior="hierarchical",
                learn_sample_scale=True,
                num_components=2,
                cooperation=0.1,
                kl_warmup=0.5,
            ),
            AdapterConfig(r=2, rank_pattern={"key": 3}, alpha_pattern={"query": 4.0}),
            id="all options",
        ),
        pytest.param(
            guides.MonteCLoRA.paper(sparse=True),
            AdapterConfig(r=3, use_rslora=True, target_modules=["value", "output.dense"]),
            id="paper",
        ),
        pytest.param(
            guides.MAP(prior_scale=0.5),
            AdapterConfig(r=2, modules_to_save=[], lora_dropout=0.2, init_lora_weights="gaussian"),
            id="map with a prior",
        ),
    ],
)
def test_options_off_their_defaults_come_back(guide: Any, adapter: Any, tmp_path: Path) -> None:
    posterior = fitted("classification", guide, bert(), adapter=adapter)
    posterior.save(tmp_path)
    again = pyrolora.load(tmp_path, bert())
    assert again.options == guide
    assert again.bank.specs == posterior.bank.specs
    assert_close(predicted(again, "classification"), predicted(posterior, "classification"))


@every_case
def test_a_loaded_posterior_saves_to_the_same_bytes(
    problem: str, guide: str, saved: Saved, tmp_path: Path
) -> None:
    """All but the tokenizer, to whose configuration transformers adds where it was loaded from."""
    reload(saved, problem, guide).save(tmp_path)
    before = saved.path(problem, guide)
    again, expected = (
        json.loads((folder / "posterior.json").read_text()) for folder in (tmp_path, before)
    )
    for name in ("tokenizer", "tokenizer_files", "digest"):
        assert (again.pop(name) is None) == (expected.pop(name) is None)
    assert again == expected
    name = again["state_file"]
    assert (tmp_path / name).read_bytes() == (before / name).read_bytes()


@every_case
def test_a_posterior_saved_twice_is_the_same_bytes(
    problem: str, guide: str, saved: Saved, tmp_path: Path
) -> None:
    """In another folder, and over itself."""
    for _ in range(2):
        saved.posteriors[problem, guide].save(tmp_path)
        assert digests(tmp_path) == digests(saved.path(problem, guide))


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
def test_the_network_comes_back_in_the_precision_of_the_fit(
    own: torch.dtype, tmp_path: Path
) -> None:
    """The folder holds bfloat16; the user may have loaded it in single precision."""
    bert().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=own)
    posterior = fitted("classification", GUIDES["map"], network)
    posterior.save(tmp_path / "run")
    again = pyrolora.load(tmp_path / "run")
    assert next(again.base.parameters()).dtype == own
    meta = json.loads((tmp_path / "run" / META).read_text(encoding="utf-8"))
    assert f"torch.{meta['base']['dtype']}" == str(own)
    assert_close(predicted(again, "classification"), predicted(posterior, "classification"))


# A new process ------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import pyrolora
from test_save_load import CASES, PROBLEMS, predicted

root = Path(sys.argv[1])
for problem, guide in CASES:
    path = root / f"{problem}-{guide}"
    network = PROBLEMS[problem].network()
    posterior = pyrolora.load(path, network)
    save_file(predicted(posterior, problem), root / f"{path.name}-passed.safetensors")
    if PROBLEMS[problem].hosted:
        posterior = pyrolora.load(path)
        save_file(predicted(posterior, problem), root / f"{path.name}-found.safetensors")
"""


@pytest.fixture(scope="module")
def elsewhere(saved: Saved) -> Path:
    """What a fresh interpreter predicts from the saved folders."""
    here = Path(__file__).resolve().parent
    path = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(saved.root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return saved.root


@every_case
def test_a_new_process_predicts_the_same(
    problem: str, guide: str, saved: Saved, elsewhere: Path
) -> None:
    """With the network passed, and with the network that `load` finds by itself."""
    for how in ["passed", "found"] if PROBLEMS[problem].hosted else ["passed"]:
        got = load_file(elsewhere / f"{problem}-{guide}-{how}.safetensors")
        assert_close(got, saved.expected[problem, guide])


# The folder ---------------------------------------------------------------------------------------


@every_case
def test_the_folder_holds_json_safetensors_and_a_card_only(
    problem: str, guide: str, saved: Saved
) -> None:
    folder = saved.path(problem, guide)
    card = folder / "README.md"
    assert card.is_file()
    files = [file for file in folder.rglob("*") if file.is_file() and file != card]
    words = tokenizer_of(folder)
    outside = {f.suffix for f in files if words is None or not f.is_relative_to(words)}
    assert outside == {".json", ".safetensors"}
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".txt", ".jinja", ".model"}
    for file in files:
        if file.suffix == ".safetensors":
            assert load_file(file)
        elif file.suffix == ".json":
            assert json.loads(file.read_text(encoding="utf-8"))
    assert not any(part.startswith(".") for f in files for part in f.relative_to(folder).parts)
    named = {META, state_of(folder).name, card.name, *([words.name] if words else [])}
    assert parts(folder) == named


@every_case
def test_the_tensors_are_named_by_their_digest(problem: str, guide: str, saved: Saved) -> None:
    folder = saved.path(problem, guide)
    digest = hashlib.sha256(state_of(folder).read_bytes()).hexdigest()
    assert state_of(folder).name == f"adapters-{digest[:12]}.safetensors"
    assert json.loads((folder / META).read_text(encoding="utf-8"))["sha256"] == digest


@every_case
def test_the_description_has_digests_of_every_tensor_outside_of_the_heads(
    problem: str, guide: str, saved: Saved
) -> None:
    folder = saved.path(problem, guide)
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    network = PROBLEMS[problem].network()
    heads = tuple(f"{head}." for head in meta["heads"])
    expected = {n: p for n, p in network.named_parameters() if not n.startswith(heads)}
    assert set(meta["base"]["weights"]) == set(expected)
    for name, parameter in expected.items():
        entry = meta["base"]["weights"][name]
        assert entry["shape"] == list(parameter.shape)
        assert entry["bits"]["float32"] == digest(parameter)
        assert entry["bits"]["bfloat16"] == digest(parameter.to(torch.bfloat16))


@every_case
def test_the_base_is_neither_copied_nor_written_to(problem: str, guide: str, saved: Saved) -> None:
    state = load_file(state_of(saved.path(problem, guide)))
    own = saved.posteriors[problem, guide].model.own_state()
    assert set(state) == set(own)
    weights = PROBLEMS[problem].network().state_dict()
    adapted = [f"{layer}.weight" for layer in saved.posteriors[problem, guide].bank.specs]
    shapes = {weights[name].shape for name in adapted}
    assert not any(t.shape in shapes for name, t in state.items() if not name.startswith("heads"))
    if PROBLEMS[problem].hosted:
        assert digests(saved.root / "bases" / problem) == saved.bases[problem]
    base = saved.posteriors[problem, guide].base.state_dict()
    assert all(torch.equal(base[name], tensor) for name, tensor in weights.items())


# Over an older one --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> tuple[Posterior, Posterior]:
    """Two posteriors of two guides, of networks with the same weights."""
    torch.manual_seed(0)
    older = fitted("classification", GUIDES["montec"], bert())
    newer = fitted("classification", GUIDES["map"], bert(), epochs=4)
    assert not torch.allclose(
        predicted(older, "classification")["draws"], predicted(newer, "classification")["draws"]
    )
    return older, newer


def test_a_save_replaces_an_older_one(pair: tuple[Posterior, Posterior], tmp_path: Path) -> None:
    older, newer = pair
    older.save(tmp_path)
    newer.save(tmp_path)
    again = pyrolora.load(tmp_path, bert())
    assert again.options == newer.options
    assert_close(predicted(again, "classification"), predicted(newer, "classification"))
    fresh = tmp_path / "fresh"
    newer.save(fresh)
    assert parts(tmp_path) - {"fresh"} == parts(fresh)


def test_an_older_tokenizer_does_not_outlive_its_posterior(tmp_path: Path) -> None:
    with_words = fitted("classification", GUIDES["map"], bert())
    without = pyrolora.fit(bert(), tokens(), guide="map", epochs=1)
    with_words.save(tmp_path)
    assert tokenizer_of(tmp_path) is not None
    without.save(tmp_path)
    assert pyrolora.load(tmp_path, bert()).tokenizer is None
    assert parts(tmp_path) == {META, state_of(tmp_path).name, "README.md"}


def test_another_tokenizer_of_the_same_tensors_replaces_the_older_one(tmp_path: Path) -> None:
    """None of the older one's files is left to be read with the newer one's."""
    posterior = fitted("classification", GUIDES["map"], bert())
    posterior.tokenizer.chat_template = "{{ messages }}"
    posterior.save(tmp_path)
    posterior.tokenizer = tokenizer()
    posterior.save(tmp_path)
    posterior.save(tmp_path / "fresh")
    left, fresh = tokenizer_of(tmp_path), tokenizer_of(tmp_path / "fresh")
    assert left is not None
    assert fresh is not None
    assert digests(left) == digests(fresh)
    assert pyrolora.load(tmp_path, bert()).tokenizer.chat_template is None


def test_files_that_are_not_of_a_save_stay(
    pair: tuple[Posterior, Posterior], tmp_path: Path
) -> None:
    """A run's folder may hold files of the user whose names look alike."""
    theirs = [tmp_path / "adapters-of-mine.safetensors", tmp_path / "tokenizer-mine" / "vocab.txt"]
    for file in theirs:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    for posterior in pair:
        posterior.save(tmp_path)
    assert all(file.read_text() == "mine" for file in theirs if file.exists())
    assert [file for file in theirs if not file.exists()] == []


class DiskFull(OSError):
    """What the faults below raise."""


def failing(calls: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, raising from call ``calls`` (counted from 0) on."""
    left = [calls]

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise DiskFull(28, "No space left on device")
        return original(*args, **kwargs)

    return wrapper


def torn(calls: int, patch: pytest.MonkeyPatch) -> None:
    """From write ``calls`` (counted from 0) on, half of a file is written and the disk is full."""
    original, left = Path.write_bytes, [calls]

    def write_bytes(file: Path, content: bytes) -> int:
        left[0] -= 1
        if left[0] < 0:
            original(file, content[: len(content) // 2])
            raise DiskFull(28, "No space left on device")
        return original(file, content)

    patch.setattr(Path, "write_bytes", write_bytes)


def torn_tokenizer(kind: type, patch: pytest.MonkeyPatch) -> None:
    """The tokenizer's files are written, and half of them is lost."""
    original = kind.save_pretrained  # type: ignore[attr-defined]

    def save_pretrained(words: Any, folder: Any, **options: Any) -> None:
        original(words, folder, **options)
        for file in Path(folder).iterdir():
            file.write_text(file.read_text()[:20])
        raise DiskFull(28, "No space left on device")

    patch.setattr(kind, "save_pretrained", save_pretrained)


PARTS = ["tensors", "description", "tokenizer"]


def dies(part: str, posterior: Posterior, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """A save that fails while it writes ``part``."""
    with patch.context() as within:
        if part == "tokenizer":
            torn_tokenizer(type(posterior.tokenizer), within)
        else:
            torn(PARTS.index(part), within)
        with pytest.raises(SaveError, match=rf"cannot write .*{folder.name}.*No space left"):
            posterior.save(folder)


@pytest.mark.parametrize("part", PARTS)
def test_a_failure_while_writing_leaves_the_older_one_whole(
    part: str, pair: tuple[Posterior, Posterior], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = pair
    older.save(tmp_path)
    before = digests(tmp_path)
    dies(part, newer, tmp_path, monkeypatch)
    assert before == digests(tmp_path), "nothing is left to fill the disk"
    again = pyrolora.load(tmp_path, bert())
    assert again.tokenizer("a good film") == tokenizer()("a good film")
    assert_close(predicted(again, "classification"), predicted(older, "classification"))


@pytest.mark.parametrize("part", PARTS)
def test_a_failure_while_saving_over_itself_leaves_the_older_one_whole(
    part: str, pair: tuple[Posterior, Posterior], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors, and so the names, are the same."""
    older, _ = pair
    older.save(tmp_path)
    before = digests(tmp_path)
    dies(part, older, tmp_path, monkeypatch)
    assert before.items() <= digests(tmp_path).items()
    again = pyrolora.load(tmp_path, bert())
    assert again.tokenizer("a good film") == tokenizer()("a good film")


@pytest.mark.parametrize("retry", ["older", "newer"])
@pytest.mark.parametrize("part", PARTS)
def test_the_next_save_removes_what_a_failure_left(
    part: str,
    retry: str,
    pair: tuple[Posterior, Posterior],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    older, newer = pair
    folder, fresh = tmp_path / "run", tmp_path / "fresh"
    older.save(folder)
    dies(part, newer, folder, monkeypatch)
    survivor = older if retry == "older" else newer
    survivor.save(folder)
    survivor.save(fresh)
    assert digests(folder) == digests(fresh)
    assert parts(folder) == parts(fresh)


@pytest.mark.parametrize("function", ["unlink", "rmtree"])
def test_a_failure_while_removing_the_older_files_leaves_the_newer_one_whole(
    function: str,
    pair: tuple[Posterior, Posterior],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    older, newer = pair
    folder, fresh = tmp_path / "run", tmp_path / "fresh"
    older.save(folder)
    with monkeypatch.context() as patch:
        target: Any = Path if function == "unlink" else shutil
        patch.setattr(target, function, failing(0, lambda *a: None))
        newer.save(folder)
    again = pyrolora.load(folder, bert())
    assert again.tokenizer("a good film") == tokenizer()("a good film")
    assert_close(predicted(again, "classification"), predicted(newer, "classification"))
    newer.save(folder)
    newer.save(fresh)
    assert parts(folder) == parts(fresh)


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_failure_between_moving_files_leaves_the_older_or_the_newer_one_whole(
    moves: int, pair: tuple[Posterior, Posterior], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of files that are in place when the process dies."""
    older, newer = pair
    older.save(tmp_path)
    with monkeypatch.context() as patch:
        for name in ("replace", "rename"):
            patch.setattr(os, name, failing(moves, getattr(os, name)))
        with pytest.raises(SaveError):
            newer.save(tmp_path)
    survivor = newer if moves == 2 else older  # then the model card is what failed
    again = pyrolora.load(tmp_path, bert())
    assert again.tokenizer is not None
    assert_close(predicted(again, "classification"), predicted(survivor, "classification"))


@pytest.mark.parametrize("part", PARTS)
def test_a_failed_first_save_leaves_nothing_that_looks_saved(
    part: str, pair: tuple[Posterior, Posterior], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies(part, pair[0], tmp_path, monkeypatch)
    assert not (tmp_path / META).exists()
    with pytest.raises(CheckpointError, match="no saved posterior"):
        pyrolora.load(tmp_path, bert())


def test_a_detached_posterior_saves(tmp_path: Path) -> None:
    posterior = fitted("classification", GUIDES["montec"], bert())
    expected = predicted(posterior, "classification")
    posterior.detach()
    posterior.save(tmp_path)
    assert_close(predicted(pyrolora.load(tmp_path, bert()), "classification"), expected)


def test_a_fit_with_an_output_folder_saves_itself_there(tmp_path: Path) -> None:
    posterior = fitted("classification", GUIDES["montec"], bert(), output_dir=tmp_path)
    again = pyrolora.load(tmp_path, bert())
    assert_close(predicted(again, "classification"), predicted(posterior, "classification"))
    assert again.history == posterior.history

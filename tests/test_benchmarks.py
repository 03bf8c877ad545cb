"""The benchmarks of speed and memory on tiny networks: that they compare what they say."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from pyrolora import zoo

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
}
CASES = ["minilm", "minilm/all-linear", "llama-12", "llama-12/all-linear"]


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of shapes, with tiny ones in it."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("networks")
    for name in ("minilm", "llama-12"):
        tiny = dataclasses.replace(module.SHAPES[name], options=TINY, batch=4, length=6)
        monkeypatch.setitem(module.SHAPES, name, tiny)
    return module


@pytest.fixture
def script(networks: Any) -> Callable[[str], Any]:
    """Loads a script by its file, under a name that no other module has."""

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(
            f"benchmark_{name}", BENCHMARKS / f"{name}.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("name", CASES)
def test_every_contestant_trains_the_same_network_and_leaves_its_frozen_weights(
    networks: Any, name: str
) -> None:
    contestants = importlib.import_module("contestants")
    case = networks.Case(name, 2)
    network = case.shape.network("cpu")
    before = {n: p.clone() for n, p in network.named_parameters()}
    made = {n: maker(case, network) for n, maker in contestants.CONTESTANTS.items()}
    batches = case.shape.batches(2, torch.device("cpu"))
    contestants.check_same_start(made, batches[0], case.shape)
    for contestant in made.values():
        groups = contestant.optimizer.param_groups
        trained = [p for group in groups for p in group["params"]]
        start = [p.detach().clone() for p in trained]
        for batch in batches:
            contestant.step(batch)
        moved = [not torch.equal(p, s) for p, s in zip(trained, start, strict=True)]
        assert any(moved) or (case.shape.causal and contestant is made["base"])
    for n, p in network.named_parameters():
        assert torch.equal(p, before[n]), n


def test_contestants_that_differ_at_the_start_are_refused(networks: Any) -> None:
    contestants = importlib.import_module("contestants")
    case = networks.Case("minilm", 2)
    network = case.shape.network("cpu")
    made = {n: contestants.CONTESTANTS[n](case, network) for n in ("PEFT LoRA", "pyrolora map")}
    (batch,) = case.shape.batches(1, torch.device("cpu"))
    wider = contestants.CONTESTANTS["PEFT LoRA"](networks.Case("minilm", 3), network)
    with pytest.raises(SystemExit, match="not the same"):
        contestants.check_same_start({**made, "PEFT LoRA": wider}, batch, case.shape)
    head = made["pyrolora map"].optimizer.param_groups[0]["params"][-1]
    head.data.add_(torch.tensor([1.0, 0.0]) if head.dim() == 1 else 1.0)
    with pytest.raises(SystemExit, match="not the same"):
        contestants.check_same_start(made, batch, case.shape)


def test_steps_have_a_row_a_contestant_and_ratios_of_the_same_round(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_time = script("step_time")
    monkeypatch.setattr(step_time, "PYRO_ROUNDS", 1)
    monkeypatch.setattr(step_time, "LEAST", 2)
    command = ["--cases", *CASES[:3:2], "--minutes", "0", "--warmup", "1", "--device", "cpu"]
    step_time.main([*command, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "step_time-cpu.json").read_text())
    assert [run["case"] for run in found["runs"]] == CASES[:3:2]
    for run in found["runs"]:
        rows = {row["contestant"]: row for row in run["steps"]}
        assert set(rows) == set(step_time.CONTESTANTS)
        own, lora = (run["milliseconds"][n] for n in ("pyrolora montec", "PEFT LoRA"))
        assert len(own) == 2
        ratios = torch.tensor([a / b for a, b in zip(own, lora, strict=True)])
        assert rows["pyrolora montec"]["to PEFT LoRA"] == pytest.approx(ratios.mean().item())
    assert len(found["pyro"]) == 4 * len(step_time.GUIDES)
    assert (tmp_path / "step_time-cpu.md").read_text().count("## ") == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_steps_of_compiled_networks_run_compiled_code(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_time = script("step_time")
    monkeypatch.setattr(step_time, "PYRO_ROUNDS", 1)
    monkeypatch.setattr(step_time, "LEAST", 2)
    torch._dynamo.utils.counters.clear()
    command = ["--cases", "minilm", "--minutes", "0", "--device", "cpu", "--compile", "eager"]
    contestants = ["--contestants", "base", "pyrolora map"]
    step_time.main([*command, *contestants, "--out", str(tmp_path)])
    (run,) = json.loads((tmp_path / "step_time-cpu-eager.json").read_text())["runs"]
    both = {f"{name}{compiled}" for name in contestants[1:] for compiled in ("", ", compiled")}
    assert {row["contestant"] for row in run["steps"]} == both
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2


def test_memory_counts_the_network_once_and_what_a_method_adds(
    script: Callable[[str], Any], tmp_path: Path
) -> None:
    memory = script("memory")
    memory.main(["--cases", "minilm", "--device", "cpu", "--out", str(tmp_path)])
    (run,) = json.loads((tmp_path / "memory-cpu.json").read_text())["runs"]
    peaks = {row["contestant"]: row["peak_mb"] for row in run["peaks"]}
    assert min(peaks.values()) > run["weights_mb"]
    assert peaks["pyrolora montec"] > peaks["pyrolora map"] > peaks["base"]
    assert run["peaks"][3]["to pyrolora map"] == 1

    kept = []
    with memory.LiveBytes() as live:
        kept.append(torch.zeros(100))
        temporary = kept[0] + torch.zeros(50).repeat(2)  # the 200 bytes go, and three of 400 stay
        del temporary
        kept[0].view(10, 10).add_(1)
    assert (live.now, live.peak) == (400, 1200)


def test_formulas_of_memory_are_those_of_a_small_network(script: Callable[[str], Any]) -> None:
    shapes = script("shapes")
    small, tinier = shapes.Decoder(2, 96, 160, rank=8), shapes.Decoder(1, 48, 80, rank=4)
    for item in shapes.items():
        if item.what.startswith("posterior"):
            assert item.measure(tinier) == pytest.approx(item.size(tinier), rel=0.02), item.what
        elif item.what.startswith(("step", "gradients", "sums")):
            assert item.measure(small) == pytest.approx(item.size(small), rel=0.6), item.what


@pytest.mark.parametrize(
    ("name", "copies"),
    [("map", 1), ("montec", 2), ("meanfield", 4.4), ("meanfield on A and B", 7.6)],
)
def test_a_training_step_holds_few_copies_of_the_adapters(
    name: str, copies: float, script: Callable[[str], Any]
) -> None:
    """Beyond the parameters, their gradients, and the optimiser's states."""
    shapes = script("shapes")
    (item,) = (item for item in shapes.items() if item.what == f"step of {name}")
    for shape in (shapes.Decoder(1, 96, 160, rank=8), shapes.Decoder(3, 96, 160, rank=8)):
        assert item.measure(shape) < copies * shape.copy


def test_predictions_are_timed_against_as_many_passes(
    script: Callable[[str], Any], tmp_path: Path
) -> None:
    predict_time = script("predict_time")
    options = ["--cases", "minilm", "--rounds", "2", "--draws", "3", "--device", "cpu"]
    predict_time.main([*options, "--length", "5", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "predict_time-cpu.json").read_text())["times"]
    assert [row["contestant"] for row in rows] == ["plain network", "predict", "one pass a draw"]
    assert rows[0]["to plain network"] == 1


@pytest.mark.parametrize("name", ["PEFT LoRA + Trainer", "pyrolora map", "pyrolora montec"])
def test_whole_fits_train_and_save_an_adapter(
    script: Callable[[str], Any], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fit_time = script("fit_time")
    rows = {"text": ["Return the mean.", "Draw from it."] * 4, "label": [0, 1] * 4}
    data = datasets.Dataset.from_dict(rows).cast_column("label", datasets.ClassLabel(2))
    data.save_to_disk(tmp_path / "data")
    saved = []
    inner = fit_time.FITS[name]
    monkeypatch.setitem(
        fit_time.FITS,
        name,
        lambda *given: (inner(*given), saved.extend(p.name for p in Path(given[-1]).iterdir())),
    )
    fit_time.work(name, str(zoo.folder("encoder")), str(tmp_path / "data"), steps=2, batch=4)
    assert any(file.endswith(".safetensors") for file in saved)


def test_ranks_are_compared_at_one_budget_and_scored_twice(
    script: Callable[[str], Any], tmp_path: Path
) -> None:
    script("rank_allocation").main(["--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "rank_allocation.json").read_text())
    rows = {row["ranks of"]: row for row in found["rows"]}
    assert rows["uniform 2"]["ranks"] == [2] * 6
    assert rows["teacher's"]["ranks"] == [1, 1, 6, 1, 1, 1]
    for name in ("alora", "snr", "alora, moved", "snr, moved"):
        assert sum(rows[name]["ranks"]) == 12
    (scores,) = found["scores"]
    assert all(torch.tensor(scores[name]).shape == (6, 6) for name in ("alora", "snr"))
    assert "| uniform 2 |" in (tmp_path / "rank_allocation.md").read_text()


def test_damaged_folders_are_refused_or_mean_what_they_say(
    script: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A short run of the fuzzer; its own numbers are longer."""
    fuzz = script("fuzz")
    assert fuzz.main(["--folders", "200", "--seconds", "20", "--seed", "7"]) == 0
    assert "; 0 failed" in capsys.readouterr().out


def test_the_fuzzer_tells_a_failure(
    script: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fuzz = script("fuzz")
    monkeypatch.setattr(fuzz, "_loaded", lambda *_: [].pop())
    assert fuzz.main(["--folders", "2"]) == 1
    assert "IndexError" in capsys.readouterr().out


def test_commits_are_the_same_if_every_number_is(script: Callable[[str], Any]) -> None:
    same = script("same_tensors")
    tensors = {"A": torch.tensor([1.0, torch.nan]), "likelihood.noise": torch.tensor(2.0)}
    assert same.difference(tensors, tensors) == same.Difference(0.0)
    moved = {"A": tensors["A"], "task.noise": torch.tensor(2.0)}
    assert same.difference(tensors, moved) == same.Difference(0.0)
    assert same.difference(tensors, {**moved, "A": torch.tensor([1.5, torch.nan])}).largest == 0.5
    assert same.difference(tensors, {**moved, "A": torch.ones(2)}).largest == torch.inf
    assert same.difference(tensors, {**moved, "A": torch.ones(3)}).largest == torch.inf
    assert same.difference(tensors, {"A": tensors["A"]}).note
    assert same.difference(tensors, dict(reversed(moved.items()))).note
    assert same.difference(tensors, {**moved, "A": tensors["A"].double()}).note

    found = same.numbers_of("map", same.tasks()["regression"])
    assert any(name.endswith(".noise_scale") for name in found["tensors"])
    assert {*found["predictions"]} == {"draws", "log_likelihood", "noise_scale", "targets"}
    refused, other = {"refused": "ConfigError: no"}, {"refused": "DataError: no"}
    failed = {"failed": "KeyError: 'A'"}
    for old, new, agree in (
        (found, found, True),
        (refused, refused, True),
        (refused, other, False),
        (refused, found, False),
        (failed, failed, False),
        (found, None, False),
        (None, found, True),
    ):
        assert same.row_of("map", "regression", old, new).same == agree


def test_the_script_for_a_gpu_runs_on_a_cpu(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its parts, at toy sizes; a part that fails is recorded, and the next one runs."""
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "GUIDES", {n: gpu.GUIDES[n] for n in ("map", "flat", "ensemble")})
    monkeypatch.setattr(gpu, "SHORTEST", 0.0)
    monkeypatch.setattr(gpu, "MODES", ("plain", "checkpointing"))
    command = ["--device", "cpu", "--cases", "minilm", "llama-12", "--rank", "2", "--steps", "2"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # names of transformers
        assert gpu.main([*command, "--tokens", "2", "--out", str(tmp_path)]) == 0
    found = {
        part: json.loads((tmp_path / f"gpu-{part}-cpu.json").read_text()) for part in gpu.PARTS
    }
    assert {part: len(result["rows"]) for part, result in found.items()} == {
        "conformance": 6,
        "agreement": 4,
        "steps": 2 * (7 + 6),
        "predict": 3,
        "generate": 3,
    }
    assert all(row["difference"] == 0 for row in found["agreement"]["rows"])

    def breaks(run: Any) -> Any:
        yield {"outcome": "ok"}
        raise ValueError("out of memory")

    monkeypatch.setattr(gpu, "PARTS", {"conformance": breaks, "agreement": gpu.agreement})
    monkeypatch.setattr(gpu, "GUIDES", {"map": gpu.GUIDES["map"]})
    command = ["--device", "cpu", "--parts", "conformance", "agreement", "--out", str(tmp_path)]
    assert gpu.main(command) == 1
    broken, after = (json.loads((tmp_path / f"gpu-{p}-cpu.json").read_text()) for p in gpu.PARTS)
    assert "out of memory" in broken["failure"]
    assert len(broken["rows"]) == 1
    assert after["failure"] is None
    assert gpu.main([*command, "--minutes", "0"]) == 1


def test_what_montec_starts_beside_map_does_not_grow_with_the_layers(
    script: Callable[[str], Any], networks: Any
) -> None:
    operations = script("operations")
    names = ["PEFT LoRA", "pyrolora map", "pyrolora montec", "pyrolora meanfield"]
    more = []
    for layers in (1, 3):
        frame = operations.table(layers, 2, names).set_index(["adapters on", "contestant"])
        kernels = frame["kernels"]["query, key, value"]
        assert kernels["pyrolora map"] < kernels["PEFT LoRA"] + 60  # of the whole fit, not a layer
        more.append([kernels[name] - kernels["pyrolora map"] for name in names[2:]])
    assert more[0] == more[1]
    assert max(more[0]) <= 120


def test_flat_starts_eleven_kernels_more_than_map_for_each_layer(
    script: Callable[[str], Any], networks: Any
) -> None:
    """Three to draw W + E, in both directions, and five for the norms of its rows."""
    operations = script("operations")
    names = ["pyrolora map", "pyrolora flat"]
    more = []
    for blocks in (1, 3):
        frame = operations.table(blocks, 2, names).set_index(["adapters on", "contestant"])
        kernels = frame["kernels"]["query, key, value"]
        more.append(kernels["pyrolora flat"] - kernels["pyrolora map"])
    assert more[1] - more[0] == 11 * 3 * 2

"""The study of benchmarks/: its store, its budget, a fit from end to end, and its tables."""

from __future__ import annotations

import importlib
import itertools
import json
import lzma
import math
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from problems import WORDS, bert, tokenizer

import pyrolora
from pyrolora.errors import DataError
from pyrolora.predictive import ClassPrediction

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
GOOD = {"accuracy": 0.8, "nll": 0.5, "ece": 0.1, "held_out_nll": 0.5}


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("study")


def part(name: str) -> Any:
    """One of the study's modules, which the fixture `study` makes importable."""
    return importlib.import_module(name)


@pytest.fixture
def evidence(study: Any) -> Any:
    return importlib.import_module("evidence")


# Made-up rows -----------------------------------------------------------------------------------


def point(epoch: int, held_out: float, scored: float) -> dict[str, Any]:
    """One of a curve; the scored accuracy tells the epoch."""
    scores = {"nll": scored, "ece": 0.2, "accuracy": epoch / 100}
    return {"epoch": epoch, "held_out": {**scores, "nll": held_out}, "scored": scores}


def row(study: Any, task: str, guide: str = "map", *, curve: Any = (), **given: Any) -> Any:
    """A stored row: settings of a job by its field's name, everything else is a result."""
    fields = study.Job.__dataclass_fields__
    job = study.Job(
        task,
        given.pop("examples", 1000),
        guide,
        **{name: given.pop(name) for name in list(given) if name in fields},
    )
    results = {**GOOD, "fit_s": 10.0, "predict_s": 2.0, "scored_size": 500, **given}
    return {
        "settings": json.loads(study.key(job.settings("model", f"data of {task}", "float32"))),
        "results": {**results, "curve": list(curve), "draws": job.draws},
        "hardware": {"cpu": "a processor", "gpu": None},
        "versions": {"python": "3.11"},
        "side_by_side": 2,
    }


def error_row(study: Any, task: str, text: str) -> Any:
    return {**row(study, task, "montec"), "results": {"error": text}}


# The budget and the store -----------------------------------------------------------------------


def test_what_does_not_fit_is_passed_over_for_what_does(study: Any) -> None:
    prices = {"a": 4.0, "b": 7.0, "c": 5.0, "d": 2.0, "e": 1.0}
    assert study.affordable(prices, prices.get, 10.0) == ["a", "c", "e"]
    assert study.affordable(prices, prices.get, 0.5) == []


def test_a_row_older_than_an_option_has_what_fits_did_then(study: Any, tmp_path: Path) -> None:
    store = tmp_path / "rows.jsonl"
    changed = {"units": "fan_in", "prior_mean": "start"}
    stored = row(study, "cola", "flat+montec", options={"inner": changed})
    for name in ("units", "scale_updates"):
        del stored["settings"]["options"]["inner"][name]
    study.append(store, stored)
    (found,) = study.read_store(store).values()
    options = found["settings"]["options"]["inner"]
    assert [options[n] for n in ("units", "scale_updates", "prior_mean")] == [
        "one", "gradient", "start"
    ]  # fmt: skip


def test_a_half_written_line_is_skipped_and_closed(
    study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "rows.jsonl"
    assert study.read_store(store) == {}
    first, second = row(study, "cola"), row(study, "rte")
    study.append(store, first)
    with store.open("a") as file:
        file.write(json.dumps(second)[:50])  # killed here
    assert list(study.read_store(store).values()) == [first]
    study.append(store, second)
    assert study.read_store(store) == {study.key(r["settings"]): r for r in (first, second)}
    assert capsys.readouterr().out.count("not complete") == 2


def test_equal_settings_have_one_key_however_they_are_given(study: Any) -> None:
    def key(guide: str = "montec", options: Any = (), **fields: Any) -> str:
        job = study.Job("cola", 200, guide, dict(options), **fields)
        return study.key(job.settings("model", "data", "float32"))

    spelled_out = part("study_jobs").describe(pyrolora.guides.from_options("montec", {}))
    other = {"kl_weight": 2 * spelled_out["kl_weight"]}
    assert key() == key(options=spelled_out)
    assert key("flat+montec") == key("flat+montec", {"inner": spelled_out})
    keys = [key(), key(options=other), key(seed=1), key(draws=3), key("flat+montec")]
    keys.append(key("flat+montec", {"inner": other}))
    assert len(set(keys)) == len(keys)
    assert key("map", draws=3) == key("map", draws=16)  # of which it takes none


# Temperature ------------------------------------------------------------------------------------


def classes(logits: torch.Tensor, targets: torch.Tensor) -> ClassPrediction:
    log_probs = logits.log_softmax(-1)
    return ClassPrediction(targets, log_probs.gather(1, targets[:, None]).mT, log_probs.exp()[None])


def test_a_rate_of_scales_of_old_rows_is_the_default_where_it_still_is(
    study: Any, tmp_path: Path
) -> None:
    store = tmp_path / "rows.jsonl"
    for guide, batch in itertools.product(("montec", "map"), (32, 16)):  # 256 and 504 steps
        made = row(study, "sst2", guide, batch=batch, train_size=1000)
        made["settings"]["options"]["scale_learning_rate"] = 0.01
        if guide == "montec":  # then the weight of a cold posterior was the default
            made["settings"]["options"]["kl_weight"] = 0.2
        study.append(store, made)
    found = [made["settings"]["options"] for made in study.read_store(store).values()]
    assert [options["scale_learning_rate"] for options in found] == [None, 0.01, None, None]


@pytest.mark.parametrize("temperature", [0.5, 2.5])
def test_the_temperature_of_the_labels_is_found(study: Any, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 3, generator=generator)
    law = (logits / temperature).softmax(-1)
    targets = torch.multinomial(law, 1, generator=generator)[:, 0]
    assert part("study_fits").best_temperature(classes(logits, targets)) == pytest.approx(
        temperature, rel=0.05
    )


def test_temperature_one_changes_nothing_and_a_high_one_flattens(study: Any) -> None:
    given = classes(torch.randn(20, 3), torch.randint(3, (20,)))
    same, flat = part("study_fits").tempered(given, 1.0), part("study_fits").tempered(given, 1e6)
    torch.testing.assert_close(same.probs.float(), given.probs)
    torch.testing.assert_close(same.log_predictive.float(), given.log_predictive)
    assert part("study_fits").scores(same) == pytest.approx(
        part("study_fits").scores(given), abs=1e-6
    )
    torch.testing.assert_close(flat.probs, torch.full((20, 3), 1 / 3).double(), rtol=0, atol=1e-5)


def test_the_ece_of_exact_probabilities_is_that_of_chance(study: Any) -> None:
    """One bin, n examples of confidence p: E|k / n - p| with k from Binomial(n, p)."""
    n, p = 200, 0.7
    probs = torch.tensor([p, 1 - p]).expand(1, n, 2)
    given = ClassPrediction(torch.zeros(n, dtype=torch.long), None, probs)
    counts = torch.arange(n + 1.0)
    law = torch.distributions.Binomial(n, torch.tensor(p)).log_prob(counts).exp()
    expected = float((law * (counts / n - p).abs()).sum())
    assert part("study_fits").exact_ece(given, times=4000) == pytest.approx(expected, rel=0.05)
    certain = ClassPrediction(given.targets, None, torch.tensor([1.0, 0.0]).expand(1, n, 2))
    assert part("study_fits").exact_ece(certain) == pytest.approx(0.0, abs=1e-6)


# A fit from end to end --------------------------------------------------------------------------


@pytest.fixture
def place(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A tiny encoder, and few sentences that are acceptable where they say "good"."""
    tasks = importlib.import_module("tasks")
    for module, (name, size) in itertools.product(
        (study, tasks), {"HELD_OUT": 16, "SCORED": 12, "OUTSIDE": 8, "MAX_TOKENS": 16}.items()
    ):
        monkeypatch.setattr(module, name, size, raising=module is tasks)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # A worker switches bars off for good; after the test they are as before.
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", False)
    folder = tmp_path / "data"
    pairs = list(itertools.product(WORDS[6:], WORDS[8:], ("good", "bad")))
    for name, size in {"cola/train": 40, "cola/validation": 24, "trec/test": 12}.items():
        texts = [(f"{a} {b} {word}", int(word == "good")) for a, b, word in pairs[:size]]
        lines = [json.dumps({"sentence": text, "label": label}) for text, label in texts]
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))
    bert().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    level = transformers.logging.get_verbosity()
    yield study.Place(folder, tmp_path / "model", "float32", "cpu")
    transformers.logging.set_verbosity(level)


class AtOnce:
    """In the place of a pool of processes: a submitted call is done before `submit` returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *args: Any) -> None: ...

    def submit(self, call: Any, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def test_seeds_share_what_is_scored_and_no_example_has_two_uses(study: Any, place: Any) -> None:
    first, second = (study.load_task(place.data, "cola", 16, seed) for seed in (0, 1))
    assert first.scored[:] == second.scored[:]
    assert first.train[:] != second.train[:]
    train, held_out = set(first.train["sentence"]), set(first.held_out["sentence"])
    assert (len(train), len(held_out), len(first.scored)) == (16, 16, 12)
    assert not train & held_out
    assert len(study.load_task(place.data, "cola", 0, 0).train) == 40 - 16


def test_parts_of_a_text_and_names_of_classes_are_classes(study: Any, place: Any) -> None:
    tasks = importlib.import_module("tasks")
    path = place.data / "plays.txt.xz"
    path.write_bytes(lzma.compress(b"before\nACTORS\na b\nACTORS\nc\n"))
    parts = tasks.Task(("sentence",), classes=2, texts="*", parts="ACTORS")
    assert tasks._texts([path], parts) == [["a", "b"], ["c"]]
    train, scored = (
        datasets.Dataset.from_dict({"label": [5] * len(names), "kind": names})
        for names in (["y", "x", "z"], ["z", "x"])
    )
    numbered = [list(part["label"]) for part in tasks._numbered(train, scored, "kind")]
    assert numbered == [[1, 0, 2], [2, 0]]


def test_passages_of_texts(study: Any, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = importlib.import_module("tasks")
    monkeypatch.setitem(tasks.TASKS, "books", tasks.Task(("sentence",), classes=2, texts="*"))
    monkeypatch.setattr(tasks, "PASSAGES", (20, 6))
    folder = place.data / "lm_text"
    folder.mkdir()
    for text in "ab":
        words = " ".join(f"{text}{number}" for number in range(16 * 100 + 5))
        (folder / f"{text}.txt.xz").write_bytes(lzma.compress(words.encode()))
    splits = study.load_task(place.data, "books", 0, 0)
    assert (len(splits.train), len(splits.held_out), len(splits.scored)) == (24, 16, 12)
    for part, beginning, end in (
        *((part, 0, 80 * 16) for part in (splits.train, splits.held_out)),
        (splits.scored, 80 * 16, 100 * 16),
    ):
        for row in part:
            words = row["sentence"].split()
            first = int(words[0][1:])
            text = "ab"[row["label"]]
            assert words == [f"{text}{number}" for number in range(first, first + 16)]
            assert first % 16 == 0
            assert beginning <= first < end
    (folder / "b.txt.xz").unlink()
    with pytest.raises(SystemExit, match="has 1 files"):
        study.load_task(place.data, "books", 0, 0)


@pytest.mark.parametrize("guide", ["map", "montec", "peft-montec"])
def test_a_fit_gives_a_row(study: Any, place: Any, guide: str) -> None:
    results = study.run(study.Job("cola", 16, guide, epochs=2, draws=2), place)
    scores = {"accuracy", "nll", "ece", "brier", "error_auroc", "aurc", "mcc"}
    ours = {"held_out_nll", "ece_exact", "nll_ts", "ece_ts", "brier_ts", "temperature", "ood_auroc"}
    about = {"curve", "by_draws", "fit_s", "predict_s", "train_size", "scored_size", "draws"}
    if guide == "montec":
        ours = ours | {"ood_auroc_epistemic"}
    assert set(results) == scores | ours | about
    sizes = [results[name] for name in ("train_size", "scored_size", "draws")]
    assert sizes == [16, 12, 2 if guide == "montec" else 0]
    assert json.loads(json.dumps(results)).keys() == results.keys()
    if guide != "map":
        assert results["curve"] == []
        return
    assert [at["epoch"] for at in results["curve"]] == [1, 2]
    end = results["curve"][-1]
    assert set(end["scored"]) == set(end["held_out"]) == scores
    assert end["scored"]["nll"] == pytest.approx(results["nll"], rel=1e-5)
    assert end["held_out"]["nll"] == pytest.approx(results["held_out_nll"], rel=1e-5)
    assert end["scored"]["nll"] != pytest.approx(results["curve"][0]["scored"]["nll"], rel=1e-5)


def test_without_time_nothing_is_fitted(
    study: Any, place: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [study.Job("cola", 16, "map", epochs=1)]
    assert study.work_through(jobs, place, tmp_path / "rows.jsonl", 0.0, 1) == {}
    assert not (tmp_path / "rows.jsonl").exists()
    assert "1 fits are left" in capsys.readouterr().out


def test_rows_are_stored_as_they_are_made_and_not_made_again(
    study: Any, place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def run(job: Any, where: Any) -> Any:
        done.append(job.guide)
        assert where is place
        if job.guide == "laplace":
            raise DataError("no curvature")
        return {"nll": 0.5, "fit_s": 1.0}

    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "ProcessPoolExecutor", AtOnce)
    store = tmp_path / "rows.jsonl"
    jobs = [study.Job("cola", 16, guide) for guide in ("map", "map", "montec")]
    rows = study.work_through(jobs, place, store, 1e6, 2)
    assert done == ["map", "montec"]
    assert study.read_store(store) == rows
    assert [r["results"] for r in rows.values()] == 2 * [{"nll": 0.5, "fit_s": 1.0}]
    assert study.work_through(jobs, place, store, 1e6, 2) == rows
    failing = [*jobs, study.Job("cola", 16, "laplace")]
    errors = [
        r["results"].get("error")
        for r in study.work_through(failing, place, store, 1e6, 2).values()
    ]
    assert errors == [None, None, "DataError: no curvature"]
    assert done == ["map", "montec", "laplace"]


# Rows to tables ---------------------------------------------------------------------------------


def test_the_best_lora_is_chosen_by_held_out_examples(study: Any, evidence: Any) -> None:
    curve = [point(1, held_out=0.6, scored=0.3), point(2, held_out=0.4, scored=0.55)]
    rows = [
        row(study, "sst2", curve=[*curve, point(8, 0.7, 0.2)], nll=0.2, held_out_nll=0.7),
        row(study, "sst2", learning_rate=3e-4, nll=0.45, held_out_nll=0.45),
        row(study, "sst2", options={"prior_scale": 1.0}, nll=0.1, held_out_nll=0.1),
        row(study, "sst2", "montec", nll=0.1, held_out_nll=0.1),
    ]
    (found,) = evidence.best_lora(evidence.frame_of(rows)).to_dict("records")
    assert [found[name] for name in ("epochs", "nll", "ece", "accuracy")] == [2, 0.55, 0.2, 0.02]
    assert math.isnan(found["ood_auroc"])  # the curve has none
    rows[1]["results"]["held_out_nll"] = 0.3
    (found,) = evidence.best_lora(evidence.frame_of(rows)).to_dict("records")
    assert [found[name] for name in ("epochs", "learning_rate", "nll")] == [8, 3e-4, 0.45]


def test_a_seed_with_a_smaller_search_is_no_best_lora(study: Any, evidence: Any) -> None:
    rows = [row(study, "sst2", learning_rate=rate) for rate in (3e-4, 1e-3)]
    rows += [row(study, "sst2", seed=1), row(study, "openbookqa", seed=1)]
    found = evidence.best_lora(evidence.frame_of(rows))
    assert sorted(zip(found["task"], found["seed"], strict=True)) == [
        ("openbookqa", 1),
        ("sst2", 0),
    ]


def test_ratios_are_geometric_means_over_tasks(study: Any, evidence: Any) -> None:
    lora = {"nll_ts": 0.4, "ece_ts": 0.05, "brier_ts": 0.1}
    rows = [row(study, task, seed=seed, **lora) for task in ("sst2", "rte") for seed in (0, 1)]
    rows += [  # over seeds: sst2 half of LoRA's NLL, rte 0.8
        row(study, "sst2", "montec", nll=0.125, ece=0.04, accuracy=0.82),
        row(study, "sst2", "montec", nll=0.5, ece=0.04, accuracy=0.84, seed=1),
        row(study, "rte", "montec", nll=0.4, ece=0.09, accuracy=0.79),
        row(study, "stsb", "montec", nll=-1.0, ece=math.nan, accuracy=math.nan, rmse=0.5),
        row(study, "rte", "flat", nll=0.6),
        row(study, "rte", "montec", options={"kl_weight": 7.0}, nll=9.0),  # not the defaults
        row(study, "rte", "montec", epochs=3, nll=9.0),
        row(study, "rte", "montec", examples=200, nll=9.0),
    ]
    table = evidence.ratios(evidence.frame_of(rows)).set_index(["to", "method"])
    numbers = ["NLL ratio", "ECE ratio", "points", "tasks"]
    for to, nll, ece in (("LoRA", 0.4, 0.36), ("LoRA with temperature", 0.4 / 0.64, 1.44)):
        measured = table.loc[(to, "montec"), numbers].tolist()
        assert measured == pytest.approx([nll**0.5, ece**0.5, 1.0, 2])
    assert table.loc[("LoRA", "flat"), numbers].tolist() == pytest.approx([1.2, 1.0, 0.0, 1])
    assert ("LoRA", "LoRA") not in table.index
    # Scaled LoRA's own: what it was before, relative to what it is now.
    assert table.loc[("LoRA with temperature", "LoRA"), "NLL ratio"] == pytest.approx(1.25)


def test_of_rows_that_differ_in_draws_the_most_draws_count(study: Any, evidence: Any) -> None:
    rows = [row(study, "sst2", "montec", draws=draws, nll=draws / 10) for draws in (4, 16, 8)]
    assert evidence.defaults_only(evidence.frame_of(rows))["nll"].tolist() == [1.6]


def test_options_are_told_by_how_they_differ(study: Any, evidence: Any) -> None:
    inner = part("study_jobs").describe(pyrolora.guides.from_options("flat+montec", {}))
    assert evidence.changes("flat+montec", inner) == ""
    inner["inner"] = {**inner["inner"], "kl_weight": 7.0}
    assert evidence.changes("flat+montec", {**inner, "rho": 0.5}) == "inner.kl_weight=7.0, rho=0.5"
    del inner["rho"]
    assert evidence.changes("flat+montec", inner) == "inner.kl_weight=7.0, rho=absent"


def test_candidates_are_compared_at_equal_settings(study: Any, evidence: Any) -> None:
    rows = [row(study, task) for task in ("cola", "mrpc")]
    rows += [row(study, "cola", "montec", nll=0.45), row(study, "mrpc", "montec", nll=0.2)]
    rows += [row(study, "cola", "montec", options={"kl_weight": 7.0}, nll=0.25)]
    rows += [row(study, "cola", "montec", epochs=3, nll=0.25)]  # no LoRA of 3 epochs
    rows += [row(study, "sst2", "montec", nll=9.0)]  # not a task that chooses
    table = evidence.candidates(evidence.frame_of(rows))
    assert table["options"].tolist() == ["kl_weight=7.0", "**the defaults**", "**the defaults**"]
    assert table["NLL to LoRA's"].tolist()[:2] == pytest.approx([0.5, 0.6])
    assert table["tasks"].tolist() == [1, 2, 0]
    assert table.filter(like="mrpc").squeeze().tolist() == ["", "0.200 / 0.100 / 0.800", ""]


def test_other_options_stand_beside_the_defaults(study: Any, evidence: Any) -> None:
    other = {"options": {"kl_weight": 7.0}}
    rows = [row(study, "sst2", "montec", seed=seed, nll=0.4) for seed in (0, 1)]
    rows += [row(study, "sst2", "montec", seed=0, nll=0.5, **other)]
    rows += [row(study, "sst2", "montec", seed=1, nll=0.7, **other)]
    rows += [row(study, "sst2", "montec", learning_rate=3e-3, **other)]  # no default to it
    rows += [row(study, "cola", "montec", **given) for given in ({}, other)]  # chooses
    (line,) = evidence.options(evidence.frame_of(rows)).to_dict("records")
    assert (line["options"], line["task"], line["seeds"]) == ("kl_weight=7.0", "sst2", 2)
    assert (line["nll"], line["nll by default"]) == pytest.approx((0.6, 0.4))


def confirming(study: Any, nll: dict[int, float], ece: float, accuracy: float) -> list[Any]:
    """LoRA (best after 3 epochs, 0.9) and montec on the tasks with classes."""
    rows = []
    for task, epochs in itertools.product(("sst2", "openbookqa", "arc_easy"), nll):
        own = {3: 0.9, 8: 1.0, 16: 1.3}[epochs]
        rows.append(row(study, task, epochs=epochs, nll=own, held_out_nll=own, accuracy=0.8))
        given = {"nll": nll[epochs], "ece": ece, "accuracy": accuracy}
        rows.append(row(study, task, "montec", epochs=epochs, **given))
    return rows


def over_grid(study: Any, montec: tuple[float, float]) -> list[Any]:
    """LoRA's accuracy on SST-2 goes from 0.7 to 0.8 with the rate, montec's from the first to the
    second; without the cell that is a confirming fit, too."""
    rows = []
    for job in part("study_stages").grid():
        low, high = (0.7, 0.8) if job.guide == "map" else montec
        place = part("study_stages").RATES.index(job.learning_rate) / 2
        names = ("examples", "learning_rate", "batch", "seed")
        fields = {name: getattr(job, name) for name in names}
        accuracy = low + place * (high - low)
        standard = (job.examples, job.learning_rate, job.batch) == (1000, 1e-3, 32)
        if job.guide in ("map", "montec") and job.task == "sst2" and not standard:
            fields |= {"accuracy": accuracy, "held_out_nll": 9.0}  # never the best LoRA
            rows.append(row(study, job.task, job.guide, **fields))
    return rows


def test_targets_that_are_reached(study: Any, evidence: Any) -> None:
    rounded = float(torch.tensor(0.797))  # 0.3 points below, as float32 has it
    rows = confirming(study, {3: 0.72, 8: 0.7, 16: 0.75}, ece=0.04, accuracy=rounded)
    table = evidence.targets(evidence.frame_of(rows + over_grid(study, (0.78, 0.8))))
    assert table["verdict"].tolist() == 8 * ["reached"]
    numbers = [0.7, 0.4, 0.7 / 0.9, 0.4, 0.3, 0.75 / 0.7, 0.2, -1.85]
    assert table["measured"].tolist() == pytest.approx(numbers, abs=1e-5)
    assert table["LoRA's own"].dropna().tolist() == pytest.approx([1.3 / 0.9])
    assert table["tasks"].tolist() == 6 * ["sst2, openbookqa, arc_easy"] + 2 * ["sst2"]


def test_a_spread_over_the_grid_is_within_a_seed(study: Any, evidence: Any) -> None:
    rows = []
    for seed, rate, batch in itertools.product(
        range(3), part("study_stages").RATES, part("study_stages").BATCHES
    ):
        cell = {"learning_rate": rate, "batch": batch, "seed": seed}
        if seed == 2 and batch == 32:
            continue  # not a whole grid
        for guide, spread in (("map", 0.1), ("montec", 0.04)):
            accuracy = 0.6 + 0.1 * seed + spread * part("study_stages").RATES.index(rate) / 2
            rows.append(row(study, "sst2", guide, accuracy=accuracy, **cell))
    frame = evidence.frame_of(rows)
    table = evidence.grid(frame).set_index("method")
    assert table["cells"].tolist() == [6, 6]
    assert table["seeds"].tolist() == [2, 2]
    assert table["accuracy, spread"].tolist() == pytest.approx([0.1, 0.04])
    assert table["accuracy, median"].tolist() == pytest.approx([0.7, 0.67])
    measured = evidence.measures(frame).squeeze()
    assert (measured["spread LoRA"], measured["spread montec"]) == pytest.approx((10, 4))
    assert (measured["median LoRA"], measured["median montec"]) == pytest.approx((70, 67))


def test_targets_that_are_not_reached(study: Any, evidence: Any) -> None:
    rows = confirming(study, {3: 0.85, 8: 0.85, 16: 1.0}, ece=0.101, accuracy=0.796)
    table = evidence.targets(evidence.frame_of(rows + over_grid(study, (0.71, 0.77))))
    assert table["verdict"].tolist() == 8 * ["not reached"]
    numbers = [0.85, 1.01, 0.85 / 0.9, 1.01, 0.4, 1.0 / 0.85, 0.86, 2.0]
    assert table["measured"].tolist() == pytest.approx(numbers)


def test_a_target_without_rows_is_not_measured(study: Any, evidence: Any) -> None:
    rows = [row(study, "sst2"), row(study, "sst2", "montec", nll=0.4)]
    table = evidence.targets(evidence.frame_of(rows))
    measured = ["not reached", "not reached", "reached"]
    assert table["verdict"].tolist()[:2] + table["verdict"].tolist()[4:5] == measured
    assert table["verdict"].tolist()[5:] == 3 * ["not measured"]


def test_the_error_of_an_accuracy_is_that_of_the_scored_examples(study: Any, evidence: Any) -> None:
    rows = [row(study, "cola", seed=seed, mcc=0.25, accuracy=0.8) for seed in (0, 1)]
    (line,) = evidence.stage_one(evidence.frame_of(rows)).to_dict("records")
    assert line["accuracy"] == "0.800 ± 0.018"
    assert (line["score"], line["seconds"], line["seeds"]) == ("mcc 0.250", 12, 2)


# The document -----------------------------------------------------------------------------------

DOC = """# Evidence

Before.
<!-- table: grid -->
what was here
<!-- end -->
Between: 3 | 4.
<!-- picture: grid --><!-- end -->
<!-- table: failed --> <!-- end -->
<!-- table: regression -->
<!-- end -->
After.
"""


def test_markers_are_filled_and_prose_stays(study: Any, evidence: Any, tmp_path: Path) -> None:
    store, doc = tmp_path / "rows.jsonl", tmp_path / "evidence.md"
    for made in over_grid(study, (0.7, 0.75)):
        study.append(store, made)
    study.append(tmp_path / "more.jsonl", error_row(study, "rte", "DataError: a | b\nis nan"))
    doc.write_text(DOC)
    arguments = ["--rows", str(store), str(tmp_path / "more.jsonl"), "--doc", str(doc)]
    evidence.main(arguments)
    text = doc.read_text("utf-8")
    for kept in (
        "# Evidence\n\nBefore.\n<!-- table: grid -->\n",
        "\nBetween: 3 | 4.\n",
        "After.\n",
    ):
        assert kept in text
    assert "what was here" not in text
    assert "| sst2 | 200 | montec | 6 | 0.725 | 0.050 | 0.500 | 0.000 |" in text
    assert "](evidence-grid.png)" in text
    assert (tmp_path / "evidence-grid.png").read_bytes().startswith(b"\x89PNG")
    assert r"DataError: a \| b is nan |" in text
    assert "python benchmarks/study.py" in text.split("table: regression")[1]
    evidence.main(arguments)
    assert doc.read_text("utf-8") == text


def test_every_table_and_picture_is_made_from_few_rows_or_none(
    study: Any, evidence: Any, tmp_path: Path
) -> None:
    some = [row(study, "sst2"), row(study, "stsb", "montec", ece=math.nan, rmse=1.0, pearson=0.5)]
    for rows in ([], some[:1], some):
        frame = evidence.frame_of(rows)
        for kind, known in evidence.ENTRIES.items():
            made = {name: evidence.made(kind, name, frame, tmp_path / "e.md") for name in known}
            empty = {name for name, text in made.items() if text == known[name][1]}
            assert empty >= {"targets", "failed", "epochs"} & set(known)
            assert (empty == set(known)) == (not rows)
            assert not any("nan" in text for text in made.values())


def test_bad_documents_and_missing_rows_are_refused(evidence: Any, tmp_path: Path) -> None:
    frame, doc = evidence.frame_of([]), tmp_path / "evidence.md"
    with pytest.raises(SystemExit, match=r"unknown table 'grids'.*stage-one.*grid"):
        evidence.filled("<!-- table: grids -->\n<!-- end -->", frame, doc)
    with pytest.raises(
        SystemExit, match=r"unknown picture 'rivals'; known are epochs, grid, scores"
    ):
        evidence.filled("<!-- picture: rivals -->\n<!-- end -->", frame, doc)
    unclosed = "<!-- table: grid -->\nprose\n<!-- table: rivals -->\n<!-- end -->"
    with pytest.raises(SystemExit, match="before its <!-- end -->"):
        evidence.filled(unclosed, frame, doc)
    with pytest.raises(SystemExit, match=r"there is no .*none\.jsonl; .*study\.py"):
        evidence.main(["--rows", str(tmp_path / "none.jsonl")])
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(SystemExit, match=r"there is no .*evidence\.md"):
        evidence.main(["--rows", str(tmp_path / "rows.jsonl"), "--doc", str(doc)])

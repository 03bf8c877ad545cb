"""The run on a language model of benchmarks/: its networks, a run from end to end, its tables."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
import transformers
from problems import llama, tokenizer

from pyrolora.errors import ConfigError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
DOC = "Before.\n<!-- table: over-tasks --><!-- end -->\n<!-- table: per-task -->\n<!-- end -->\n"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("language_model")


@pytest.fixture
def tasks(script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tasks, with answers that the tiny model knows."""
    module = importlib.import_module("language_tasks")
    words = module.Prompt("the {sentence} is", (" bad", " good"))
    monkeypatch.setitem(module.PROMPTS, "sst2", words)
    return module


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tiny language model, and a few sentences and questions."""
    monkeypatch.setattr(importlib.import_module("tasks"), "HELD_OUT", 8)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    llama(initializer_range=0.5).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    pairs = [*itertools.product(("film", "book", "very"), ("good", "bad", "fine", "dull"))] * 2
    good = ("good", "fine")
    rows = {
        "sst2": [{"sentence": f"{a} {b}", "label": int(b in good)} for a, b in pairs],
        "openbookqa": [
            {"question": f"the {a}", "choices": ["is dull", b], "label": int(b in good)}
            for a, b in pairs
        ],
        "trec": [{"sentence": "what", "label": 0}],
    }
    for name, own in rows.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            lines = "\n".join(map(json.dumps, own))
            (tmp_path / "data" / name / f"{split}.jsonl").write_text(lines)
    level = transformers.logging.get_verbosity()
    # The script switches bars off for good; after the test they are as before.
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", False)
    yield tmp_path
    transformers.logging.set_verbosity(level)


def command(folder: Path, *more: str) -> list[str]:
    (folder / "doc.md").write_text(DOC)
    places = {"--model": "model", "--data": "data", "--out": "out", "--doc": "doc.md"}
    (folder / "out").mkdir(exist_ok=True)
    sizes = {"--examples": 8, "--held-out": 8, "--scored": 6, "--draws": 2, "--epochs": 1}
    given = {name: str(folder / own) for name, own in places.items()}
    given |= {name: str(own) for name, own in sizes.items()}
    return [*itertools.chain(*given.items()), "--seeds", "0", "--minutes", *more]


# The networks -----------------------------------------------------------------------------------


def test_a_choice_is_scored_by_the_mean_log_likelihood_of_its_own_tokens(tasks: Any) -> None:
    plain = llama(initializer_range=0.5)
    network = tasks.LlamaForChoices(plain.config).eval()
    network.load_state_dict(plain.state_dict())
    # The choices of an example, after what they share; 0 is padding.
    ids = torch.tensor([[[5, 6, 7, 8, 0], [5, 6, 9, 0, 0]], [[4, 8, 9, 7, 10], [4, 11, 0, 0, 0]]])
    shared = (2, 1)
    expected = torch.zeros(2, 2)
    for example, choice in itertools.product(range(2), range(2)):
        row = ids[example, choice]
        row = row[row != 0]
        law = plain(input_ids=row[None]).logits[0].log_softmax(-1)
        places = range(shared[example], len(row))
        expected[example, choice] = sum(law[i - 1, row[i]] for i in places) / len(places)
    found = network(input_ids=ids, attention_mask=(ids != 0).long()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_classifier_starts_as_the_language_model_that_answers(tasks: Any, folder: Path) -> None:
    network, read = tasks.load_language_model(folder / "model", "sst2", 0, "float32")
    plain = llama(initializer_range=0.5)
    ids = read("the film is", add_special_tokens=False, return_tensors="pt")["input_ids"]
    answers = [read(w, add_special_tokens=False)["input_ids"][0] for w in ("bad", "good")]
    torch.testing.assert_close(
        network(input_ids=ids).logits[0], plain(input_ids=ids).logits[0, -1, answers]
    )


def test_long_examples_are_left_out_and_parts_do_not_overlap(tasks: Any, folder: Path) -> None:
    # A question counts once for each of its choices: (2 + 2) + (2 + 1) words.
    found = tasks.load_examples(folder / "data", "openbookqa", (8, 8, 6), 0, most_words=7)
    assert [len(part) for part in (found.train, found.held_out, found.scored)] == [8, 8, 6]
    assert all(own[0] == " is dull" for own in found.train["choices"])
    with pytest.raises(SystemExit, match="has 0 examples of at most 6 words"):
        tasks.load_examples(folder / "data", "openbookqa", (8, 8, 6), 0, most_words=6)
    with pytest.raises(SystemExit, match=r"has 24 examples.*20 to train on and 8 held out"):
        tasks.load_examples(folder / "data", "sst2", (20, 8, 6), 0)


# A run ------------------------------------------------------------------------------------------


def test_a_run_has_a_row_for_every_method_and_is_not_made_again(
    script: Any, tasks: Any, folder: Path, steps: list[int]
) -> None:
    given = command(folder, "60", "--tasks", "sst2", "openbookqa")
    script.main(given)
    rows = [
        json.loads(line)
        for line in (folder / "out" / script.STORE).read_text().splitlines()
        if line
    ]
    assert [r["results"].get("error") for r in rows] == [None] * len(rows)
    made = [(r["settings"]["task"], r["settings"]["method"]) for r in rows]
    assert made == [*itertools.product(("sst2", "openbookqa"), script.METHODS)]
    assert {r["results"]["scored_size"] for r in rows} == {6}
    by_method = {r["settings"]["method"]: r for r in rows if r["settings"]["task"] == "sst2"}
    assert by_method["BLoB"]["settings"]["options"]["init_scale"] == 0.00184
    warm = by_method[script.TEMPERATURE]["results"]
    assert warm["temperature"] != 1
    assert warm["accuracy"] == by_method["MLE"]["results"]["accuracy"]
    assert by_method["MLE"]["results"]["fit_s"] < by_method["TFB"]["results"]["fit_s"]
    text = (folder / "doc.md").read_text()
    assert text.count("| montec, formerly |") == 3
    for row in rows:  # as if the option had come after them
        row["settings"]["options"].pop("latent", None)
    (folder / "out" / script.STORE).write_text("\n".join(map(json.dumps, rows)))
    done = len(steps)
    assert done >= 2 * 10 * 2  # two tasks, ten fits of two steps; Laplace and TFB train nothing
    script.main(given)
    assert len(steps) == done
    assert (folder / "doc.md").read_text() == text


def test_without_time_nothing_is_fitted(script: Any, tasks: Any, folder: Path) -> None:
    with pytest.raises(SystemExit, match="there are no rows"):
        script.main(command(folder, "0", "--tasks", "sst2"))


def test_what_fails_is_a_row_and_the_rest_goes_on(
    script: Any, tasks: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {name: script.METHODS[name] for name in ("MLE", "Laplace", "TFB", "MAP")}
    monkeypatch.setattr(script, "METHODS", methods)
    fit = script.pyrolora.fit

    def fails(network: Any, data: Any, guide: Any, **more: Any) -> Any:
        if guide.name == "laplace" or getattr(guide, "prior_scale", None):
            raise ConfigError("no")
        return fit(network, data, guide, **more)

    monkeypatch.setattr(script.pyrolora, "fit", fails)
    rows = script.work_through(script.parse(command(folder, "60", "--tasks", "sst2")))
    errors = {r["settings"]["method"]: r["results"].get("error") for r in rows.values()}
    failed = "ConfigError: no"
    assert errors == {"MLE": None, "Laplace": failed, "TFB": None, "MAP": failed}


# Tables -----------------------------------------------------------------------------------------


def rows_of(script: Any, nll: dict[tuple[str, int], dict[str, float]]) -> pd.DataFrame:
    about = {"accuracy": 0.5, "ece": 0.1, "fit_s": 8.0, "predict_s": 1.0, "steps": 4}
    rows = {
        f"{task} {seed} {method}": {
            "settings": {"task": task, "seed": seed, "method": method, "epochs": 2},
            "results": {**about, "nll": value},
        }
        for (task, seed), own in nll.items()
        for method, value in own.items()
    }
    return script.frame_of(rows | {"one that failed": {"settings": {}, "results": {"error": "x"}}})


def test_scores_are_means_over_seeds_with_their_standard_error(script: Any) -> None:
    frame = rows_of(script, {("sst2", seed): {"MLE": 0.4 + 0.1 * seed} for seed in range(3)})
    (row,) = script.per_task(frame).to_dict("records")
    assert (row["NLL"], row["accuracy"]) == ("0.500 ± 0.058", "0.500 ± 0.000")
    assert (row["s / step"], row["seeds"]) == ("2.00", 3)
    (row,) = script.per_task(frame[frame["seed"] == 0]).to_dict("records")
    assert row["NLL"] == "0.400"


def test_over_tasks_only_those_count_that_every_method_has(script: Any) -> None:
    frame = rows_of(
        script,
        {
            ("sst2", 0): {"MLE": 1.0, "montec": 0.5},
            ("trec", 0): {"MLE": 0.5, "montec": 1.0 / 4},
            ("rte", 0): {"MLE": 0.1},
            ("rte", 1): {"MLE": 1.0, "montec": 2.0},
        },
    )
    table = script.over_tasks(frame).set_index("method")
    assert table["NLL to MLE's"].tolist() == pytest.approx([1.0, 0.5 ** (1 / 3)])
    assert table["tasks x seeds"].tolist() == [3, 3]


def test_numbers_of_epochs_have_lines_of_their_own(script: Any, folder: Path) -> None:
    args = script.parse([*command(folder, "0", "--tasks", "sst2"), "--epochs", "1", "3"])
    epochs = [job.settings(job.method)["epochs"] for job in script.jobs(args)]
    trained = len(epochs) // 2
    assert epochs == [1] * trained + [3] * trained
    few = rows_of(script, {("sst2", 0): {"MLE": 1.0, "montec": 0.5}})
    many = few.assign(epochs=10, nll=few["nll"] * [1, 3])
    frame = pd.concat([few, many])
    assert script.per_task(frame)["NLL"].tolist() == ["1.000", "0.500", "1.000", "1.500"]
    table = script.over_tasks(frame)
    assert table["epochs"].tolist() == [2, 2, 10, 10]
    assert table["NLL to MLE's"].tolist() == pytest.approx([1, 0.5, 1, 1.5])

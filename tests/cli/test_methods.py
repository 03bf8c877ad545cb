"""The methods on the command line: guides around guides, given adapters, PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from console import done, pyrolora_, refused, saved
from problems import bert, reviews, tokenizer
from transformers import AutoModelForSequenceClassification

import pyrolora
from pyrolora.guides import NUTS, Ensemble, Flat, Laplace, MeanField, MonteCLoRA


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, a fit, and its adapter for PEFT."""
    place = tmp_path_factory.mktemp("place")
    saved(bert(initializer_range=0.3).bert, place / "encoder")
    reviews(24).to_json(place / "train.jsonl")
    reviews(10, seed=1).to_json(place / "test.jsonl")
    done(*fit(place, "run", "--guide", "map"))
    done("export", place / "run", place / "adapter", "--to", "peft")
    return place


def fit(place: Path, output: str, *more: Any, epochs: int | None = 2) -> list[Any]:
    passes = [] if epochs is None else ["--epochs", epochs]
    model = ("--model", place / "encoder", "--output-dir", place / output)
    return ["fit", place / "train.jsonl", *model, *passes, "--batch-size", 8, "--seed", 3, *more]


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("flat+montec", [], Flat(inner=MonteCLoRA())),
        (
            "flat+montec",
            ["guide.rho=0.1", "guide.inner.kl_weight=0.5"],
            Flat(inner=MonteCLoRA(kl_weight=0.5), rho=0.1),
        ),
        ("ensemble", ["guide.members=2"], Ensemble(members=2)),
        (
            "nuts",
            ["guide.num_samples=4", "guide.warmup_steps=2", "guide.inner.prior_scale=0.5"],
            NUTS(
                num_samples=4,
                warmup_steps=2,
                inner=MeanField(prior_scale=0.5, prior_mean="zero", units="one"),
            ),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")
def test_a_guide_and_the_one_inside_take_their_options(place, tmp_path, name, settings, expected):
    chosen = [part for setting in settings for part in ("--set", setting)]
    done(*fit(place, tmp_path / "fit", "--guide", name, *chosen, epochs=1))
    assert pyrolora.load(tmp_path / "fit").options == expected
    done("evaluate", tmp_path / "fit", place / "test.jsonl", "--num-samples", 2)


def test_ranks_that_move_are_an_option_of_the_adapter(place, tmp_path):
    chosen = ("--set", "adapter.rank_allocation=alora", "--set", "adapter.r=2")
    command = fit(place, tmp_path / "fit", *chosen)
    done(*command, "--eval-data", place / "test.jsonl")
    posterior = pyrolora.load(tmp_path / "fit")
    assert posterior.bank.config.rank_allocation == "alora"
    assert sum(posterior.ranks.values()) == 2 * len(posterior.ranks)
    assert len(set(posterior.ranks.values())) > 1
    refused(pyrolora_(*fit(place, tmp_path / "no", *chosen)), "held-out", "'snr'")


@pytest.mark.parametrize(
    ("guide", "setting", "words"),
    [
        ("flat", "guide.inner=montec", ("flat+montec",)),
        ("montec", "guide.inner.rho=1", ("no guide inside",)),
        ("flat+montec", "guide.inner.rho=1", ("MonteCLoRA", "no such option")),
        ("flat+nobody", "guide.rho=0.1", ("unknown guide 'nobody'",)),
        ("montec+map", "guide.kl_weight=1", ("not a guide around",)),
        ("nuts+laplace", "guide.chains=2", ("prior with width",)),
        ("laplace", "guide.tune=guess", ("tune must be one of",)),
    ],
)
def test_options_that_no_guide_has_are_refused(place, tmp_path, guide, setting, words):
    command = fit(place, tmp_path / "no", "--guide", guide, "--set", setting)
    refused(pyrolora_(*command), *words)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("given", ["adapter", "run"])
def test_a_given_adapter_keeps_its_weights(place, tmp_path, given):
    before = pyrolora.load(place / "run").factors()
    command = fit(place, tmp_path / "later", "--given", place / given, "--guide", "laplace")
    done(*[part for part in command if part not in ("--epochs", 2)])
    later = pyrolora.load(tmp_path / "later")
    assert isinstance(later.options, Laplace)
    for layer, (A, B) in later.factors().items():
        assert torch.equal(A, before[layer][0])
        assert torch.equal(B, before[layer][1])
    recorded = json.loads((tmp_path / "later" / "run.json").read_text())["options"]
    assert recorded["given"]
    assert recorded["adapter"] is None, "the given one is used"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--guide", "laplace"), ("epochs", "trains nothing")),
        (("--guide", "map"), ("montec", "nothing to infer")),
        (("--set", "adapter.r=4"), ("adapter= comes with the posterior",)),
        (("--given", "nowhere"), ("no folder 'nowhere'",)),
    ],
)
def test_what_a_given_adapter_excludes(place, tmp_path, more, words):
    command = fit(place, tmp_path / "no", "--given", place / "adapter", *more)
    refused(pyrolora_(*command), *words)


def test_exports_to_peft_give_the_same_logits(place, tmp_path):
    posterior = pyrolora.load(place / "run")
    inputs = tokenizer()(["good film", "bad book"], padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    done("export", place / "run", tmp_path / "draw", "--to", "peft", "--draw", 1)
    for folder in (place / "adapter", tmp_path / "draw"):  # of a point all draws are the mean
        network = AutoModelForSequenceClassification.from_pretrained(place / "encoder")
        model = peft.PeftModel.from_pretrained(network, folder).eval()
        with torch.no_grad():
            expected = posterior.merge()(**inputs).logits
            torch.testing.assert_close(model(**inputs).logits, expected)


def test_a_draw_is_merged_by_its_number(place, tmp_path):
    done(*fit(place, tmp_path / "two", "--guide", "ensemble", "--set", "guide.members=2"))
    assert not list((tmp_path / "two").glob("member-*")), "of no use once the fit is through"
    done("export", tmp_path / "two", tmp_path / "second", "--draw", 1)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
    expected = pyrolora.load(tmp_path / "two").merge(draw=1).state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    refused(pyrolora_("export", tmp_path / "two", tmp_path / "x", "--draw", 2), "there are 2 draws")
    arviz = ("export", tmp_path / "two", tmp_path / "x.nc", "--to", "arviz")
    refused(pyrolora_(*arviz, "--draw", 1), "--num-samples")


# An earlier fit as the prior ---------------------------------------------------------------------


def test_an_earlier_fit_is_the_prior_of_the_next(place, tmp_path):
    first = fit(place, tmp_path / "first", "--guide", "meanfield", "--set", "guide.latent=AB")
    done(*first)
    done(*fit(place, tmp_path / "second", "--prior", tmp_path / "first"))
    found = pyrolora.load(tmp_path / "second")
    assert found.options == MeanField(latent="AB")
    earlier = pyrolora.load(tmp_path / "first")
    previous = found.model.program.previous
    assert torch.equal(previous.bank.A_loc, earlier.bank.A_loc)
    assert not torch.equal(found.bank.A_loc, earlier.bank.A_loc)
    weaker = ("--prior", tmp_path / "first", "--set", "guide.kl_weight=0.05")
    done(*fit(place, tmp_path / "third", *weaker))
    options = pyrolora.load(tmp_path / "third").options
    assert options == MeanField(latent="AB", kl_weight=0.05)


def test_classes_keep_their_names_in_files_that_hold_few_of_them(place, tmp_path):
    """Names of digits are names still, and the classes of an earlier fit those of the next."""

    def table(name: str, *labels: str) -> Any:
        rows = [f"the {word} film,{labels[i % len(labels)]}" for i, word in enumerate("abcdef")]
        (tmp_path / name).write_text("\n".join(["text,label", *rows]))
        return tmp_path / name

    def fitted(name: str, data: Any, *more: Any) -> Any:
        model = ("--model", place / "encoder", "--output-dir", tmp_path / name)
        done("fit", data, *model, *more)
        return tmp_path / name

    few = table("few.csv", "2", "1")
    first = fitted(
        "first", table("all.csv", "1", "2", "x"), "--guide", "meanfield", "--eval-data", few
    )
    names = {0: "1", 1: "2", 2: "x"}
    posterior = pyrolora.load(first)
    assert posterior.base.config.id2label == names
    rows = [{"text": f"the {w} film", "label": "21"[i % 2]} for i, w in enumerate("abcdef")]
    expected = posterior.evaluate(rows, 0)["nll"]
    for command in (("evaluate", first, few), ("compare", few, first)):
        found = json.loads(done(*command, "--num-samples", 0, "--json").out)
        nll = found["nll"] if "nll" in found else found["posteriors"]["first"]["nll"]
        assert nll == pytest.approx(expected, rel=1e-5)
    history = [entry["eval_nll"] for entry in posterior.history if "eval_nll" in entry]
    assert abs(history[-1] - expected) < 0.05, "draws, not the mean"
    second = fitted("second", few, "--prior", first)
    third = fitted("third", few, "--given", first, "--guide", "laplace")
    for later in (second, third):
        assert pyrolora.load(later).base.config.id2label == names
    assert pyrolora.load(third).predict(rows, 0).targets.tolist() == [1, 0] * 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--prior", "nowhere"), ("nowhere", "no folder")),
        (("--prior", "encoder"), ("no saved posterior",)),
        (("--prior", "run"), ("cannot be the prior", "meanfield")),
        (("--guide", "full", "--set", "adapter.r=2"), ("has no adapters",)),
    ],
)
def test_what_cannot_be_a_prior_says_why(place, tmp_path, more, words):
    more = [place / part if part in ("nowhere", "encoder", "run") else part for part in more]
    refused(pyrolora_(*fit(place, tmp_path / "fit", *more)), *words)


def test_full_fine_tuning(place, tmp_path):
    done(*fit(place, tmp_path / "fit", "--guide", "full"))
    done("evaluate", tmp_path / "fit", place / "test.jsonl")
    assert not pyrolora.load(tmp_path / "fit").bank.specs

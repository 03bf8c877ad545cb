"""Every guide on every problem: fit, sample, predict, evaluate, compare, abstain, generate, ArviZ,
k̂, save, load in another process, merge, export. And every guide with each capability that a
guide can state: ranks that move, an earlier posterior for its prior, means that are given.

A new guide joins by its registration; its variants by a line in `VARIANTS`.
"""

from __future__ import annotations

import math
import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from problems import (
    LETTERED,
    absolute,
    bert,
    bert_choice,
    bert_labels,
    bert_mlm,
    bert_spans,
    bert_tags,
    gpt2,
    letter_tokenizer,
    llama,
    llama_reward,
    mask_tokenizer,
    mlp,
    preferences,
    questions,
    reviews,
    several,
    squad,
    summaries,
    t5,
    tagged,
    texts,
    tokenizer,
    tokens,
    writer_tokenizer,
)
from torch import nn

import pyrolora
from pyrolora import AdapterConfig, guides
from pyrolora.errors import ConfigError
from pyrolora.guides import (
    MAP,
    NUTS,
    SWAG,
    Dropout,
    Ensemble,
    Flat,
    Guide,
    Laplace,
    LowRank,
    MeanField,
    MonteCLoRA,
)
from pyrolora.peft import read_adapter
from pyrolora.predictive import Conformal, MultiLabelPrediction, risk_coverage


@dataclass(frozen=True)
class Problem:
    """A network, data for it, and the metrics that its likelihood promises."""

    network: Callable[[], nn.Module]
    data: Callable[[int], Any]
    metrics: set[str]
    options: dict[str, Any]


def pairs(outputs: int) -> Callable[[int], Any]:
    def data(n: int) -> Any:
        generator = torch.Generator().manual_seed(n)
        x = torch.randn(n, 4, generator=generator)
        return (x, x[:, 0]) if outputs == 1 else (x, (x[:, 0] > 0).long())

    return data


CLASS = {"accuracy", "nll", "ece", "brier", "error_auroc", "aurc"}
REAL = {"rmse", "nll", "crps", "coverage", "aurc"}
TEXT = {"nll", "perplexity"}
SPAN = {"nll", "aurc", "exact_match", "f1"}
SMALL = AdapterConfig(r=2)
PROBLEMS = {
    "encoder classifier": Problem(
        bert, reviews, CLASS, {"tokenizer": tokenizer(), "adapter": AdapterConfig(r=2)}
    ),
    "mixed shapes and ranks": Problem(
        bert,
        lambda n: tokens(n),
        CLASS,
        {
            "adapter": AdapterConfig(
                r=3,
                target_modules="all-linear",
                rank_pattern={"key": 1},
                alpha_pattern={"key": 4},
                init_lora_weights="lora-ga",
            )
        },
    ),
    "encoder regression": Problem(
        lambda: bert(1),
        lambda n: [{**row, "labels": float(row["labels"])} for row in tokens(n)],
        REAL,
        {"adapter": AdapterConfig(r=2, use_rslora=True, lora_dropout=0.1)},
    ),
    "multiple choice": Problem(
        bert_choice, questions, CLASS, {"tokenizer": tokenizer(), "adapter": AdapterConfig(r=2)}
    ),
    "masked language model": Problem(bert_mlm, texts, TEXT, {"tokenizer": mask_tokenizer()}),
    "token classification": Problem(
        bert_tags, tagged, CLASS, {"tokenizer": tokenizer(), "adapter": AdapterConfig(r=2)}
    ),
    "llama": Problem(llama, texts, TEXT, {"tokenizer": tokenizer()}),
    "gpt-2": Problem(gpt2, texts, TEXT, {"tokenizer": tokenizer()}),
    "plain classifier": Problem(
        mlp,
        pairs(3),
        CLASS,
        {
            "task": "classification",
            "adapter": AdapterConfig(r=2, init_lora_weights="gaussian", modules_to_save=["2"]),
        },
    ),
    "plain regression": Problem(
        lambda: mlp(outputs=1),
        pairs(1),
        REAL,
        {"task": "regression", "adapter": AdapterConfig(r=1)},
    ),
    "several labels": Problem(
        bert_labels,
        several,
        {*MultiLabelPrediction.higher_is_better},
        {"tokenizer": tokenizer(), "adapter": SMALL},
    ),
    "question answering": Problem(
        bert_spans, squad, SPAN, {"tokenizer": tokenizer(), "adapter": SMALL}
    ),
    "sequence to sequence": Problem(t5, summaries, TEXT, {"tokenizer": writer_tokenizer()}),
    "choices by letters": Problem(
        lambda: llama(vocab_size=len(LETTERED)),
        questions,
        CLASS,
        {"tokenizer": letter_tokenizer(), "task": "letter-choice"},
    ),
    "choices by texts": Problem(
        lambda: llama(vocab_size=len(LETTERED)),
        questions,
        CLASS,
        {"tokenizer": letter_tokenizer(), "task": "text-choice"},
    ),
    "preferences": Problem(
        llama_reward, preferences, CLASS, {"tokenizer": letter_tokenizer(), "adapter": SMALL}
    ),
}
BRIEF = {
    "several labels",
    "question answering",
    "sequence to sequence",
    "choices by letters",
    "choices by texts",
    "preferences",
}
WITHOUT_HEAD = {
    *("masked language model", "llama", "gpt-2", "plain regression", "sequence to sequence"),
    *("choices by letters", "choices by texts"),
}
DEFAULT = "montec"
WITHOUT_DENSITY = {"map", "ensemble", "nuts", "dropout", "full", "tfb"}
VARIANTS: dict[str, Guide] = {
    **{name: guides.as_guide(name) for name in guides.available()},
    "map with a prior": MAP(prior_scale=0.5),
    "montec as in the paper": MonteCLoRA.paper(),
    "montec with all options": MonteCLoRA(
        component_prior="hierarchical",
        covariance="full",
        latent="AB",
        learn_sample_scale=True,
        cooperation=0.5,
        kl_weight=1.0,
        kl_warmup=0.5,
        init_covariance=0.5,
        prior_mean="zero",
    ),
    "montec by curvature": MonteCLoRA(
        scale_updates="curvature",
        units="fan_in",
        sample_scale=1.6,
        prior_mean="start",
        covariance="full",
        latent="AB",
    ),
    "mean field by curvature": MeanField(
        scale_updates="curvature", units="fan_in", prior_scale=1.0, prior_mean="learned", latent="B"
    ),
    "hierarchical montec on both": MonteCLoRA(component_prior="hierarchical", latent="AB"),
    "montec by examples held back": MonteCLoRA(hold_back=0.3),
    "absolute montec": absolute(MonteCLoRA),
    "absolute mean field": absolute(MeanField),
    "mean field on B, trained": MeanField(latent="B", scale_updates="gradient"),
    "sparse montec on B": MonteCLoRA(sparse=True, latent="B", num_components=1),
    "montec with two draws a batch": MonteCLoRA(draws_per_batch=2),
    "montec around zero": MonteCLoRA(prior_mean="zero", draws_per_batch=2),
    "mean field on both": MeanField(latent="AB", draws_per_batch=5, kl_warmup=0.5),
    "low rank on both": LowRank(latent="AB", rank=3, draws_per_batch=2),
    "swag with a prior": SWAG(prior_scale=0.5, latent="A", rank=2, snapshots=2),
    "flat swag": Flat(inner=SWAG(latent="B")),
    "dropout of ranks": Dropout(unit="rank", p=0.5, draws_per_batch=1),
    "flat montec, also at prediction": Flat(inner=MonteCLoRA(), rho=0.1, at_prediction=True),
    "flat ensemble": Flat(inner=Ensemble(members=2)),
    "ensemble side by side": Ensemble(members=3, side_by_side=True),
    "flat laplace on A": Flat(inner=Laplace(latent="A", prior_scale=0.5)),
    "sampled laplace": Laplace(linearised=False, latent="B"),
    "flat montec with a Gaussian head": Flat(
        inner=MonteCLoRA(draws_per_batch=2), head="gaussian", at_prediction=True
    ),
    "linearised laplace with a Gaussian head": Laplace(prior_scale=0.5, head="gaussian"),
    "laplace by validation": Laplace(tune="validation"),
    "full laplace": Laplace(curvature="full", num_draws=3),
    "full laplace on B": Laplace(curvature="full", latent="B", tune="validation"),
    # Too short to be of use: longer chains are tested elsewhere.
    "nuts": NUTS(num_samples=4, warmup_steps=2, max_tree_depth=2),
    "nuts on montec": NUTS(
        inner=MonteCLoRA(component_prior="hierarchical", kl_weight=0.5),
        chains=1,
        num_samples=4,
        warmup_steps=2,
        max_tree_depth=2,
    ),
}


def cases() -> Iterator[Any]:
    """The default guide on every problem, others on half, and every variant on a fifth.

    Which ones differs from guide to guide, so that each problem meets half of the guides and a
    fifth of the variants. The `BRIEF` problems meet a quarter of the registered guides, and no
    variant. `make verify` runs the rest.
    """
    for i, problem in enumerate(PROBLEMS):
        for j, variant in enumerate(VARIANTS):
            registered = variant in guides.available()
            if variant == DEFAULT:
                first = True
            elif problem in BRIEF:
                first = registered and (i + j) % 4 == 0
            else:
                first = (i + j) % (2 if registered else 5) == 0
            yield pytest.param(problem, variant, marks=() if first else pytest.mark.slow)


def has_prior(guide: Guide) -> bool:
    """SWAG may go without a prior."""
    inner = getattr(guide, "inner", guide)
    return not isinstance(inner, SWAG) or inner.prior_scale is not None


def predicted_from(folder: Path, problem: str) -> Any:
    """Load a posterior in another process, and return its predictions on the test data."""
    case = PROBLEMS[problem]
    loaded = pyrolora.load(folder, case.network())
    return loaded.predict(case.data(7), num_samples=3, seed=0).log_likelihood.numpy()


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    """A process that has fitted nothing."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), one_thread) as pool:
        yield pool


def one_thread() -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()


@pytest.mark.filterwarnings("ignore:the noise of 'tfb'")  # of networks that learnt next to nothing
@pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")
@pytest.mark.parametrize(("problem", "variant"), [*cases()])
def test_conformance(
    problem: str, variant: str, tmp_path: Path, elsewhere: ProcessPoolExecutor
) -> None:
    case, guide = PROBLEMS[problem], VARIANTS[variant]
    started = getattr(case.options.get("adapter"), "init_lora_weights", "") == "lora-ga"
    if started and variant == "ensemble side by side":
        pytest.skip("is refused: all members would stay the same")
    per_token = case.metrics in (TEXT, SPAN) or case.data is tagged
    if variant.startswith("full laplace") and per_token:
        pytest.skip("is refused: every token has outputs of its own")
    if guide.head == "gaussian" and problem in WITHOUT_HEAD:
        with pytest.raises(ConfigError, match="has no task head"):
            pyrolora.fit(case.network(), case.data(12), guide=guide, seed=1, **case.options)
        return
    network = case.network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    posterior = pyrolora.fit(
        network,
        case.data(12),
        guide=guide,
        eval_data=case.data(6),
        epochs=2,
        batch_size=5,
        seed=1,
        **{k: v for k, v in case.options.items() if k != "adapter" or guide.adapts},
    )
    assert all(torch.isfinite(t).all() for t in posterior.model.own_state().values())
    posterior.temperature = 1.0  # which no other format holds

    draws = posterior.sample(3, seed=0)
    assert all(len(values) == 3 and torch.isfinite(values).all() for values in draws.values())
    factors = posterior.factors(draws)
    for name, spec in posterior.bank.specs.items():
        rank = spec.rank * (2 if started else 1)  # the start is taken off with as many ranks
        assert factors[name][0].shape[-2:] == (rank, spec.in_features)
        assert factors[name][1].shape[-2:] == (spec.out_features, rank)

    test = case.data(7)
    prediction = posterior.predict(test, num_samples=3, seed=0)
    rows = len(prediction.examples)
    assert {*prediction.examples.tolist()} == {*range(7)}
    assert len(prediction.to_pandas()) == rows
    assert prediction.log_likelihood is not None
    assert prediction.log_likelihood.shape == (3, rows)
    scores = posterior.evaluate(test, num_samples=3, seed=0)
    assert set(scores) == case.metrics
    if scores.get("accuracy") in (0.0, 1.0):  # nothing to rank wrong answers against
        scores.pop("error_auroc")
    assert all(torch.isfinite(torch.tensor(value)) for value in scores.values())
    row = pyrolora.compare({"it": posterior}, test, 3, seed=0).loc["it"]
    assert row["nll"] == pytest.approx(scores["nll"])
    assert torch.isfinite(torch.tensor(risk_coverage(prediction).to_numpy())).all()
    if "accuracy" in scores or "rmse" in scores:
        found = Conformal(prediction, 0.5).evaluate(prediction)  # but for one on the threshold
        assert 3 / 7 <= found["coverage"] + 1e-6 <= 1.1
    if posterior.task.name == "text-generation":
        found = posterior.generate(["the film", "good"], 3, max_new_tokens=2, seed=0)
        assert found.log_likelihood.shape == (3, 2, 3)
        assert torch.isfinite(found.log_predictive).all()
    idata = posterior.to_arviz(4, data=test, log_likelihood=True)
    sizes = idata["posterior"].sizes
    assert sizes["chain"] * sizes["draw"] == 4
    assert idata["log_likelihood"]["y"].shape == (sizes["chain"], sizes["draw"], rows)
    assert len(posterior.summary(8)) >= len(posterior.bank.specs)
    stored = posterior.model.program.stored() is not None
    without = WITHOUT_DENSITY & set(guides.full_name(guide).split("+"))
    if without or stored or not has_prior(guide):
        with pytest.raises(ConfigError, match="khat"):
            posterior.khat(case.data(12))
    else:
        assert not math.isnan(posterior.khat(case.data(12), 25, seed=0).khat)

    posterior.save(tmp_path)
    loaded = pyrolora.load(tmp_path, case.network())
    assert loaded.options == guide
    again = elsewhere.submit(predicted_from, tmp_path, problem).result()
    torch.testing.assert_close(torch.from_numpy(again), prediction.log_likelihood)

    merged = posterior.merge()
    assert type(merged) is type(network)
    if guide.adapts:
        posterior.to_peft(tmp_path / "peft")
        read = read_adapter(tmp_path / "peft", case.network())
        for layer, (A, B) in posterior.factors().items():
            torch.testing.assert_close(read.matrices[layer], (A.float(), B.float()))
    else:
        with pytest.raises(ConfigError, match="merge"):
            posterior.to_peft(tmp_path / "peft")
    assert all(torch.equal(before[n], t) for n, t in network.state_dict().items())
    posterior.detach()
    assert list(network.state_dict()) == list(before)


# Capabilities -----------------------------------------------------------------------------------

ADAPTING = [name for name, guide in VARIANTS.items() if guide.adapts]
WITHOUT_WIDTH_IN_TRAINING = {"map", "laplace", "tfb", "swag", "dropout", "nuts"}
"""Guides whose draws in training are a point, or have no prior: 'snr' cannot judge their ranks."""
REFUSED_AS_PRIOR = {
    "montec as in the paper": "df_per_rank > 1.5",
    "flat montec with a Gaussian head": "the task head stays as it is, got head='gaussian'",
}
"""Variants whose options leave an earlier posterior no density."""
GRADIENT = {"scale_updates": "gradient"}


def small(guide: Guide | str, **options: Any) -> AdapterConfig:
    """Adapters of the plain classifier, whose last layer is a head where that has a law."""
    gaussian = guides.as_guide(guide).head == "gaussian"
    return AdapterConfig(r=2, modules_to_save=["2"] if gaussian else None, **options)


def short_fit(network: nn.Module | pyrolora.Posterior, **options: Any) -> pyrolora.Posterior:
    """A fit of the plain classifier; what an earlier posterior brings is not asked for again."""
    fresh = isinstance(network, nn.Module) and "prior" not in options
    defaults: dict[str, Any] = {"eval_data": pairs(3)(6), "batch_size": 6, "seed": 1}
    if fresh:
        adapter = small(options["guide"])
        defaults |= {"task": "classification", "adapter": adapter, "epochs": 2}
    return pyrolora.fit(network, pairs(3)(12), **{**defaults, **options})


def is_whole(posterior: pyrolora.Posterior, folder: Path) -> None:
    """It predicts finite numbers, and comes back from a folder as it was."""
    test = (pairs(3)(7)[0],)
    before = posterior.predict(test, num_samples=3, seed=0).draws
    assert torch.isfinite(before).all()
    posterior.save(folder)
    posterior.detach()
    loaded = pyrolora.load(folder, mlp())
    torch.testing.assert_close(loaded.predict(test, num_samples=3, seed=0).draws, before)


@pytest.mark.parametrize("importance", ["alora", "snr"])
@pytest.mark.parametrize("variant", ADAPTING)
@pytest.mark.filterwarnings("ignore:the noise of 'tfb'")
@pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")
def test_ranks_move_where_the_guide_states_it(
    variant: str, importance: str, tmp_path: Path
) -> None:
    guide = VARIANTS[variant]
    adapter = small(guide, rank_allocation=importance)
    core = guides.full_name(guide).split("+")
    refused = importance == "snr" and (core[-1] in WITHOUT_WIDTH_IN_TRAINING or core[0] == "nuts")
    if not guide.supports.rank_allocation:
        with pytest.raises(ConfigError, match=rf"{importance}.*does not support"):
            short_fit(mlp(), guide=guide, adapter=adapter)
    elif refused:
        with pytest.raises(ConfigError, match=r"'snr'.*infers none"):
            short_fit(mlp(), guide=guide, adapter=adapter)
    else:
        posterior = short_fit(mlp(), guide=guide, adapter=adapter)
        assert sum(posterior.ranks.values()) == 2 * len(posterior.ranks)
        assert any("ranks_lost" in entry for entry in posterior.history)
        is_whole(posterior, tmp_path)


@pytest.mark.parametrize("variant", ADAPTING)
@pytest.mark.filterwarnings("ignore:the noise of 'tfb'")
@pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")
def test_an_earlier_posterior_is_the_prior_where_the_guide_states_it(
    variant: str, tmp_path: Path
) -> None:
    guide = VARIANTS[variant]
    first = short_fit(mlp(), guide=guide)
    if getattr(guide, "scale_updates", None) == "curvature":  # which knows no earlier posterior
        guide = replace(guide, **GRADIENT)
    if not guide.supports.prior or variant in REFUSED_AS_PRIOR:
        words = REFUSED_AS_PRIOR.get(variant, f"'{guides.full_name(guide)}' cannot be the prior")
        with pytest.raises(ConfigError, match=re.escape(words)):
            short_fit(mlp(), guide=guide, prior=first, epochs=2)
        return
    later = short_fit(mlp(), guide=guide, prior=first, epochs=2)
    assert later.model.program.previous is not None
    is_whole(later, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:the noise of 'tfb'")
@pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")
def test_a_posterior_around_given_means_where_the_guide_states_it(
    variant: str, tmp_path: Path
) -> None:
    guide = VARIANTS[variant]
    given = short_fit(mlp(), guide="map", adapter=small(guide))
    means = {name: tensor.clone() for name, tensor in given.bank.state_dict().items()}
    if guide.supports.post_hoc is None:
        with pytest.raises(ConfigError, match=f"'{re.escape(guides.full_name(guide))}'"):
            short_fit(given, guide=guide)
        return
    options = {"epochs": 2} if guide.supports.post_hoc == "trained" else {}
    posterior = short_fit(given, guide=guide, **options)
    kept = posterior.bank.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in means.items())
    given.detach()
    is_whole(posterior, tmp_path)

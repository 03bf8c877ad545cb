"""Posteriors whose layers have differing ranks, for every guide that can move them: one function,
whether it is predicted, saved, merged, or exported; and everything else that is asked of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from problems import absolute, bert, llama, reviews, tokenizer, tokens

import pyrolora
from pyrolora import AdapterConfig, Posterior, guides
from pyrolora.adapters import bind
from pyrolora.adapters.config import RankAllocation
from pyrolora.diagnostics.contraction import contractions
from pyrolora.guides import (
    NUTS,
    SWAG,
    Dropout,
    Flat,
    Guide,
    Laplace,
    LowRank,
    MeanField,
    MonteCLoRA,
)
from pyrolora.report.facts import posterior_facts

NETWORKS: dict[str, Any] = {
    "encoder": lambda: bert(initializer_range=0.3),
    "llama": lambda: llama(initializer_range=0.3),
}
GUIDES: dict[str, Guide] = {
    "map": guides.as_guide("map"),
    "montec": MonteCLoRA(draws_per_batch=2),
    "hierarchical montec": MonteCLoRA(
        component_prior="hierarchical", covariance="full", latent="AB", learn_sample_scale=True
    ),
    "mean field": absolute(MeanField),
    "mean field on both": absolute(MeanField, latent="AB"),
    "relative mean field on both": MeanField(latent="AB"),
    "low rank on both": LowRank(latent="AB", rank=2),
    "flat montec": Flat(inner=MonteCLoRA()),
    "swag": SWAG(),
    "dropout": Dropout(p=0.3),
    "laplace": Laplace(prior_scale=0.5),
    "nuts": NUTS(num_samples=4, warmup_steps=2, max_tree_depth=2, chains=1),
    "nuts on both": NUTS(
        inner=MeanField(latent="AB", kl_weight=1.0),
        num_samples=4, warmup_steps=2, max_tree_depth=2, chains=1,
    ),
}  # fmt: skip
POINTS = {"map", "laplace", "swag", "dropout", "nuts", "nuts on both"}
IN_BRIEF = {"map", "montec", "low rank on both", "nuts on both"}
"""Guides on the language model; `make verify` has the rest of them on it."""
CASES = [
    *(("encoder", guide, "alora") for guide in GUIDES),
    *(("encoder", guide, "snr") for guide in GUIDES if guide not in POINTS),
    *(
        pytest.param("llama", guide, "alora", marks=() if guide in IN_BRIEF else pytest.mark.slow)
        for guide in GUIDES
    ),
]
# Encoder and language model have the same data, and the latter reads no label.
pytestmark = pytest.mark.filterwarnings(r"ignore:the columns \['label'\] are not read")
NO_WARNING = pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")


def data(n: int, seed: int = 0) -> Any:
    return reviews(n, seed)


def fitted(network: str, guide: str, kind: str) -> Posterior:
    allocation = RankAllocation(importance=kind, rounds=4)
    return pyrolora.fit(
        NETWORKS[network](), data(12), guide=GUIDES[guide], eval_data=data(6, seed=1),
        tokenizer=tokenizer(), adapter=AdapterConfig(r=3, rank_allocation=allocation),
        epochs=4, batch_size=4, learning_rate=0.03, seed=1,
    )  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    batch = {"input_ids": torch.tensor(tokens(5)["input_ids"][:])}
    with torch.no_grad():
        return model(**batch).logits


@NO_WARNING
@pytest.mark.parametrize(("network", "guide", "kind"), CASES)
def test_differing_ranks_are_one_posterior_wherever_they_go(
    network: str, guide: str, kind: str, tmp_path: Path
) -> None:
    posterior = fitted(network, guide, kind)
    ranks = posterior.ranks
    assert len(set(ranks.values())) > 1
    assert sum(ranks.values()) == 3 * len(ranks)

    draws = posterior.sample(3, seed=0)
    for factors in (posterior.factors(), posterior.factors(draws)):
        for name, (A, B) in factors.items():
            spec = posterior.bank.specs[name]
            assert B.shape[-2] == spec.out_features
            assert A.shape[-1] == spec.in_features
            assert A.shape[-2] == B.shape[-1]
    drawn = posterior.factors(draws)
    assert {name: A.shape[-2] for name, (A, _) in drawn.items()} == ranks

    posterior.save(tmp_path / "saved")
    again = pyrolora.load(tmp_path / "saved", NETWORKS[network]())
    assert again.ranks == ranks
    assert again.bank.config == posterior.bank.config
    test = data(7, seed=2)
    expected = posterior.predict(test, num_samples=3, seed=0).log_likelihood
    found = again.predict(test, num_samples=3, seed=0).log_likelihood
    torch.testing.assert_close(found, expected)

    mean = posterior.model.program.mean()
    with bind(posterior.model.binding(mean)):
        own = logits(posterior.base)
    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(logits(posterior.merge()), own, **close)
    posterior.to_peft(tmp_path / "peft")
    told = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    if not mean.pooled:
        assert {told["r"], *told["rank_pattern"].values()} == set(ranks.values())
    theirs = peft.PeftModel.from_pretrained(NETWORKS[network](), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs), own, **close)
    given = pyrolora.from_peft(tmp_path / "peft", NETWORKS[network](), tokenizer=tokenizer())
    if not mean.pooled:
        assert given.ranks == ranks
    with bind(given.model.binding(given.model.program.mean())):
        torch.testing.assert_close(logits(given.base), own, **close)


@NO_WARNING
@pytest.mark.parametrize("guide", GUIDES)
def test_arviz_the_page_and_khat_count_the_ranks_in_use(guide: str) -> None:
    posterior = fitted("encoder", guide, "alora")
    bank, ranks = posterior.bank, posterior.ranks
    idata = posterior.to_arviz(4, data=data(5), log_likelihood=True, factors=True)
    group = idata["posterior"]
    for name, rank in ranks.items():
        assert group[f"A[{name}]"].shape[2:] == (rank, 16)
        assert group[f"B[{name}]"].shape[2:] == (16, rank)
    norms = torch.tensor(group["adapter_norm"].values[0])
    for i, name in enumerate(ranks):
        A, B = (torch.tensor(group[f"{f}[{name}]"].values[0]) for f in "AB")
        expected = bank.specs[name].scaling * torch.linalg.matrix_norm(B @ A)
        torch.testing.assert_close(norms[:, i], expected, atol=1e-5, rtol=1e-4)
    if "factor_norm" in group:
        blocks = list(group["block"].values)
        for name in ranks:
            if f"{name}.A" in blocks:
                own = group["factor_norm"].values[0][:, blocks.index(f"{name}.A")]
                A = torch.tensor(group[f"A[{name}]"].values[0])
                torch.testing.assert_close(torch.tensor(own), torch.linalg.matrix_norm(A))
    if "signal_to_noise" in group:
        numbers = group["signal_to_noise"].values[0]
        rows = bank.rows("AB" if "hierarchical" in guide else "A")
        assert ((torch.tensor(numbers) > 0) <= rows).all()
    assert len(posterior.summary(8)) >= len(ranks)
    facts = posterior_facts(posterior)
    assert facts["rank"] == ", ".join(map(str, sorted(set(ranks.values()))))
    assert facts["entries of the adapters"] == f"{32 * sum(ranks.values()):,}"
    if guide.startswith("mean field"):  # idle entries have the prior's scale, ten times as wide
        assert all(c.scale < 0.3 for c in contractions(posterior.model.program))


@pytest.mark.parametrize("guide", ["montec", "mean field", "mean field on both", "laplace"])
def test_khat_counts_what_is_in_use_and_layers_add_up(guide: str) -> None:
    posterior = fitted("encoder", guide, "alora")
    whole = posterior.khat(data(12), 25, seed=0)
    layers = posterior.khat(data(12), 25, seed=0, per_layer=True)
    assert isinstance(layers, dict)
    assert not isinstance(whole, dict)
    assert sum(layer.dimensions for layer in layers.values()) == whole.dimensions
    assert not any(math.isnan(layer.khat) for layer in [whole, *layers.values()])
    if guide != "montec":
        factors = 2 if guide != "mean field" else 1
        assert {n: layer.dimensions for n, layer in layers.items()} == {
            name: factors * 16 * rank for name, rank in posterior.ranks.items()
        }


@pytest.mark.parametrize("guide", ["mean field on both", "laplace"])
def test_what_idle_ranks_are_changes_no_khat(guide: str) -> None:
    """The weight of a draw is that of its entries in use."""
    from pyrolora.diagnostics import importance

    posterior = fitted("encoder", guide, "alora")
    program = posterior.model.program
    draws = {name: value.unsqueeze(-2) for name, value in program.draw(5).items()}
    before, _ = importance._prior_over_guide(program, draws)
    other = {}
    for name, value in draws.items():
        idle = ~program.bank.entries(name)
        other[name] = torch.where(idle, torch.randn_like(value), value)
        assert not torch.equal(other[name], value)
    after, _ = importance._prior_over_guide(program, other)
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-5)


def test_ranks_of_a_uniform_fit_are_those_of_the_configuration() -> None:
    config = AdapterConfig(r=2, rank_pattern={"key": 3})
    posterior = pyrolora.fit(bert(), tokens(), guide="map", adapter=config, epochs=1)
    assert {n: 3 if n.endswith("key") else 2 for n in posterior.bank.specs} == posterior.ranks


def test_generated_text_and_a_page_of_a_posterior_with_differing_ranks(tmp_path: Path) -> None:
    posterior = fitted("llama", "montec", "alora")
    found = posterior.generate(["the film"], 2, max_new_tokens=2, seed=0)
    assert torch.isfinite(found.log_predictive).all()
    page = fitted("encoder", "montec", "snr").report(tmp_path / "page.html", data(6), seed=0)
    assert page.is_file()


def test_an_earlier_posterior_keeps_its_ranks() -> None:
    """And needs no evaluation data, since none move."""
    first = fitted("encoder", "mean field", "alora")
    later = pyrolora.fit(first.base, data(12, seed=2), prior=first, epochs=1)
    assert later.ranks == first.ranks
    assert len({*first.ranks.values()}) > 1


def test_idle_ranks_are_zero_in_the_mean_of_swags_iterates() -> None:
    """The last ranks go at the step after which iterates are collected."""
    posterior = pyrolora.fit(
        NETWORKS["encoder"](),
        data(24),
        guide=SWAG(start=0.5),
        eval_data=data(6, seed=1),
        tokenizer=tokenizer(),
        adapter=AdapterConfig(r=3, rank_allocation=RankAllocation(end=0.5)),
        epochs=4,
        batch_size=6,
    )
    bank = posterior.bank
    for factor in "AB":
        idle = bank.get_parameter(f"{factor}_loc")[~bank.entries(factor)]
        assert len(idle)
        assert not idle.any()

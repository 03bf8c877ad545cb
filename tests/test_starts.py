"""Fits whose adapters start from the weights or their gradient: nothing changes at the start, and
what is saved, merged and exported has the start in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pyro
import pytest
import torch
from peft import PeftModel
from problems import absolute, batch_of, bert, gpt2, mlp, tokens
from torch import Tensor, nn

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.adapters import as_adapter_config, bind
from pyrolora.errors import ConfigError
from pyrolora.guides import MAP, Ensemble, Guide, Laplace, MeanField, MonteCLoRA
from pyrolora.inference import NamedELBO

# Some fits here are to stay at the start, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:training has not moved")

STARTS = ("lora-ga", "pissa", "olora")
MIXED: dict[str, Any] = {
    "r": 3,
    "target_modules": "all-linear",
    "exclude_modules": ["classifier"],
    "rank_pattern": {"key": 1},
    "alpha_pattern": {"key": 4},
}
ONE = {"r": 2, "modules_to_save": []}


def strong_bert() -> nn.Module:
    return bert(initializer_range=0.3)


def fitted(guide: str | Guide = "map", start: str = "lora-ga", **changes: Any) -> Posterior:
    network = changes.pop("network", None) or strong_bert()
    adapter = changes.pop("adapter", MIXED)
    options = {"epochs": 2, "batch_size": 4, "learning_rate": 0.02, "seed": 5, **changes}
    adapter = AdapterConfig(init_lora_weights=start, **adapter)
    data = tokens() if hasattr(network, "classifier") else tokens().remove_columns("labels")
    return pyrolora.fit(network, data, guide=guide, adapter=adapter, **options)


def logits(network: nn.Module) -> Tensor:
    batch = batch_of(tokens(6))
    with torch.no_grad():
        return network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def mean_logits(posterior: Posterior) -> Tensor:
    joint = posterior.model
    with torch.no_grad(), bind(joint.binding(joint.program.mean())):
        return logits(posterior.base)


def moved(posterior: Posterior) -> float:
    bank = posterior.bank
    means = bank.state_dict()
    return sum(float((means[f"{f}_loc"] - means[f"{f}_start"]).norm()) for f in "AB")


@pytest.fixture(scope="module", params=STARTS)
def trained(request: pytest.FixtureRequest) -> Posterior:
    return fitted(start=request.param)


# At the start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", STARTS)
def test_the_function_at_the_start_is_the_networks_to_the_last_bit(
    start: str, dtype: torch.dtype
) -> None:
    for make, adapter in ((strong_bert, MIXED), (gpt2, ONE)):
        network = make().to(dtype)
        expected = logits(network)
        options = {"network": network, "adapter": {**adapter, "modules_to_save": []}}
        posterior = fitted(start=start, learning_rate=1e-30, **options)
        assert moved(posterior) == 0
        assert posterior.bank.A_loc.any()
        assert posterior.bank.B_loc.any()
        assert torch.equal(mean_logits(posterior), expected)
        assert not posterior.bank.update_norms(posterior.bank.means()).any()


def test_the_start_of_lora_ga_is_that_of_the_batch_that_the_seed_chose() -> None:
    first, again, other = (fitted(epochs=1, seed=seed).bank.A_start for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-2


@pytest.mark.parametrize("make", [strong_bert, gpt2, mlp])
def test_the_network_stays_as_it_was(make: Callable[[], nn.Module]) -> None:
    network = make()
    before = copy.deepcopy(network)
    if make is mlp:
        data = (torch.randn(12, 4), torch.arange(12) % 3)
        adapter = AdapterConfig(r=1, init_lora_weights="lora-ga")
        pyrolora.fit(network, data, "map", task="classification", adapter=adapter).detach()
    else:
        fitted(network=network, adapter=ONE).detach()
    for (name, own), (_, old) in zip(
        network.named_parameters(), before.named_parameters(), strict=True
    ):
        assert torch.equal(own, old), name
        assert own.requires_grad == old.requires_grad
        assert own.grad is None


# The function that is trained ---------------------------------------------------------------------


def test_saving_and_loading_keep_the_start(trained: Posterior, tmp_path: Path) -> None:
    trained.save(tmp_path)
    loaded = pyrolora.load(tmp_path, strong_bert())
    assert torch.equal(loaded.bank.A_start, trained.bank.A_start)
    assert torch.equal(mean_logits(loaded), mean_logits(trained))
    assert moved(trained) > 1e-2


def test_the_merged_network_has_the_function(trained: Posterior) -> None:
    torch.testing.assert_close(logits(trained.merge()), mean_logits(trained), atol=1e-4, rtol=1e-4)
    assert (mean_logits(trained) - logits(strong_bert())).abs().max() > 0.05


def test_peft_loads_the_export_on_the_unmodified_network(
    trained: Posterior, tmp_path: Path
) -> None:
    """As a plain LoRA of twice the rank; and it comes back as a posterior."""
    trained.to_peft(tmp_path)
    model = PeftModel.from_pretrained(strong_bert(), tmp_path)
    torch.testing.assert_close(logits(model), mean_logits(trained), atol=1e-4, rtol=1e-4)
    config = model.peft_config["default"]
    assert (config.r, config.init_lora_weights) == (6, True)
    back = pyrolora.from_peft(tmp_path, strong_bert())
    torch.testing.assert_close(mean_logits(back), mean_logits(trained), atol=1e-4, rtol=1e-4)
    assert back.bank.origin is None


@pytest.mark.parametrize("start", STARTS)
def test_a_draw_is_exported_too(start: str, tmp_path: Path) -> None:
    posterior = fitted(MonteCLoRA(sample_scale=0.3, latent="AB"), start, epochs=1)
    posterior.to_peft(tmp_path, draw=3)
    model = PeftModel.from_pretrained(strong_bert(), tmp_path)
    sites = posterior.sample(draws=[3])
    joint = posterior.model
    with torch.no_grad(), bind(joint.binding(joint.program.factors(sites)[0])):
        expected = logits(posterior.base)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert (expected - mean_logits(posterior)).abs().max() > 1e-2


def test_factors_multiply_to_the_update(trained: Posterior) -> None:
    merged, base = trained.merge(), strong_bert()
    for name, (A, B) in trained.factors().items():
        spec = trained.bank.specs[name]
        assert A.shape[0] == 2 * spec.rank
        update = merged.get_submodule(name).weight - base.get_submodule(name).weight
        torch.testing.assert_close(spec.scaling * B @ A, update, atol=1e-5, rtol=1e-4)


def test_arviz_gets_the_factors_beside_the_scales_of_the_ranks() -> None:
    posterior = fitted("montec", epochs=1)
    found = posterior.to_arviz(4, factors=True, seed=0)["posterior"]
    sizes = {n: v.shape[-2] for n, v in found.data_vars.items() if str(n).startswith("A[")}
    assert set(sizes.values()) == {2, 6}
    assert found["covariance"].shape[-1] == 3


# Ensembles, and fits on top of a posterior --------------------------------------------------------


def test_members_share_the_start_and_differ_after_it(tmp_path: Path) -> None:
    posterior = fitted(Ensemble(members=3))
    program: Any = posterior.model.program
    start = posterior.bank.origin
    assert start is not None
    alone = fitted()
    assert torch.equal(alone.bank.A_start, start.A)
    assert torch.equal(alone.bank.A_loc, program.A_locs[0])
    assert (program.A_locs[0] - program.A_locs[1]).abs().max() > 1e-3
    bank = posterior.bank
    each = bank.matrices(program.factors(program.pick(torch.arange(3))))
    mean = bank.matrices(program.mean())
    for name, (A, B) in each.items():
        left, right = mean[name]
        torch.testing.assert_close(right @ left, (B @ A).mean(0), atol=1e-5, rtol=1e-4)
    posterior.to_peft(tmp_path)
    model = PeftModel.from_pretrained(strong_bert(), tmp_path)
    torch.testing.assert_close(logits(model), mean_logits(posterior), atol=1e-4, rtol=1e-4)


def test_members_begin_where_the_bank_does() -> None:
    posterior = fitted(Ensemble(members=2), learning_rate=1e-30)
    program: Any = posterior.model.program
    for factor, start in (("A_locs", posterior.bank.A_start), ("B_locs", posterior.bank.B_start)):
        assert torch.equal(program.get_parameter(factor), start.expand(2, -1))


def test_members_that_would_stay_the_same_are_refused() -> None:
    with pytest.raises(ConfigError, match="side_by_side out"):
        fitted(Ensemble(members=2, side_by_side=True))


@pytest.mark.parametrize("guide", ["montec", "meanfield", "laplace"])
def test_a_fit_on_top_of_a_posterior_keeps_its_start(guide: str) -> None:
    given = fitted()
    after = pyrolora.fit(given, tokens(), guide, batch_size=4, seed=1)
    for name in ("A_start", "B_start", "A_loc", "B_loc"):
        assert torch.equal(getattr(after.bank, name), getattr(given.bank, name))
    assert torch.equal(mean_logits(after), mean_logits(given))


# Priors -------------------------------------------------------------------------------------------

PRIORS: dict[str, Guide] = {
    "meanfield": absolute(MeanField, latent="AB", kl_weight=1.0),
    "map": MAP(prior_scale=0.5),
    "montec": MonteCLoRA(prior_mean="zero", latent="AB", kl_weight=1.0, sample_scale=0.1),
    "hierarchical": MonteCLoRA(
        prior_mean="zero", component_prior="hierarchical", df_per_rank=4, kl_weight=1.0
    ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_around_zero_is_around_the_start(name: str) -> None:
    """At the start the means cost nothing, and away from it what the distance costs around zero in
    a bank without a start."""
    guide = PRIORS[name]
    with_start, without = (fitted(guide, s, learning_rate=1e-30) for s in ("pissa", "kaiming"))
    own, plain = with_start.model.program, without.model.program
    state = {n: t for n, t in own.state_dict().items() if not n.startswith("bank.")}
    plain.load_state_dict({**plain.state_dict(), **state})

    def cost(program: Any, A: Tensor, B: Tensor) -> float:
        program.bank.assign("A_loc", A)
        program.bank.assign("B_loc", B)
        torch.manual_seed(0)
        elbo = NamedELBO()
        with torch.no_grad():
            elbo.differentiable_loss(lambda: program.model(), lambda: program.guide())
        return float(sum(t for n, t in elbo.terms.items() if n.startswith("kl/")))

    A0, B0 = with_start.bank.A_start, with_start.bank.B_start
    step_a, step_b = 0.3 * torch.randn_like(A0), 0.3 * torch.randn_like(B0)
    at_start = cost(own, A0, B0)
    assert at_start == pytest.approx(cost(plain, 0 * A0, 0 * B0), rel=1e-5)
    away = cost(own, A0 + step_a, B0 + step_b)
    assert away == pytest.approx(cost(plain, step_a, step_b), rel=1e-4)
    assert away > at_start + 1
    assert cost(own, 0 * A0, 0 * B0) > at_start + 1


def test_laplace_is_around_the_start() -> None:
    posterior = fitted(Laplace(), learning_rate=1e-30)
    program: Any = posterior.model.program
    _, means = program.evidence()
    assert not any(mean.any() for mean in means)
    with torch.no_grad():
        laws = pyro.poutine.trace(program.model).get_trace().nodes
    assert torch.equal(laws["A"]["fn"].mean, posterior.bank.A_start)
    assert torch.equal(laws["B"]["fn"].mean, posterior.bank.B_start)


# Configurations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
def test_a_lora_config_of_pefts_says_the_same(start: str) -> None:
    options: dict[str, Any] = {"r": 3, "target_modules": ["query", "key"]}
    if start == "lora-ga":
        options["lora_ga_config"] = peft.LoraGAConfig()
    given = peft.LoraConfig(**options, init_lora_weights=start.replace("-", "_"))
    config = as_adapter_config(given)
    assert (config.init_lora_weights, config.r) == (start, 3)


@pytest.mark.parametrize(
    "changes", [{"direction": "ArBr"}, {"scale": "unit"}, {"stable_gamma": 64}]
)
def test_other_settings_of_pefts_lora_ga_are_refused(changes: dict[str, Any]) -> None:
    own = peft.LoraGAConfig(**changes)
    config = peft.LoraConfig(r=3, init_lora_weights="lora_ga", lora_ga_config=own)
    with pytest.raises(ConfigError, match="lora_ga_config"):
        as_adapter_config(config)

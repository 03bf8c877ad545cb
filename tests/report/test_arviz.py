"""The posterior in ArviZ: groups, names, values; and ArviZ's own functions on them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from problems import bert, mlp, tokens

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError
from pyrolora.guides import MAP, NUTS, Ensemble, Flat, MonteCLoRA

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ArviZ announces its refactoring at import
    import arviz as az


@pytest.fixture(scope="module")
def posterior():
    return pyrolora.fit(
        bert(initializer_range=0.3), tokens(), guide=MonteCLoRA(sample_scale=0.5), epochs=3,
        adapter=AdapterConfig(r=2), learning_rate=0.02, seed=0,
    )  # fmt: skip


def test_default_variables_have_named_dimensions_and_labels(posterior):
    group = posterior.to_arviz(20)["posterior"]
    assert dict(group.sizes) == {
        "chain": 1, "draw": 20, "block": 6, "component": 4, "rank": 2, "rank_": 2, "layer": 6,
    }  # fmt: skip
    assert group["mixture_weights"].dims == ("chain", "draw", "block", "component")
    assert group["covariance"].dims == ("chain", "draw", "block", "rank", "rank_")
    assert group["signal_to_noise"].dims == ("chain", "draw", "block", "rank")
    assert group["adapter_norm"].dims == ("chain", "draw", "layer")
    layers = [str(name) for name in group["layer"].values]
    assert layers[0] == "bert.encoder.layer.0.attention.self.query"
    assert [str(b) for b in group["block"].values] == [f"{name}.A" for name in layers]
    assert group.attrs["guide"] == "montec"
    assert group.attrs["inference_library"] == "pyrolora"


def test_derived_quantities_are_what_their_names_say(posterior):
    draws = posterior.sample(5, seed=3)
    group = posterior.to_arviz(5, seed=3)["posterior"]
    for index, (name, (A, B)) in enumerate(posterior.factors(draws).items()):
        norm = torch.linalg.matrix_norm(8.0 * B @ A)  # s = 16 / 2
        found = group["adapter_norm"].sel(layer=name).values[0]
        assert found == pytest.approx(norm.numpy(), rel=1e-3)
        tril = draws["covariance_tril"][:, index]
        covariance = group["covariance"].isel(block=index).values[0]
        np.testing.assert_allclose(covariance, (tril @ tril.mT).numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(group["mixture_weights"].values.sum(-1), 1, rtol=1e-5)


def test_signal_to_noise_is_the_means_size_over_the_spread_of_draws(posterior):
    draws = posterior.sample(4000, seed=0)
    ratio = posterior.to_arviz(4000, seed=0)["posterior"]["signal_to_noise"].values[0]
    name, (A, _) = next(iter(posterior.factors(draws).items()))
    mean, _ = posterior.factors()[name]
    signal = mean.square().mean(-1).sqrt()
    noise = (signal.numpy() / ratio[:, 0]) ** 2  # conditional variances given π and Σ
    spread = (A - mean).square().mean((0, 2))
    np.testing.assert_allclose(noise.mean(0), spread.numpy(), rtol=0.1)


def test_factors_and_data_come_by_request(posterior):
    idata = posterior.to_arviz(6, data=tokens(9), log_likelihood=True, factors=True)
    layer = "bert.encoder.layer.1.attention.self.key"
    assert idata["posterior"][f"A[{layer}]"].shape == (1, 6, 2, 16)
    assert idata["posterior"][f"B[{layer}]"].shape == (1, 6, 16, 2)
    assert idata["posterior_predictive"]["probs"].dims == ("chain", "draw", "example", "class")
    assert idata["posterior_predictive"]["y"].dims == ("chain", "draw", "example")
    assert set(np.unique(idata["posterior_predictive"]["y"])) <= {0, 1}
    assert idata["observed_data"]["y"].shape == (9,)
    scores = idata["log_likelihood"]["y"].values[0]
    probs = idata["posterior_predictive"]["probs"].values[0]
    labels = idata["observed_data"]["y"].values
    np.testing.assert_allclose(scores, np.log(probs[:, np.arange(9), labels]), rtol=1e-3, atol=1e-5)


def test_arviz_summarises_scores_and_stores_it(posterior, tmp_path):
    idata = posterior.to_arviz(50, data=tokens(9), log_likelihood=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # R-hat of one chain; k of few draws
        table = az.summary(idata, var_names=["adapter_norm", "mixture_weights"])
        loo = az.loo(idata)
    assert len(table) == 6 + 24
    assert np.isfinite(table["mean"]).all()
    assert np.isfinite(loo.elpd_loo)
    idata.to_netcdf(str(tmp_path / "posterior.nc"))
    again = az.from_netcdf(str(tmp_path / "posterior.nc"))
    np.testing.assert_array_equal(
        again["posterior"]["adapter_norm"].values, idata["posterior"]["adapter_norm"].values
    )


def test_map_and_regression_convert_too():
    posterior = pyrolora.fit(
        mlp(4, 1), (torch.randn(9, 4), torch.randn(9)), guide="map", likelihood="regression",
        adapter=AdapterConfig(r=1), epochs=1,
    )  # fmt: skip
    idata = posterior.to_arviz(3, data=(torch.randn(4, 4),))
    assert set(idata["posterior"].data_vars) == {"adapter_norm"}
    assert idata["posterior_predictive"]["y"].shape == (1, 3, 4)
    assert "observed_data" not in idata.children if hasattr(idata, "children") else True


def test_predictive_draws_of_a_regression_have_its_noise():
    posterior = pyrolora.fit(
        mlp(4, 1), (torch.randn(40, 4), torch.randn(40)), likelihood="regression",
        adapter=AdapterConfig(r=1), epochs=1,
    )  # fmt: skip
    data = (torch.randn(3, 4),)
    group = posterior.to_arviz(3000, data=data, seed=0)["posterior_predictive"]
    expected = posterior.predict(data, num_samples=3000).std
    np.testing.assert_allclose(group["y"].values[0].std(0), expected.numpy(), rtol=0.1)
    assert (group["mean"].values[0].std(0) < expected.numpy()).all()


# Draws that are stored ----------------------------------------------------------------------------

INPUTS = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
CHAINS, LENGTH = 3, 8
SHORT = {"chains": 2, "warmup_steps": 6, "max_tree_depth": 2}


def stored(guide):
    return pyrolora.fit(
        mlp(), (INPUTS, torch.arange(8) % 3), guide=guide, likelihood="classification",
        adapter=AdapterConfig(r=2, target_modules=["0"], modules_to_save=["2"]), epochs=3,
        learning_rate=0.05, batch_size=4, seed=0,
    )  # fmt: skip


def chain(**changes):
    options = {"chains": CHAINS, "num_samples": LENGTH, "warmup_steps": 10, "max_tree_depth": 3}
    return NUTS(**{**options, **changes})


@pytest.fixture(scope="module")
def chains():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too short to agree
        return stored(chain())


def layer_of_a(flat):
    """The latent A of the one layer, as ArviZ has it."""
    return flat.unflatten(-1, (2, 4)).numpy()


def test_chains_of_nuts_come_out_in_their_order(chains):
    A = chains.model.program.get_buffer("A")
    assert len(A) == CHAINS * LENGTH
    starts = A.view(CHAINS, LENGTH, -1)[:, 0]
    assert not torch.equal(starts[0], starts[1])
    group = chains.to_arviz(factors=True)["posterior"]
    assert (group.sizes["chain"], group.sizes["draw"]) == (CHAINS, LENGTH)
    np.testing.assert_array_equal(group["A[0]"].values, layer_of_a(A.view(CHAINS, LENGTH, -1)))
    B = chains.factors()["0"][1]
    assert (group["B[0]"].values == B.numpy()).all()
    norms = group["factor_norm"].sel(block="0.A").values
    np.testing.assert_allclose(norms, A.view(CHAINS, LENGTH, -1).norm(dim=-1).numpy(), rtol=1e-5)
    update = np.linalg.norm(8.0 * B.numpy() @ group["A[0]"].values, axis=(-2, -1))  # s = 16 / 2
    np.testing.assert_allclose(group["adapter_norm"].sel(layer="0").values, update, rtol=1e-4)


@pytest.mark.parametrize("each", [3, 5, 20])
def test_fewer_or_more_draws_are_spread_evenly_in_every_chain(each, chains):
    A = chains.model.program.get_buffer("A").view(CHAINS, LENGTH, -1)
    group = chains.to_arviz(CHAINS * each, factors=True)["posterior"]
    picks = [j * LENGTH // each for j in range(each)]
    np.testing.assert_array_equal(group["A[0]"].values, layer_of_a(A[:, picks]))


@pytest.mark.parametrize("count", [1, 4, CHAINS * LENGTH - 1])
def test_the_number_of_draws_is_a_multiple_of_the_chains(count, chains):
    message = f"num_samples must be a multiple of the 3 chains, got {count}"
    with pytest.raises(ConfigError, match=message):
        chains.to_arviz(count)


def test_predictions_and_scores_follow_the_chains(chains):
    data = (INPUTS[:5], torch.arange(5) % 3)
    idata = chains.to_arviz(data=data, log_likelihood=True)
    each = chains.predict(data, num_samples=CHAINS * LENGTH)
    probs = idata["posterior_predictive"]["probs"].values
    np.testing.assert_allclose(probs, each.draws.view(CHAINS, LENGTH, 5, 3).numpy(), rtol=1e-5)
    scores = idata["log_likelihood"]["y"].values
    expected = each.log_likelihood.view(CHAINS, LENGTH, 5).numpy()
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert idata["posterior_predictive"]["y"].shape == (CHAINS, LENGTH, 5)


def test_arvizs_diagnostics_are_those_of_the_fit(chains):
    """The worst layer's R-hat of ‖s B A‖, of which ArviZ and Pyro have the same definition."""
    idata = chains.to_arviz()
    noted = next(entry for entry in chains.history if "r_hat" in entry)
    found = az.rhat(idata, var_names=["adapter_norm"], method="split")["adapter_norm"]
    assert float(found.max()) == pytest.approx(noted["r_hat"], rel=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = az.summary(idata, var_names=["adapter_norm", "factor_norm"])
    assert list(table.index) == ["adapter_norm[0]", "factor_norm[0.A]"]
    assert np.isfinite(table.to_numpy(dtype=float)).all()
    mean = idata["posterior"]["adapter_norm"].values.mean()
    assert table.loc["adapter_norm[0]", "mean"] == pytest.approx(mean, abs=1e-3)
    assert table.loc["adapter_norm[0]", "r_hat"] > 0


def test_loaded_chains_come_out_alike(chains, tmp_path):
    chains.save(tmp_path)
    again = pyrolora.load(tmp_path, mlp()).to_arviz(factors=True)["posterior"]
    expected = chains.to_arviz(factors=True)["posterior"]
    for name in expected.data_vars:
        np.testing.assert_array_equal(again[name].values, expected[name].values)


@pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")
def test_chains_of_both_factors_and_of_a_mixture_convert():
    both = stored(chain(inner=MAP(prior_scale=0.3), **SHORT)).to_arviz(factors=True)["posterior"]
    assert both["A[0]"].shape == (2, LENGTH, 2, 4)
    assert both["B[0]"].shape == (2, LENGTH, 16, 2)
    assert both["B[0]"].values.std((0, 1)).max() > 0
    mixture = stored(chain(inner=MonteCLoRA(sample_scale=0.5), **SHORT)).to_arviz()["posterior"]
    assert mixture["mixture_weights"].dims == ("chain", "draw", "block", "component")
    assert mixture["covariance_eigenvalues"].shape == (2, LENGTH, 1, 2)


@pytest.mark.parametrize("flat", [False, True], ids=["plain", "flat"])
def test_the_members_of_an_ensemble_are_its_draws(flat):
    guide = Ensemble(members=4)
    posterior = stored(Flat(inner=guide, rho=0.1) if flat else guide)
    data = (INPUTS[:5], torch.arange(5) % 3)
    idata = posterior.to_arviz(data=data, factors=True)
    group = idata["posterior"]
    assert (group.sizes["chain"], group.sizes["draw"]) == (1, 4)
    assert group["member"].values.tolist() == [[0, 1, 2, 3]]
    program = posterior.model.program
    inner = program.inner if flat else program
    A = inner.get_parameter("A_locs").detach()
    np.testing.assert_array_equal(group["A[0]"].values[0], layer_of_a(A))
    probs = idata["posterior_predictive"]["probs"].values[0]
    np.testing.assert_allclose(probs, posterior.predict(data, 4).draws.numpy(), rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # R-hat of one chain of four
        table = az.summary(idata, var_names=["adapter_norm"], kind="stats")
    mean = float(group["adapter_norm"].mean())
    assert table.loc["adapter_norm[0]", "mean"] == pytest.approx(mean, abs=1e-3)
    assert posterior.to_arviz(8)["posterior"]["member"].values.tolist() == [
        [0, 0, 1, 1, 2, 2, 3, 3]
    ]


def test_draws_that_are_not_stored_are_two_hundred(posterior):
    group = posterior.to_arviz()["posterior"]
    assert (group.sizes["chain"], group.sizes["draw"]) == (1, 200)
    assert posterior.to_arviz(7)["posterior"].sizes["draw"] == 7


def test_noise_on_the_weights_at_prediction_is_drawn_for_each_draw():
    posterior = stored(Flat(inner=Ensemble(members=2), rho=0.3, at_prediction=True))
    group = posterior.to_arviz(200, data=(INPUTS[:3],), seed=0)
    assert group["posterior"]["member"].values.mean() == 0.5, "each member as often"
    probs = group["posterior_predictive"]["probs"].values[0]
    assert len(np.unique(probs[:, 0, 0])) > 190

"""The posterior in ArviZ: groups, names, values; and ArviZ's own functions on them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from problems import bert, mlp, tokens

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.guides import MonteCLoRA

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

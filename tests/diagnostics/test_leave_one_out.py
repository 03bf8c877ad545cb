"""Leave-one-out against that of a conjugate model, which is known for every example and every β."""

from __future__ import annotations

import logging
import math
import warnings

import numpy as np
import pytest
import torch
from problems import bert_tags, mlp, tagged, tokenizer

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.arviz import as_chains, groups, to_inference_data
from pyrolora.arviz.containers import CALIBRATED
from pyrolora.diagnostics import loo
from pyrolora.errors import ConfigError, DataError
from pyrolora.guides import MAP, MeanField, MonteCLoRA

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ArviZ announces its refactoring at import
    import arviz as az

N, DIMENSIONS, NOISE, PRIOR = 60, 5, 1.0, 2.0
DRAWS = 4000


class Regression:
    """y = X θ + e, e ~ N(0, NOISE²), θ ~ N(0, PRIOR² I), and its posterior ∝ p(θ) p(y|θ)^(1/β)."""

    def __init__(self, beta: float) -> None:
        self.beta, self.generator = beta, np.random.default_rng(0)
        self.X = self.generator.standard_normal((N, DIMENSIONS))
        theta = PRIOR * self.generator.standard_normal(DIMENSIONS)
        self.y = self.X @ theta + NOISE * self.generator.standard_normal(N)

    def posterior(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance given these rows."""
        X, y, precision = self.X[rows], self.y[rows], 1 / (self.beta * NOISE**2)
        covariance = np.linalg.inv(np.eye(DIMENSIONS) / PRIOR**2 + precision * X.T @ X)
        return covariance @ (precision * X.T @ y), covariance

    def exact(self, temperature: float = 1.0) -> np.ndarray:
        """log p_T(y_i | the others), (n,)."""
        found = []
        for i in range(N):
            mean, covariance = self.posterior(np.arange(N) != i)
            x = self.X[i]
            found.append(
                log_normal(self.y[i] - x @ mean, temperature * NOISE**2 + x @ covariance @ x)
            )
        return np.array(found)

    def idata(self, chains: int = 1, temperature: float = 1.0, **attrs: float):
        """Exact draws, as `Posterior.to_arviz` would have them."""
        mean, covariance = self.posterior(np.arange(N) >= 0)
        theta = self.generator.multivariate_normal(mean, covariance, (chains, DRAWS // chains))
        residual = self.y - theta @ self.X.T
        scores, calibrated = (log_normal(residual, t * NOISE**2) for t in (1.0, temperature))
        made = {
            "posterior": {"theta": (theta, ("entry",))},
            "log_likelihood": {"y": (scores, ("example",))},
        }
        if temperature != 1:
            made["sample_stats"] = {CALIBRATED: (calibrated, ("example",))}
        known = {"kl_weight": self.beta, "temperature": temperature, "num_examples": N}
        return to_inference_data(made, {}, {**known, **attrs})


def log_normal(residual, variance):
    return -0.5 * (residual**2 / variance + math.log(2 * math.pi) + np.log(variance))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", [1.0, 0.2, 4.0])
def test_every_example_has_its_exact_leave_one_out(beta: float, temperature: float) -> None:
    """The error of a sum of n estimates is of the order of √n times that of one."""
    problem = Regression(beta)
    found, exact = loo(problem.idata(temperature=temperature)), problem.exact(temperature)
    assert found.elpd_loo == pytest.approx(exact.sum(), abs=0.5)
    np.testing.assert_allclose(found.loo_i.values, exact, atol=0.2)
    assert found.elpd_loo == pytest.approx(float(found.loo_i.sum()))
    assert found.se == pytest.approx((N * exact.var()) ** 0.5, rel=0.05)
    assert found.pareto_k.max() < 0.7
    assert not found.warning


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_arvizs_own_is_too_good_for_a_cold_posterior_and_too_strict_for_a_hot_one() -> None:
    cold, hot = Regression(0.2), Regression(4.0)
    assert az.loo(cold.idata()).elpd_loo > cold.exact().sum() + 3
    assert az.loo(hot.idata()).elpd_loo < hot.exact().sum() - 0.2


@pytest.mark.parametrize("chains", [1, 4])
@pytest.mark.parametrize("scale", ["log", "deviance", "negative_log"])
def test_at_beta_one_it_is_arvizs(chains: int, scale: str) -> None:
    idata = Regression(1.0).idata(chains)
    with az.rc_context({"stats.ic_scale": scale}):
        ours, theirs = loo(idata), az.loo(idata, pointwise=True)
    assert ours.index.tolist() == theirs.index.tolist()
    for name in ("elpd_loo", "se", "p_loo", "n_samples", "n_data_points", "warning", "scale"):
        assert ours[name] == pytest.approx(theirs[name])
    for name in ("loo_i", "pareto_k"):
        np.testing.assert_allclose(ours[name].values, theirs[name].values, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.sort_values")
def test_arviz_prints_and_compares_what_it_gives() -> None:
    cold, warm = Regression(0.2), Regression(1.0)
    pair = {"cold": loo(cold.idata()), "warm": loo(warm.idata())}
    assert "elpd_loo" in str(pair["cold"])
    table = az.compare(pair)
    assert table.index.tolist()[0] == max(pair, key=lambda name: pair[name].elpd_loo)


# Of a fit -----------------------------------------------------------------------------------------

X = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
DATA = (X, torch.arange(10) % 3)


def fitted(guide, data=None, **options):
    config = {"task": "classification", "adapter": AdapterConfig(r=1), "epochs": 1, **options}
    return pyrolora.fit(mlp(), DATA if data is None else data, guide=guide, **config)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
@pytest.mark.parametrize(
    ("guide", "beta"),
    [
        (MeanField(kl_weight=0.05, kl_weight_against="mean", init_scale=0.3), 0.5),
        (MonteCLoRA(kl_weight=0.2, init_covariance=1.0), 0.2),
    ],
)
def test_the_weights_are_those_of_the_fits_beta(guide, beta: float, tmp_path) -> None:
    """The k̂ are ArviZ's of the weights p^(−1/β); also after a file, and of two fits as chains."""
    posterior = fitted(guide)
    fits = [posterior.to_arviz(100, data=DATA, log_likelihood=True, seed=seed) for seed in (0, 1)]
    found = loo(fits[0])
    scores = fits[0]["log_likelihood"]["y"].values[0].T.astype(float)
    weights, khat = az.psislw(-scores / beta)
    expected = np.log((np.exp(weights) * np.exp(scores)).sum(-1))
    np.testing.assert_allclose(found.loo_i.values, expected, rtol=1e-5)
    np.testing.assert_allclose(found.pareto_k.values, khat, atol=1e-3)
    mean = np.log(np.exp(scores).mean(-1)).sum()
    assert found.p_loo == pytest.approx(mean - expected.sum(), abs=1e-5)
    fits[0].to_netcdf(str(tmp_path / "fit.nc"))
    assert loo(az.from_netcdf(str(tmp_path / "fit.nc"))).elpd_loo == pytest.approx(found.elpd_loo)
    assert loo(as_chains(fits)).n_samples == 200


def test_a_cold_posterior_says_once_that_arvizs_would_be_wrong(caplog) -> None:
    groups._leave_one_out_advice.cache_clear()
    cold = fitted(MeanField(kl_weight=0.2))
    with caplog.at_level(logging.WARNING):
        said = [cold.to_arviz(4, data=DATA, log_likelihood=True) for _ in range(2)]
    assert len(caplog.records) == 1
    for text in (caplog.text, said[0]["log_likelihood"].attrs["leave_one_out"]):
        assert "diagnostics.loo(idata), since az.loo, which takes a KL weight of 0.2" in text
        assert "too good" in text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert "leave_one_out" not in cold.to_arviz(4, data=DATA)["posterior"].attrs
        exact = fitted(MeanField(kl_weight=1.0)).to_arviz(4, data=DATA, log_likelihood=True)
        assert "leave_one_out" not in exact["log_likelihood"].attrs
        assert "too strict" in groups._leave_one_out_advice(2.0)
    assert len(caplog.records) == 1


def test_what_leave_one_out_cannot_mean_is_refused() -> None:
    problem = Regression(0.2)
    with pytest.raises(DataError, match="the training data, 61 examples, got 60"):
        loo(problem.idata(num_examples=N + 1))
    point = fitted(MAP()).to_arviz(5, data=DATA, log_likelihood=True)
    with pytest.raises(DataError, match="the same under every draw: the posterior is a point"):
        loo(point)
    with pytest.raises(ConfigError, match=r"idata has none; make them with posterior\.to_arviz"):
        loo(fitted(MAP()).to_arviz(5))
    foreign = az.from_dict(
        posterior={"a": np.zeros((1, 5))}, log_likelihood={"y": np.zeros((1, 5, 3))}
    )
    with pytest.raises(ConfigError, match="have no attributes"):
        loo(foreign)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_after_a_calibration_the_scores_are_those_of_its_temperature() -> None:
    """The weights are not: those of the fit have none."""
    posterior = fitted(MeanField(kl_weight=0.2, init_scale=0.3))
    options = {"data": DATA, "log_likelihood": True, "seed": 0}
    before = posterior.to_arviz(50, **options)
    posterior.temperature = 2.0
    after = posterior.to_arviz(50, **options)
    fits = [dataset_of(one, "log_likelihood")["y"] for one in (before, after)]
    np.testing.assert_allclose(fits[0], fits[1], rtol=1e-5)
    probs = after["posterior_predictive"]["probs"].values[0]
    scores = np.log(probs[:, np.arange(10), DATA[1]]).T.astype(float)
    weights, khat = az.psislw(-fits[0][0].T.astype(float) / 0.2)
    expected = np.log((np.exp(weights) * np.exp(scores)).sum(-1))
    found = loo(after)
    np.testing.assert_allclose(found.loo_i.values, expected, rtol=1e-4)
    np.testing.assert_allclose(found.pareto_k.values, khat, atol=1e-2)
    posterior.temperature = 3.0
    with pytest.raises(ConfigError, match=r"fit 1 has another temperature than fit 0: 3\.0 for 2"):
        as_chains([after, posterior.to_arviz(50, **{**options, "seed": 1})])


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_examples_that_were_held_back_are_not_left_out_again(tmp_path) -> None:
    """Of all examples that a fit got, the estimate is of those that it has learnt from."""
    x, y = torch.randn(40, X.shape[1]), torch.arange(40) % 3
    posterior = fitted(MonteCLoRA(hold_back=0.25), (x, y), seed=3)
    back = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:10].tolist()
    learnt = [i for i in range(40) if i not in back]
    whole = posterior.to_arviz(50, data=(x, y), log_likelihood=True)
    part = posterior.to_arviz(50, data=(x[learnt], y[learnt]), log_likelihood=True)
    found, expected = loo(whole), loo(part)
    assert found["loo_i"].sizes["example"] == len(learnt)
    np.testing.assert_allclose(found.loo_i.values, expected.loo_i.values, rtol=1e-4)
    assert found["loo_i"]["example"].values.tolist() == learnt
    whole.to_netcdf(tmp_path / "whole.nc")
    assert loo(az.from_netcdf(tmp_path / "whole.nc")).elpd_loo == found.elpd_loo
    posterior.save(tmp_path / "saved")
    again = pyrolora.load(tmp_path / "saved", posterior.base)
    idata = again.to_arviz(50, data=(x, y), log_likelihood=True)
    np.testing.assert_allclose(loo(idata).elpd_loo, found.elpd_loo, rtol=1e-5)
    other = fitted(MonteCLoRA(hold_back=0.25), (x, y), seed=4)
    other.temperature = 1.0  # which a fit may choose, too
    joined = as_chains([whole, other.to_arviz(50, data=(x, y), log_likelihood=True)])
    assert "temperature" not in joined["posterior"].attrs, "each has its own"
    with pytest.raises(ConfigError, match="held back different ones"):
        loo(joined)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_the_whole_data_in_another_order_are_warned_of(tmp_path) -> None:
    """Examples that were held back are known by their places alone; also in what was saved."""
    x, y = torch.randn(40, X.shape[1]), torch.arange(40) % 3
    posterior = fitted(MonteCLoRA(hold_back=0.25), (x, y), seed=3)
    turned = posterior.to_arviz(20, data=(x.flip(0), y.flip(0)), log_likelihood=True)
    turned.to_netcdf(tmp_path / "turned.nc")
    for idata in (turned, az.from_netcdf(tmp_path / "turned.nc")):
        with pytest.warns(UserWarning, match=r"10 of .* in another order, .* as the fit got them"):
            loo(idata)


def dataset_of(idata, group):
    return {name: values.values for name, values in idata[group].data_vars.items()}


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_tokens_are_left_out_with_their_example() -> None:
    """One row per token: the scores of an example are the sum of those of its tokens."""
    data = tagged(12)
    posterior = pyrolora.fit(bert_tags(), data, "montec", tokenizer=tokenizer(), epochs=1)
    idata = posterior.to_arviz(40, data=data, log_likelihood=True, seed=0)
    rows = idata["log_likelihood"]["y"]
    assert rows.dims == ("chain", "draw", "token")
    result = loo(idata)
    assert result["loo_i"].sizes["example"] == len(data)
    draws = np.exp(rows.groupby("token").sum().values[0])
    whole = np.log(draws.mean(0)).sum()
    assert result["elpd_loo"] == pytest.approx(whole - result["p_loo"], rel=1e-6)

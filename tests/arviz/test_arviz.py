"""The posterior in ArviZ: groups, names, values; and ArviZ's own functions on them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from problems import bert, bert_choice, llama, mlp, questions, texts, tokenizer, tokens

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.arviz import as_chains
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
    assert group.attrs["kl_weight"] == posterior.options.beta(16)


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
        mlp(4, 1), (torch.randn(9, 4), torch.randn(9)), guide="map", task="regression",
        adapter=AdapterConfig(r=1), epochs=1,
    )  # fmt: skip
    idata = posterior.to_arviz(3, data=(torch.randn(4, 4),))
    assert set(idata["posterior"].data_vars) == {"adapter_norm"}
    assert idata["posterior_predictive"]["y"].shape == (1, 3, 4)
    assert "observed_data" not in idata.children if hasattr(idata, "children") else True


def test_predictive_draws_of_a_regression_have_its_noise():
    posterior = pyrolora.fit(
        mlp(4, 1), (torch.randn(40, 4), torch.randn(40)), task="regression",
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
        mlp(), (INPUTS, torch.arange(8) % 3), guide=guide, task="classification",
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


# Names -------------------------------------------------------------------------------------------


def test_every_dimension_has_labels_and_every_group_says_what_it_is_of(posterior):
    idata = posterior.to_arviz(4, data=tokens(5), log_likelihood=True)
    group = idata["posterior"]
    assert group["rank"].values.tolist() == group["rank_"].values.tolist() == [0, 1]
    assert group["component"].values.tolist() == [0, 1, 2, 3]
    predictive = idata["posterior_predictive"]
    assert predictive["example"].values.tolist() == [0, 1, 2, 3, 4]
    assert predictive["class"].values.tolist() == [0, 1], "LABEL_0 is no name"
    for name in ("posterior", "posterior_predictive", "observed_data", "log_likelihood"):
        attrs = idata[name].attrs
        assert (attrs["guide"], attrs["task"]) == ("montec", "classification")
        assert attrs["guide_options"] == str(posterior.options)
        assert (attrs["base"], attrs["num_examples"]) == ("BertForSequenceClassification", 16)


def test_classes_have_the_networks_names():
    names = {0: "bad", 1: "good"}
    posterior = pyrolora.fit(
        bert(id2label=names, label2id={n: i for i, n in names.items()}), tokens(), guide="map",
        adapter=AdapterConfig(r=1), epochs=1,
    )  # fmt: skip
    predictive = posterior.to_arviz(2, data=tokens(3))["posterior_predictive"]
    assert predictive["class"].values.tolist() == ["bad", "good"]
    good = predictive["probs"].sel({"class": "good"}).values[0]
    np.testing.assert_allclose(good, posterior.predict(tokens(3), 2).draws[..., 1].numpy())


def test_choices_are_numbered():
    posterior = pyrolora.fit(
        bert_choice(), questions(6), guide="map", tokenizer=tokenizer(), epochs=1,
        adapter=AdapterConfig(r=1),
    )  # fmt: skip
    predictive = posterior.to_arviz(2, data=questions(6))["posterior_predictive"]
    assert predictive["class"].values.tolist() == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_texts_have_observed_tokens_and_scores_and_no_other_texts():
    posterior = pyrolora.fit(
        llama(), texts(6), tokenizer=tokenizer(), epochs=1, adapter=AdapterConfig(r=1)
    )
    idata = posterior.to_arviz(20, data=texts(6), log_likelihood=True)
    assert set(idata.groups()) == {"posterior", "observed_data", "log_likelihood"}
    observed = idata["observed_data"]["y"]
    assert observed.dims == ("example", "token")
    assert observed["token"].values.tolist() == list(range(observed.sizes["token"]))
    assert np.isfinite(az.loo(idata).elpd_loo)
    with pytest.raises(TypeError, match='`data` argument must have the group "posterior_predict'):
        az.plot_ppc(idata)


def test_layers_of_another_rank_have_a_dimension_of_their_own():
    posterior = pyrolora.fit(
        bert(), tokens(), adapter=AdapterConfig(r=2, rank_pattern={"key": 1}), epochs=1
    )
    group = posterior.to_arviz(3, factors=True)["posterior"]
    query, key = (f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key"))
    assert group[f"A[{query}]"].dims == ("chain", "draw", "rank", f"in[{query}]")
    assert group[f"A[{key}]"].dims == ("chain", "draw", f"rank[{key}]", f"in[{key}]")
    assert group[f"B[{key}]"].shape == (1, 3, 16, 1)


def test_a_seed_repeats_the_predictive_draws_too(posterior):
    first, again = (posterior.to_arviz(6, data=tokens(9), seed=4) for _ in range(2))
    assert first["posterior_predictive"].equals(again["posterior_predictive"])


# ArviZ's own functions ---------------------------------------------------------------------------


def real(seed):
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    data = (x, x[:, 0] + 0.3 * x[:, 1])
    return data, pyrolora.fit(
        mlp(4, 1), data, task="regression", adapter=AdapterConfig(r=1), epochs=2,
        learning_rate=0.02, seed=seed,
    )  # fmt: skip


def sorted_(seed):
    return tokens(20), pyrolora.fit(
        bert(initializer_range=0.3), tokens(20), adapter=AdapterConfig(r=1), epochs=2,
        learning_rate=0.02, seed=seed,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[real, sorted_], ids=["regression", "classification"])
def fits(request):
    """The draws of two independent fits to the same data."""
    made = [request.param(seed) for seed in (0, 1)]
    return [fit.to_arviz(40, data=data, log_likelihood=True, seed=0) for data, fit in made]


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")
@pytest.mark.parametrize("plot", ["plot_forest", "plot_trace", "plot_ppc"])
def test_arviz_draws_it(plot, fits):
    import matplotlib.pyplot as plt

    options = {"random_seed": 0} if plot == "plot_ppc" else {"var_names": ["adapter_norm"]}
    with plt.rc_context(), warnings.catch_warnings():
        plt.switch_backend("agg")
        axes = np.ravel(getattr(az, plot)(fits[0], **options))
        assert any(ax.has_data() for ax in axes)
        axes[0].figure.canvas.draw()
        plt.close("all")


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.sort_values")
def test_arviz_compares_fits_by_leave_one_out(fits):
    table = az.compare({"first": fits[0], "second": fits[1]})
    for name, fit in zip(("first", "second"), fits, strict=True):
        assert table.loc[name, "elpd_loo"] == pytest.approx(az.loo(fit).elpd_loo)
    assert table["elpd_loo"].is_monotonic_decreasing


def test_a_summary_is_of_what_is_no_matrix(posterior):
    table = posterior.summary(50, seed=1)
    kinds = {row.partition("[")[0] for row in table.index}
    assert kinds == {"adapter_norm", "mixture_weights", "signal_to_noise", "covariance_eigenvalues"}
    layer = "bert.encoder.layer.0.attention.self.query"
    norms = posterior.to_arviz(50, seed=1)["posterior"]["adapter_norm"].sel(layer=layer).values
    assert table.loc[f"adapter_norm[{layer}]", "mean"] == pytest.approx(norms.mean(), rel=1e-5)
    assert table.loc[f"adapter_norm[{layer}]", "sd"] == pytest.approx(norms.std(ddof=1), rel=1e-4)
    assert "r_hat" not in table, "independent draws have none"


def test_a_summary_of_chains_has_their_diagnostics(chains):
    table = chains.summary()
    noted = next(entry for entry in chains.history if "r_hat" in entry)
    assert table.loc["adapter_norm[0]", "r_hat"] > 0
    assert table.loc["adapter_norm[0]", "ess_bulk"] > 0
    assert noted["r_hat"] > 0


# Several fits ------------------------------------------------------------------------------------


def test_fits_become_chains_in_their_order(fits):
    both = as_chains(fits)
    assert set(both.groups()) == set(fits[0].groups())
    for name in ("posterior", "posterior_predictive", "log_likelihood"):
        assert both[name]["chain"].values.tolist() == [0, 1]
        for number, fit in enumerate(fits):
            for variable, values in both[name].data_vars.items():
                np.testing.assert_array_equal(
                    values.sel(chain=number), fit[name][variable].sel(chain=0)
                )
        assert both[name].attrs["guide"] == "montec"
    assert both["observed_data"].equals(fits[0]["observed_data"])
    assert both["posterior"]["adapter_norm"].dims == ("chain", "draw", "layer")


def test_r_hat_of_chains_says_whether_fits_agree(fits):
    """Two halves of one fit agree; two fits that found other norms do not."""
    group = fits[0]["posterior"]
    halves = [
        az.InferenceData(posterior=group.isel(draw=part).assign_coords(draw=range(20)))
        for part in (slice(20), slice(20, 40))
    ]
    same = az.rhat(as_chains(halves), var_names=["adapter_norm"])["adapter_norm"]
    other = az.rhat(as_chains(fits), var_names=["adapter_norm"])["adapter_norm"]
    assert float(same.mean()) < 1.15
    assert float(other.max()) > 1.5


def test_chains_of_nuts_join_too(chains):
    drawn = chains.to_arviz()
    moved = drawn.copy()
    moved["posterior"]["adapter_norm"] += 1
    both = as_chains([drawn, moved])
    assert both["posterior"].sizes["chain"] == 2 * CHAINS
    assert both["sample_stats"]["diverging"].shape == (2 * CHAINS, LENGTH)


def changed(fit, group, change):
    other = fit.copy()
    setattr(other, group, change(other[group]))
    return other


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        ("posterior", lambda g: g.assign_attrs(guide="meanfield"), "another guide than fit 0"),
        ("posterior", lambda g: g.assign_attrs(num_examples=3), "another num_examples .* 3 for 20"),
        ("posterior", lambda g: g.isel(layer=slice(1)), "another 'layer' in posterior .*: 1 "),
        ("posterior", lambda g: g.isel(draw=slice(5)), r"another 'draw' in posterior .*: 5 \(0, 1"),
        ("posterior", lambda g: g.drop_vars("adapter_norm"), "another set of variables in post"),
        ("observed_data", lambda g: (g + 1).assign_attrs(g.attrs), "other observed data .*data="),
        ("posterior", lambda g: g, "the very draws of fit 0.*another seed"),
    ],
)
def test_fits_that_are_no_chains_of_one_another_are_refused(group, change, message, fits):
    other = fits[0].copy()
    setattr(other, group, change(other[group]))
    with pytest.raises(ConfigError, match=message):
        as_chains([fits[0], other])


def test_chains_need_two_fits_with_the_same_groups(fits):
    with pytest.raises(ConfigError, match="chains need two fits or more, got 1"):
        as_chains(fits[:1])
    plain = az.InferenceData(posterior=fits[1]["posterior"])
    with pytest.raises(ConfigError, match="another set of groups"):
        as_chains([fits[0], plain])


def test_no_two_of_many_fits_may_have_the_same_draws(fits):
    with pytest.raises(ConfigError, match="fit 2 has the very draws of fit 1"):
        as_chains([*fits, fits[1]])

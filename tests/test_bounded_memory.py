"""Memory is bounded whatever the number of draws and layers, counted in bytes; numbers stay."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import LiveBytes
from problems import llama, mlp, texts, tokenizer
from torch import nn

import pyrolora
from pyrolora import AdapterConfig, Posterior, defaults
from pyrolora.adapters import LaterFactors, LayerSpec, attach
from pyrolora.diagnostics.contraction import contractions
from pyrolora.guides import MAP, NUTS, Guide, Laplace, MeanField, MonteCLoRA
from pyrolora.guides.laplace import LaplaceProgram
from pyrolora.guides.nuts import NUTSProgram
from pyrolora.inference import kfac, weight_gradients
from pyrolora.inference.curvature import Kronecker, portions
from pyrolora.model import build
from pyrolora.tasks import task_for

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def fitted(guide: Guide, **options: Any) -> Posterior:
    return pyrolora.fit(
        mlp(), (X, Y), guide=guide, task="classification",
        **{"adapter": AdapterConfig(r=2), "epochs": 3, "learning_rate": 0.05, "seed": 1, **options},
    )  # fmt: skip


@pytest.fixture(scope="module", params=[MeanField(latent="AB"), MonteCLoRA(), Laplace()])
def posterior(request: Any) -> Posterior:
    options = {"eval_data": (X, Y)} if request.param.name == "laplace" else {}
    return fitted(request.param, **options)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that lets no more than two draws be held from then on."""

    def restrict(posterior: Posterior) -> None:
        size = sum(p.nbytes for p in posterior.model.program.bank.parameters())
        monkeypatch.setattr(defaults, "DRAWN_BYTES", 2 * size)
        assert posterior.model.program.bank.draws_at_once == 2

    return restrict


# Draws --------------------------------------------------------------------------------------------


def answers(posterior: Posterior) -> dict[str, torch.Tensor]:
    predictor = posterior.predictor
    idata = posterior.to_arviz(7, data=(X, Y), seed=3)
    found = {
        "of a seed": posterior.predict((X,), num_samples=7, seed=3).probs,
        "by number": posterior.predict((X,), draws=[4, 0, 2, 9, 7]).probs,
        "arviz": torch.from_numpy(idata.posterior_predictive["probs"].to_numpy().copy()),
        "norms": torch.from_numpy(idata.posterior["adapter_norm"].to_numpy().copy()),
        "after": predictor.drawn(7, 3, None)[1],
        "contraction": torch.tensor([c.scale for c in contractions(posterior.model.program)]),
    }
    khat = posterior.khat((X, Y), num_samples=25, seed=2)
    layers = posterior.khat((X, Y), num_samples=25, seed=2, per_layer=True)
    found["khat"] = torch.tensor([khat.khat, *(layer.khat for layer in layers.values())])
    return found


def test_draws_that_are_made_some_at_a_time_give_the_same_numbers(posterior, small):
    whole = answers(posterior)
    small(posterior)
    assert isinstance(posterior.predictor.factors(7, 3, None), LaterFactors)
    assert isinstance(posterior.predictor.factors(None, None, [4, 0, 2]), LaterFactors)
    for name, value in answers(posterior).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_writer_draws_some_at_a_time(small):
    posterior = pyrolora.fit(
        llama(), texts(8), tokenizer=tokenizer(), guide=MeanField(), epochs=1, seed=1
    )
    options = {"num_samples": 5, "seed": 3, "max_new_tokens": 3}
    whole = posterior.generate(["the film"], **options)
    small(posterior)
    again = posterior.generate(["the film"], **options)
    assert again.texts == whole.texts
    torch.testing.assert_close(again.log_likelihood, whole.log_likelihood, rtol=1e-4, atol=1e-5)


def test_a_prediction_holds_the_draws_of_two_whatever_their_number(small) -> None:
    """What grows with the number of draws is the prediction, not the factors."""
    network = nn.Sequential(nn.Linear(4, 400), nn.Tanh(), nn.Linear(400, 400), nn.Linear(400, 2))
    posterior = pyrolora.fit(
        network, (X, Y), guide=MeanField(latent="AB"), task="classification", epochs=1,
        adapter=AdapterConfig(r=8, target_modules=["2"], modules_to_save=["3"]),
    )  # fmt: skip
    one = sum(p.nbytes for p in posterior.model.program.bank.parameters())
    posterior.predict((X,), num_samples=2)

    def peak(draws: int) -> int:
        with LiveBytes() as live:
            posterior.predict((X,), num_samples=draws, seed=3)
        return live.peak

    assert peak(64) - peak(8) > 56 * one
    small(posterior)
    assert peak(64) - peak(8) < 2 * one


# Laplace ------------------------------------------------------------------------------------------


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh()]
    return nn.Sequential(*body, nn.Linear(16, 3))


FEW = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), torch.arange(3)
OPTIONS: dict[str, Any] = {
    "guide": Laplace(prior_scale=0.5),
    "task": "classification",
    "adapter": AdapterConfig(r=2, modules_to_save=["4"]),
    "epochs": 3,
    "learning_rate": 0.05,
    "seed": 1,
}


def test_few_eigenvectors_give_the_whole_posterior_where_the_curvature_has_no_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three examples give inputs of rank 3, and gradients of rank 6 for three classes."""
    curve, portions_seen = LaplaceProgram.curve, []

    def watched(self: Any, some: Any) -> None:
        assert all(b.numel() == 0 for name, b in self.named_buffers() if "columns" in name)
        kept = [*some]
        portions_seen.append(len(kept))
        curve(self, kept)

    monkeypatch.setattr(LaplaceProgram, "curve", watched)
    whole = pyrolora.fit(wide(), FEW, **OPTIONS)
    monkeypatch.setattr(defaults, "CURVATURE_BYTES", 4 * 64 * 6)  # six for 64 columns in all
    few = pyrolora.fit(wide(), FEW, **OPTIONS)
    assert portions_seen == [1, 2]  # both layers together, and one after the other
    state = few.model.program.state_dict()
    assert state["columns_A_0"].shape == (2, 16, 6)
    assert state["values_B_0"].shape == (2, 2, 6)
    for site in "AB":
        found, expected = (p.model.program.law(site) for p in (few, whole))
        torch.testing.assert_close(found.variance, expected.variance, rtol=1e-3, atol=1e-6)
        value = expected.sample()
        torch.testing.assert_close(
            found.log_prob(value), expected.log_prob(value), rtol=1e-3, atol=1e-3
        )
    few.save(tmp_path / "few")
    again = pyrolora.load(tmp_path / "few", wide())
    torch.testing.assert_close(
        again.predict((FEW[0],), seed=1).probs, few.predict((FEW[0],), seed=1).probs
    )


def test_the_sums_of_a_portion_are_those_of_the_whole_and_take_its_memory_alone() -> None:
    config = AdapterConfig(r=2, modules_to_save=["4"], target_modules=["0", "2"])
    network = nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(),
                            nn.Linear(300, 3))  # fmt: skip
    law = task_for(network, "classification")
    joint = build(network, attach(network, config), config, MAP(), law, 4)
    batch = {"inputs": torch.randn(4, 300), "labels": torch.arange(4) % 3}
    peaks, found = [], {}
    for names in (None, ["0"], ["2"]):
        with LiveBytes(*network.parameters()) as live:
            some = kfac(joint, [batch], names)
        peaks.append(live.peak)
        found[str(names)] = some
        del some
    assert found["None"].keys() == {*found["['0']"], *found["['2']"]}
    for name, block in {**found["['0']"], **found["['2']"]}.items():
        torch.testing.assert_close(block.columns, found["None"][name].columns)
        torch.testing.assert_close(block.rows, found["None"][name].rows)
    assert peaks[0] - peaks[1] >= 4 * 2 * 300**2  # the other layer's two sums


def test_portions_have_all_layers_in_order_and_no_more_bytes_than_allowed() -> None:
    specs = [
        LayerSpec(f"{layer}.{i}", *shape, 16, 1.0)
        for layer in range(3)
        for i, shape in enumerate([(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)])
    ]
    parts = [*portions(specs)]
    assert [name for part in parts for name in part] == [spec.name for spec in specs]
    size = {s.name: 4 * (s.in_features**2 + s.out_features**2) for s in specs}
    assert all(sum(size[n] for n in part) <= defaults.CURVATURE_BYTES for part in parts)
    assert [*portions([LayerSpec("huge", 10**6, 1, 1, 1.0)])] == [["huge"]]


def test_the_kept_eigenvectors_are_the_largest() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(200, 200)).Q
    spectrum = 0.8 ** torch.arange(200.0)
    V, values = Kronecker(torch.eye(2), basis @ torch.diag(spectrum) @ basis.T).eigen(20)[1:]
    torch.testing.assert_close(values, spectrum[:20].expand(2, -1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(V.T @ V, torch.eye(20), rtol=0, atol=1e-4)


# Starts from gradients ----------------------------------------------------------------------------


def test_gradients_of_a_portion_at_a_time_are_the_same_and_held_one_portion_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = AdapterConfig(r=2, target_modules=[str(2 * i) for i in range(8)], modules_to_save=[])
    layers = [part for _ in range(8) for part in (nn.Linear(200, 200), nn.Tanh())]
    network = nn.Sequential(*layers, nn.Linear(200, 3))
    joint = build(
        network, attach(network, config), config, MAP(), task_for(network, "classification"), 4
    )
    batch = {"inputs": torch.randn(4, 200), "labels": torch.arange(4) % 3}
    whole, weight = weight_gradients(joint, batch), 4 * 200**2
    peaks = []
    for allowed in (2**30, weight):
        monkeypatch.setattr(defaults, "GRADIENT_BYTES", allowed)
        with LiveBytes(*network.parameters()) as live:
            seen = weight_gradients(joint, batch, lambda _, gradient: float(gradient.norm()))
        peaks.append(live.peak)
        assert [*seen] == [*whole]
        assert seen == {n: float(g.norm()) for n, g in whole.items()}
    assert peaks[0] > 8 * weight
    assert peaks[1] < 4 * weight


# Chains -------------------------------------------------------------------------------------------


def test_chains_store_each_draw_once(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = NUTS(inner=MeanField(kl_weight=1.0), chains=2, num_samples=4, warmup_steps=1,
                 max_tree_depth=1)  # fmt: skip
    before = []
    store = NUTSProgram.store

    def watched(self: Any, draws: Any, diverging: Any) -> None:
        before.append(self.get_buffer("A").numel())
        store(self, draws, diverging)
        assert self.get_buffer("A").data_ptr() == draws["A"].data_ptr()

    monkeypatch.setattr(NUTSProgram, "store", watched)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # so few steps do not agree
        posterior = fitted(guide)
    assert before == [0]
    program = posterior.model.program
    whole = program.mean()
    monkeypatch.setattr(defaults, "DRAWN_BYTES", 1)
    torch.testing.assert_close(program.mean().A, whole.A)
    torch.testing.assert_close(program.mean().A, program.get_buffer("A").mean(0))

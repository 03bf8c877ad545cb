"""The Gaussian law of the task head's last layer: known answers, and every verb of a posterior."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from problems import (
    bert,
    bert_choice,
    bert_labels,
    bert_tags,
    gpt2,
    letter_tokenizer,
    llama_reward,
    mlp,
    preferences,
    questions,
    reviews,
    several,
    tagged,
    texts,
    tokenizer,
)
from pyro import poutine
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

import pyrolora
from pyrolora import AdapterConfig, defaults
from pyrolora.data import to_device
from pyrolora.errors import ConfigError
from pyrolora.guides import (
    MAP,
    NUTS,
    TFB,
    Ensemble,
    Flat,
    Full,
    Guide,
    Laplace,
    MeanField,
    MonteCLoRA,
    as_guide,
)
from pyrolora.inference.evidence import log_marginal_likelihood
from pyrolora.inference.head_laplace import head_curvature, settle_head
from pyrolora.peft import read_adapter
from pyrolora.posterior import Posterior
from pyrolora.predictive.heads import one_adapter
from pyrolora.predictive.predict import passes
from pyrolora.storage.description import described

GAUSSIAN = MAP(head="gaussian")
LAST = AdapterConfig(r=2, modules_to_save=["2"])
SMALL = AdapterConfig(r=2)


def pairs(n: int, outputs: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))
    if outputs == 1:
        return x, x[:, 0] - 0.5 * x[:, 1] ** 2
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


@cache
def fitted(guide: Guide = GAUSSIAN, outputs: int = 3, n: int = 40) -> Posterior:
    task = "regression" if outputs == 1 else "classification"
    data = pairs(n, outputs)
    return pyrolora.fit(
        mlp(outputs=outputs), data, guide, task=task, adapter=LAST, epochs=8, seed=1
    )


def law_of(posterior: Posterior) -> Any:
    return posterior.model.program.law


def covariance(posterior: Posterior) -> Tensor:
    """The covariance of W, row by row, from the law's own log-density."""
    law, loc = law_of(posterior).law(), law_of(posterior).loc
    return torch.linalg.inv(-torch.autograd.functional.hessian(law.log_prob, loc).double())


def features(posterior: Posterior, x: Tensor) -> Tensor:
    """The inputs of the last layer under the mean adapter, with a column of ones."""
    merged = posterior.merge()
    with torch.no_grad():
        hidden = merged[1](merged[0](x))
    return torch.cat([hidden, torch.ones(len(x), 1)], -1).double()


# Known answers ----------------------------------------------------------------------------------


def test_the_head_of_a_regression_is_bayesian_linear_regression():
    posterior = fitted(outputs=1)
    x, _ = pairs(40, 1)
    phi, noise = features(posterior, x), float(posterior.model.task.param("noise_scale").detach())
    precision = float(law_of(posterior).precision)
    exact = torch.linalg.inv(phi.T @ phi / noise**2 + precision * torch.eye(phi.shape[1]))
    torch.testing.assert_close(covariance(posterior), exact, rtol=2e-3, atol=1e-5)

    test = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    drawn = posterior.predict(test, num_samples=4000, seed=0).draws.double()
    phi = features(posterior, test)
    assert drawn.var(0).tolist() == pytest.approx(
        torch.einsum("if,fg,ig->i", phi, exact, phi).tolist(), rel=0.12
    )
    assert (drawn.mean(0) - phi @ law_of(posterior).loc.double()).abs().max() < 0.1 * drawn.std()


def test_the_precision_has_the_highest_evidence():
    law = law_of(fitted())
    values, mean = [law.values.double()], [law.loc.double()]

    def evidence(factor: float) -> float:
        return log_marginal_likelihood(0.0, values, mean, factor * float(law.precision))

    assert all(evidence(1.0) > evidence(factor) for factor in (0.5, 0.9, 1.1, 2.0))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("structure", ["full", "kron"])
def test_the_covariance_is_that_of_laplace_torch(
    structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import laplace

    if structure == "kron":
        monkeypatch.setattr(defaults, "HEAD_ENTRIES", 3)
    posterior = fitted(MAP(head="gaussian", prior_scale=5.0 if structure == "kron" else 6.0))
    assert law_of(posterior).whole == (structure == "full")
    peer = laplace.Laplace(
        posterior.merge(),
        "classification",
        subset_of_weights="last_layer",
        hessian_structure=structure,
        prior_precision=float(law_of(posterior).precision),
    )
    data = torch.utils.data.TensorDataset(*pairs(40))
    peer.fit(torch.utils.data.DataLoader(data, batch_size=40))
    test = pairs(9)[0]
    jacobian, _ = peer.backend.last_layer_jacobians(test)
    theirs = peer.functional_variance(jacobian).detach().double()

    phi = features(posterior, test)
    blocks = covariance(posterior).unflatten(0, (3, -1)).unflatten(-1, (3, -1))
    ours = torch.einsum("if,cfdg,ig->icd", phi, blocks, phi)
    # Theirs splits the prior among the factors and treats the bias apart, where it is Kronecker.
    tolerance = 1e-3 if structure == "full" else 0.3
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.max()))


class Problem:
    """A network with a head, its data, and how to fit it."""

    def __init__(self, network: Callable[[], nn.Module], data: Any, **options: Any) -> None:
        self.network, self.data = network, data
        self.options = {"adapter": SMALL, "tokenizer": tokenizer(), **options}


PROBLEMS = {
    "classes": Problem(bert, reviews),
    "labels": Problem(bert_labels, several),
    "choices": Problem(bert_choice, questions),
    "rewards": Problem(llama_reward, preferences, tokenizer=letter_tokenizer()),
    "tags": Problem(bert_tags, tagged),
}


def widened(problem: str) -> tuple[Posterior, dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """A fit, all of its data as one batch, and Σ log p as a function of W."""
    case = PROBLEMS[problem]
    posterior = pyrolora.fit(
        case.network(), case.data(6), GAUSSIAN, epochs=1, batch_size=6, seed=1, **case.options
    )
    joint = posterior.model
    prepared = posterior.predictor.prepare(case.data(6), need_labels=True)
    batch = to_device(prepared.collate([prepared.examples[i] for i in range(6)]), "cpu")
    mean = joint.program.mean()

    def score(head: Tensor) -> Tensor:
        drawn = replace(mean, A=mean.A.detach(), B=mean.B.detach(), head=head)
        output = joint.run(batch, joint.binding(drawn))
        return joint.task.log_prob(output, batch).sum()

    return posterior, batch, score


@pytest.mark.parametrize("problem", ["classes", "labels", "choices", "rewards"])
def test_the_curvature_is_the_hessian_in_the_last_layer(problem: str) -> None:
    posterior, batch, score = widened(problem)
    joint, loc = posterior.model, law_of(posterior).loc
    exact = -torch.autograd.functional.hessian(score, loc).double()
    found = head_curvature(joint, [batch], whole=True).columns
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5 * float(exact.abs().max()))
    eigen = law_of(posterior)
    rebuilt = eigen.columns[0] @ torch.diag(eigen.values.flatten()) @ eigen.columns[0].T
    torch.testing.assert_close(
        rebuilt.double(), exact, rtol=1e-2, atol=1e-4 * float(exact.abs().max())
    )


def test_the_curvature_of_tags_is_the_hessian_in_expectation() -> None:
    posterior, batch, score = widened("tags")
    joint, loc = posterior.model, law_of(posterior).loc
    exact = -torch.autograd.functional.hessian(score, loc).double()
    torch.manual_seed(0)
    mean = sum(head_curvature(joint, [batch], whole=True).columns for _ in range(60)) / 60
    assert float((mean - exact).norm() / exact.norm()) < 0.3


def test_a_kronecker_curvature_is_exact_for_one_example() -> None:
    joint, (x, y) = fitted().model, pairs(1)
    joint.rows = 1
    whole = head_curvature(joint, [{"inputs": x, "labels": y}], whole=True).columns
    parts = head_curvature(joint, [{"inputs": x, "labels": y}], whole=False)
    joint.rows = joint.num_examples
    torch.testing.assert_close(torch.kron(parts.rows, parts.columns), whole)


def test_a_kronecker_curvature_takes_the_positions_that_are_read() -> None:
    """The score layer of a causal network sees all tokens of a text, and its last one counts."""
    posterior = pyrolora.fit(
        llama_reward(2),
        reviews(6),
        GAUSSIAN,
        tokenizer=letter_tokenizer(),
        adapter=SMALL,
        epochs=1,
    )
    joint, data = posterior.model, posterior.predictor.prepare(reviews(6), need_labels=True)
    batch = to_device(data.collate([data.examples[0]]), "cpu")
    assert batch["input_ids"].shape[-1] > 1
    whole = head_curvature(joint, [batch], whole=True).columns
    parts = head_curvature(joint, [batch], whole=False)
    close = {"rtol": 1e-5, "atol": 1e-5 * float(whole.abs().max())}
    torch.testing.assert_close(torch.kron(parts.rows, parts.columns), whole, **close)


def test_beta_divides_the_curvature_and_four_times_the_data_halve_the_deviations() -> None:
    posterior = pyrolora.fit(
        mlp(outputs=1), pairs(400, 1), GAUSSIAN, task="regression", adapter=LAST, epochs=1, seed=1
    )
    joint, (x, y) = posterior.model, pairs(400, 1)
    batch = {"inputs": x, "labels": y}

    def deviations(batches: int, beta: float) -> Tensor:
        """Those of the three directions that the data determine best."""
        joint.rows = 400 * batches
        settle_head(joint, [batch] * batches, beta)
        joint.rows = joint.num_examples
        law = joint.program.law
        return (law.values + law.precision).rsqrt().flatten().sort().values[:3]

    one = deviations(1, 1.0)
    assert (one / deviations(4, 1.0)).tolist() == pytest.approx([2] * 3, rel=0.03)
    torch.testing.assert_close(deviations(4, 4.0), one, rtol=1e-4, atol=0)


def test_the_law_of_a_cold_fit_has_its_beta() -> None:
    cold, warm = (
        fitted(MAP(head="gaussian", prior_scale=9.0, kl_weight=weight)) for weight in (0.1, 1.0)
    )
    batch = dict(zip(("inputs", "labels"), pairs(40), strict=True))
    for posterior, beta in ((cold, 0.1), (warm, 1.0)):
        whole = head_curvature(posterior.model, [batch], whole=True).columns
        torch.testing.assert_close(
            law_of(posterior).values.flatten().double(),
            torch.linalg.eigvalsh(whole).clamp(min=0) / beta,
            rtol=1e-3,
            atol=1e-4,
        )


def test_classes_without_examples_are_as_wide_as_the_prior_lets_them() -> None:
    options: dict[str, Any] = {"adapter": LAST, "epochs": 40, "learning_rate": 1e-2, "seed": 1}
    posterior = pyrolora.fit(mlp(outputs=5), pairs(60), GAUSSIAN, task="classification", **options)
    law = law_of(posterior)
    sd = law.law().variance.sqrt().unflatten(0, (5, -1)).mean(-1)
    assert sd[3:].min() > sd[:3].max()
    assert sd.max() <= float(law.precision) ** -0.5


# The fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", [MAP(), MonteCLoRA(draws_per_batch=2)])
def test_the_training_is_that_of_a_point_head(guide: Guide) -> None:
    options: dict[str, Any] = {"task": "classification", "adapter": LAST, "epochs": 2, "seed": 1}
    states, numbers = [], []
    for one in (guide, replace(guide, head="gaussian")):
        torch.manual_seed(5)
        posterior = pyrolora.fit(mlp(), pairs(12), one, eval_data=pairs(9), **options)
        numbers.append(torch.rand(3))
        states.append(posterior.model.own_state())
        assert posterior.guide.program is posterior.model.program
    assert torch.equal(*numbers)
    added = {name for name in states[1] if name not in states[0]}
    assert added == {f"head_law.{n}" for n in ("loc", "precision", "rows", "columns", "values")}
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    assert posterior.history[-2]["head_precision"] == pytest.approx(
        float(law_of(posterior).precision)
    )
    assert "eval_nll" in posterior.history[-1]  # scored with the head as it is now
    scores = posterior.evaluate(pairs(9), num_samples=0)
    assert scores == pyrolora.fit(mlp(), pairs(12), guide, **options).evaluate(
        pairs(9), num_samples=0
    )


def test_a_given_adapter_gets_a_law_of_its_head(tmp_path: Path) -> None:
    plain = fitted(MAP())
    plain.to_peft(tmp_path)
    read = pyrolora.from_peft(tmp_path, mlp(), task="classification")
    for given in (plain, read):
        posterior = pyrolora.fit(given, pairs(40), GAUSSIAN)
        torch.testing.assert_close(
            covariance(posterior), covariance(fitted()), rtol=1e-3, atol=1e-4
        )
        before, after = given.model.own_state(), posterior.model.own_state()
        assert all(torch.equal(after[n], before[n]) for n in before if n.startswith("heads"))
    with pytest.raises(ConfigError, match="'map' has nothing to infer"):
        pyrolora.fit(plain, pairs(40), MAP())


def test_a_head_of_two_layers_has_a_law_of_the_last() -> None:
    config = RobertaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
    )
    torch.manual_seed(0)
    network = RobertaForSequenceClassification(config)
    posterior = pyrolora.fit(
        network, reviews(6), GAUSSIAN, tokenizer=tokenizer(), adapter=SMALL, epochs=1, seed=1
    )
    assert law_of(posterior).loc.shape == (2 * 17,)
    drawn = posterior.model.named_heads(posterior.predictor.numbered.factors([0, 1]))
    (head, other), trained = drawn["classifier"], posterior.model.heads["classifier"]
    assert head.dense is trained.dense is other.dense
    assert not torch.equal(head.out_proj.weight, other.out_proj.weight)
    assert not torch.equal(head.out_proj.weight, trained.out_proj.weight)


# Verbs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guide",
    [
        GAUSSIAN,
        MonteCLoRA(head="gaussian"),
        Flat(inner=MeanField(), head="gaussian"),
        Laplace(linearised=False, prior_scale=0.1, head="gaussian"),
    ],
)
def test_a_draw_is_one_function_everywhere(guide: Guide, tmp_path: Path) -> None:
    posterior, (x, _) = fitted(guide), pairs(9)
    one, two = (posterior.predict(x, draws=[k]).draws[0] for k in (3, 0))
    both = posterior.predict(x, draws=[0, 3]).draws
    torch.testing.assert_close(both, torch.stack([two, one]))
    assert (one - two).abs().max() > 1e-3
    merged = posterior.merge(3)
    torch.testing.assert_close(merged(x).softmax(-1), one)
    assert all(isinstance(p, nn.Parameter) for p in merged.parameters())
    posterior.to_peft(tmp_path / "draw", draw=3)
    head = read_adapter(tmp_path / "draw", mlp()).heads["2"]
    assert torch.equal(head["weight"], merged[2].weight)
    posterior.save(tmp_path / "saved")
    again = pyrolora.load(tmp_path / "saved", mlp())
    assert again.options == guide
    assert torch.equal(again.predict(x, draws=[0, 3]).draws, both)
    assert torch.equal(again.sample(draws=[3])["head"], posterior.sample(draws=[3])["head"])
    point = posterior.predict(x, num_samples=0).draws[0]
    torch.testing.assert_close(posterior.merge()(x).softmax(-1), point)


@pytest.mark.parametrize("problem", ["classes", "labels", "rewards"])
def test_heads_on_one_adapter_share_its_pass(problem: str) -> None:
    posterior, batch, _ = widened(problem)
    joint, numbered = posterior.model, posterior.predictor.numbered
    factors = numbered.factors([0, 1, 2])
    assert one_adapter(joint, batch, factors) == joint.task.linearisable
    assert not one_adapter(joint, batch, numbered.factors([0])[0])
    found = torch.cat([*passes(joint, batch, factors, 128)])
    each = [joint.network(batch, numbered.factors([k])[0]) for k in range(3)]
    torch.testing.assert_close(found, torch.stack(each))


def test_linear_predictions_of_laplace_add_those_of_the_head() -> None:
    guide = Laplace(prior_scale=1e-4, head="gaussian")  # adapters next to a point
    posterior, (x, _) = fitted(guide), pairs(9)
    n = 4000
    logs = posterior.predict(x, num_samples=n, seed=0).draws.double().log()
    phi = features(posterior, x)
    blocks = covariance(posterior).unflatten(0, (3, -1)).unflatten(-1, (3, -1))
    variance = torch.einsum("if,cfdg,ig->icd", phi, blocks, phi)
    contrast = torch.tensor([1.0, -1.0, 0.0], dtype=torch.double)
    exact = torch.einsum("icd,c,d->i", variance, contrast, contrast)
    assert (logs @ contrast).var(0).tolist() == pytest.approx(exact.tolist(), rel=0.12)


def test_the_pyro_pair_has_the_site() -> None:
    posterior, (x, y) = fitted(), pairs(40)
    batch = {"inputs": x, "labels": y}
    head = law_of(posterior).loc.clone().requires_grad_()
    trace = poutine.trace(poutine.condition(posterior.model, {"head": head})).get_trace(batch)
    prior = trace.nodes["head"]["fn"]
    assert float(prior.base_dist.scale[0]) == pytest.approx(
        float(law_of(posterior).precision ** -0.5)
    )
    (gradient,) = torch.autograd.grad(trace.log_prob_sum(), head)
    assert gradient.abs().max() > 0
    draws = pyro.infer.Predictive(posterior.model, guide=posterior.guide, num_samples=4)(
        {"inputs": x}
    )
    assert draws["y"].shape[0] == 4
    assert len(posterior.summary(9).filter(like="head_norm", axis=0)) == 1
    entries = posterior.to_arviz(4, factors=True)["posterior"]["head"]
    assert torch.equal(torch.tensor(entries.values[0]), posterior.sample(draws=range(4))["head"])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_network_takes_drawn_heads() -> None:
    posterior = fitted(MonteCLoRA(head="gaussian"))
    options: dict[str, Any] = {"task": "classification", "adapter": LAST, "epochs": 8, "seed": 1}
    network = torch.compile(mlp(), backend="eager")
    compiled = pyrolora.fit(network, pairs(40), MonteCLoRA(head="gaussian"), **options)
    for draws in ([0], [0, 1, 2]):
        expected = posterior.predict(pairs(9)[0], draws=draws).draws
        torch.testing.assert_close(compiled.predict(pairs(9)[0], draws=draws).draws, expected)


def test_khat_judges_the_head_with_the_layers_or_leaves_it_at_its_mean() -> None:
    posterior = fitted(MeanField(head="gaussian", kl_weight=1.0))
    whole, alone = posterior.khat(pairs(40), 50, seed=0), fitted().khat(pairs(40), 50, seed=0)
    head = law_of(posterior).loc.numel()
    assert alone.dimensions == head
    assert whole.dimensions == head + posterior.sample(1)["A"].numel()
    layers = posterior.khat(pairs(40), 50, seed=0, per_layer=True)
    assert sum(one.dimensions for one in layers.values()) == whole.dimensions - head
    with pytest.raises(ConfigError, match="'map' is a point"):
        fitted().khat(pairs(40), 50, per_layer=True)


def test_a_folder_of_an_earlier_version_has_a_point_head(tmp_path: Path) -> None:
    posterior = fitted(Flat(inner=MAP()))
    posterior.save(tmp_path)
    meta = json.loads((tmp_path / "posterior.json").read_text())
    assert meta["guide"]["options"].pop("head") == "point"
    assert meta["guide"]["options"]["inner"].pop("head") == "point"
    assert described(meta).guide == posterior.options


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [NUTS, TFB, Ensemble, Full, lambda **o: Laplace(curvature="full", **o)],
    ids=["nuts", "tfb", "ensemble", "full", "full laplace"],
)
def test_guides_that_keep_a_point_head_say_so(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"keeps the task head a point.*'map', 'montec'"):
        make(head="gaussian")


def test_the_head_is_that_of_the_whole_guide() -> None:
    for make in (lambda inner: Flat(inner=inner), lambda inner: NUTS(inner=inner)):
        with pytest.raises(ConfigError, match=r"inner 'meanfield'; leave it out there"):
            make(MeanField(head="gaussian", kl_weight=1.0))
    with pytest.raises(ConfigError, match="inner must be another guide"):
        Flat(inner="map", head="gaussian")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="head must be one of 'point', 'gaussian'"):
        MAP(head="normal")  # type: ignore[arg-type]
    assert as_guide("map").head == "point"


def test_networks_without_a_last_linear_layer_are_refused_before_the_training() -> None:
    options: dict[str, Any] = {"epochs": 1, "guide": GAUSSIAN}
    with pytest.raises(ConfigError, match="this GPT2LMHeadModel has no task head with one"):
        pyrolora.fit(gpt2(), texts(6), tokenizer=tokenizer(), **options)
    with pytest.raises(ConfigError, match=r"this Sequential has no task head.*modules_to_save"):
        pyrolora.fit(mlp(), pairs(12), task="classification", adapter=SMALL, **options)


def test_a_layer_that_is_not_the_last_to_be_called_is_refused() -> None:
    class Head(nn.Module):
        """Its layers are defined in another order than they are called."""

        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(16, 3), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).tanh())

    network = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), Head())
    options: dict[str, Any] = {"task": "classification", "epochs": 1}
    with pytest.raises(ConfigError, match=r"output has to be linear, and in '2\.first'"):
        pyrolora.fit(network, pairs(12), GAUSSIAN, adapter=LAST, **options)
    last = AdapterConfig(r=2, modules_to_save=["2.last"])
    assert law_of(pyrolora.fit(network, pairs(12), GAUSSIAN, adapter=last, **options)).whole


def test_an_earlier_posterior_has_no_gaussian_head() -> None:
    for first, second in ((MeanField(head="gaussian"), None), (MeanField(), "gaussian")):
        guide = None if second is None else MeanField(head="gaussian")
        with pytest.raises(ConfigError, match=r"the task head stays as it is, got head='gaussian'"):
            pyrolora.fit(mlp(), pairs(12), guide, prior=fitted(first))

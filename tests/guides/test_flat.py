"""Flat-LoRA as a whole: its objective in closed form, its schedule, its seeds, its cost."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import LiveBytes
from problems import arguments, bert, gpt2, mlp, tokens
from pyro import poutine
from pyro.infer import MCMC, Predictive
from pyro.infer import NUTS as Sampler
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.adapters import FlatFactors, attach, weight_noise
from pyrolora.adapters.weight_noise import WeightNoise
from pyrolora.errors import ConfigError
from pyrolora.guides import MAP, Ensemble, Flat, Guide, Laplace, MeanField, MonteCLoRA
from pyrolora.inference import NamedELBO
from pyrolora.model import JointGuide, JointModel, build
from pyrolora.posterior import Posterior
from pyrolora.tasks import task_for

CONFIG = AdapterConfig(r=2)
RHO = 0.05


def joint_of(
    network: nn.Module, guide: Guide, task: str, rows: int, config: AdapterConfig = CONFIG
) -> JointModel:
    """A joint model in training mode at the last step; its B is not zero."""
    law = task_for(network, task)
    joint = build(network, attach(network, config), config, guide, law, rows)
    bank = joint.program.bank
    bank.assign("B_loc", torch.randn(bank.layouts["B"].total) / 4)
    return joint.train()


def weights(joint: JointModel) -> list[Tensor]:
    """W + s B A of every layer, in the order of the streams."""
    bank = joint.program.bank
    layers = joint.attachment.layers
    found = bank.matrices(bank.means())
    return [
        layers[name].weight + spec.scaling * B @ A
        for (name, spec), (A, B) in zip(bank.specs.items(), found.values(), strict=True)
    ]


def draw(joint: JointModel, seeds: Tensor) -> dict[str, Tensor]:
    """The sites at the means, with these seeds."""
    means = joint.program.bank.means()
    return {"A": means.A, "B": means.B, "seed": seeds}


def seeded(joint: JointModel, seeds: Tensor) -> FlatFactors:
    """The factors at the means with the noise of these seeds; the guide has ``at_prediction``."""
    return joint.program.factors(draw(joint, seeds))


def classification(rows: int = 16) -> dict[str, Tensor]:
    return {"inputs": torch.randn(rows, 4), "labels": torch.arange(rows) % 3}


def fitted(guide: Guide | str, network: nn.Module | None = None, **options: Any) -> Posterior:
    """A short fit of a plain classifier."""
    options = {"epochs": 2, "batch_size": 4, "seed": 3, "learning_rate": 1e-2, **options}
    data = (torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3)
    network = mlp() if network is None else network
    return pyrolora.fit(
        network, data, guide=guide, task="classification", adapter=CONFIG, **options
    )


@pytest.fixture
def noises(monkeypatch: pytest.MonkeyPatch) -> list[WeightNoise]:
    """The noise of every perturbed product, one for each layer and forward pass."""
    used: list[WeightNoise] = []
    original = WeightNoise.frozen

    def frozen(self: WeightNoise, *args: Any) -> Any:
        used.append(self)
        return original(self, *args)

    monkeypatch.setattr(WeightNoise, "frozen", frozen)
    return used


def scales(noises: list[WeightNoise]) -> list[float]:
    return [noise.scale for noise in noises]


def equal(one: Posterior, other: Posterior) -> bool:
    """Whether two posteriors have the same tensors to the bit."""
    states = one.model.own_state(), other.model.own_state()
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# The objective -----------------------------------------------------------------------------------


def second_order(joint: JointModel, batch: dict[str, Tensor], rho: float, draws: int) -> Tensor:
    """(draws,): what E adds to the loss beyond the first order, whose mean is zero, over the second
    order in expectation, ½ Σ σ² ‖W'[i, :]‖² / in · ∂²loss/∂W[i, j]²."""
    (first, second), layers = weights(joint), list(joint.attachment.layers.values())
    x, y = batch["inputs"], batch["labels"]
    sizes = [first.numel(), second.numel()]

    def loss(flat: Tensor) -> Tensor:
        W, V = flat.split(sizes)
        hidden = F.linear(x, W.view_as(first), layers[0].bias).tanh()
        return F.cross_entropy(
            F.linear(hidden, V.view_as(second), layers[1].bias), y, reduction="sum"
        )

    flat = torch.cat([first.flatten(), second.flatten()]).detach().double().requires_grad_()
    joint.base.double()
    x = x.double()
    base = loss(flat)
    (gradient,) = torch.autograd.grad(base, flat)
    hessian = torch.autograd.functional.hessian(loss, flat.detach())
    variances = torch.cat(
        [
            (rho**2 * W.square().sum(1, keepdim=True) / W.shape[1]).expand_as(W).flatten()
            for W in (first.detach().double(), second.detach().double())
        ]
    )
    expected = (variances * hessian.diagonal()).sum() / 2

    factors = seeded(joint, torch.rand(draws))
    bound = joint.binding(factors).factors
    with torch.no_grad():
        E = []
        for layer in layers:
            own = bound[layer]
            ones = torch.eye(layer.in_features, dtype=torch.float64).repeat(draws, 1)
            frozen = own.noise.frozen(layer.base_layer, ones, own.A, own.sB)
            noisy = frozen.forward(ones)
            E.append((noisy - layer(ones)).view(draws, -1, layer.out_features).mT.flatten(1))
        outputs = joint.network({**batch, "inputs": x}, factors)
        losses = F.cross_entropy(outputs.flatten(0, 1), y.repeat(draws), reduction="none")
        change = losses.view(draws, -1).sum(1) - base - torch.cat(E, dim=1) @ gradient
    return change / expected


@pytest.mark.parametrize(("rho", "holds"), [(RHO, True), (3.0, False)])
def test_the_expected_loss_is_its_second_order_expansion_where_the_noise_is_small(rho, holds):
    """Two layers with a tanh between them, and labels drawn from the network's own predictions, so
    that the curvature is positive. The mean over seeds against the Hessian."""
    guide, config = Flat(rho=rho, at_prediction=True), AdapterConfig(r=2, lora_alpha=2)
    joint = joint_of(mlp(), guide, "classification", 32, config)
    batch = {"inputs": torch.randn(32, 4)}
    with torch.no_grad():
        output = joint.network(batch, joint.program.mean())
    batch["labels"] = output.softmax(-1).multinomial(1).squeeze(-1)
    ratios = second_order(joint, batch, rho, draws=4000).detach()
    error = float(ratios.std()) / len(ratios) ** 0.5
    difference = abs(float(ratios.mean()) - 1)
    assert error < 0.04
    assert difference < 4 * error if holds else difference > 8 * error


def test_the_objective_is_the_loss_at_the_seed_that_was_drawn_and_the_kl_is_zero():
    batch = classification()
    joint = joint_of(mlp(), Flat(rho=0.5, at_prediction=True), "classification", 16)
    elbo, guide, losses = NamedELBO(), JointGuide(joint.program), []
    for number in range(4):
        torch.manual_seed(number)
        losses.append(elbo.differentiable_loss(joint, guide, batch))
        assert {name: float(elbo.terms[name]) for name in ("kl/A", "kl/B", "kl/seed")} == {
            "kl/A": 0.0, "kl/B": 0.0, "kl/seed": 0.0,
        }  # fmt: skip
        torch.manual_seed(number)
        seed = poutine.trace(guide).get_trace(batch).nodes["seed"]["value"]
        output = joint.network(batch, seeded(joint, seed))
        expected = F.cross_entropy(output, batch["labels"], reduction="sum")
        torch.testing.assert_close(losses[-1], expected)
    assert torch.stack(losses).std() > 0.1


class TwoLinear(nn.Sequential):
    """y = x W₁ᵀ W₂ᵀ, one output: its quadratic loss has an expectation in closed form."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5, bias=False), nn.Linear(5, 1, bias=False))


def test_the_gradient_of_the_factors_is_that_of_the_expected_loss():
    """For h = x W₁ᵀ, entries of row i of E_k of variance s_ki², and the norms held constant,

    E (y − t)² = (h W₂ᵀ − t)² + ‖x‖² Σ_i s₁ᵢ² W₂ᵢ² + s₂² (‖h‖² + ‖x‖² Σ_i s₁ᵢ²).

    Labels near the network's output, where the noise has the larger share of the gradient.
    """
    torch.manual_seed(1)
    rho, rows, batches, draws = 0.5, 8, 40, 100
    joint = joint_of(
        TwoLinear(), Flat(rho=rho, at_prediction=True), "regression", rows, AdapterConfig(r=1)
    )
    means = [joint.program.bank.get_parameter(name) for name in ("A_loc", "B_loc")]
    batch = {"inputs": torch.randn(rows, 4)}
    first, second = (W.detach() for W in weights(joint))
    batch["labels"] = batch["inputs"] @ first.T @ second[0] + torch.randn(rows)

    def expected(noise_counts: bool, norms_count: bool) -> Tensor:
        W1, W2 = weights(joint)
        norms = [W.square().sum(1) if norms_count else W.detach().square().sum(1) for W in (W1, W2)]
        s1, s2 = (rho**2 * n / size for n, size in zip(norms, (4, 5), strict=True))
        x, t = batch["inputs"], batch["labels"]
        h, size = x @ W1.T, x.square().sum(1)
        own = (h @ W2[0] - t).square()
        rise = size * (s1 * W2[0].square()).sum() + s2 * (h.square().sum(1) + size * s1.sum())
        loss = (own + noise_counts * rise).sum() / 2
        return torch.cat(torch.autograd.grad(loss, means))

    found = []
    for _ in range(batches):
        outputs = joint.network(batch, seeded(joint, torch.rand(draws)))
        loss = (outputs - batch["labels"]).square().sum() / 2 / draws
        found.append(torch.cat(torch.autograd.grad(loss, means)))
    gradients = torch.stack(found)
    error = gradients.std(0) / batches**0.5

    def worst(reference: Tensor) -> float:
        return float(((gradients.mean(0) - reference).abs() / error).max())

    assert worst(expected(True, False)) < 4.5
    assert worst(expected(False, False)) > 10
    assert worst(expected(True, True)) > 10


# The fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [bert, gpt2], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fit_leaves_the_network_as_it_is_to_the_bit_and_the_noise_counts(dtype, network):
    data = tokens(8) if network is bert else tokens(8).remove_columns("labels")
    fits = []
    for guide in ("map", "flat+map"):
        base = network().to(dtype)
        before = {name: t.clone() for name, t in base.state_dict().items()}
        fits.append(pyrolora.fit(base, data, guide=guide, epochs=2, batch_size=4, adapter=CONFIG))
        after = base.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(before[name], t) for name, t in after.items())
    assert fits[0].model.own_state().keys() != fits[1].model.own_state().keys()  # inner.*
    for one, other in zip(*(f.model.own_state().values() for f in fits), strict=True):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("guide", [Flat(), Flat(inner=MonteCLoRA(draws_per_batch=2))])
def test_the_same_seed_is_the_same_fit_and_another_seed_another(guide):
    first, again, other = (fitted(guide, seed=seed) for seed in (1, 1, 2))
    assert equal(first, again)
    assert not equal(first, other)


class Steps(TrainerCallback):
    """Cuts a growing list in one piece an optimiser step."""

    def __init__(self, grows: list[Any]) -> None:
        self.grows, self.starts = grows, list[int]()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.starts.append(len(self.grows))

    def pieces(self) -> Iterator[list[Any]]:
        for start, end in zip(self.starts, [*self.starts[1:], len(self.grows)], strict=True):
            yield self.grows[start:end]


def schedule(rho: float, steps: int) -> list[float]:
    return [rho * (1 - math.cos(math.pi * t / steps)) / 2 for t in range(1, steps + 1)]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_scale_rises_by_half_a_cosine_over_the_optimiser_steps(accumulation, noises, tmp_path):
    """Fourteen examples, two a batch: with accumulation the last step of an epoch has one batch."""
    recorder = Steps(noises)
    data = (torch.randn(14, 4), torch.arange(14) % 3)
    pyrolora.fit(
        mlp(), data, guide=Flat(rho=0.1), task="classification", adapter=CONFIG,
        training=arguments(
            tmp_path, max_steps=5, per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
        ),
        callbacks=[recorder],
    )  # fmt: skip
    pieces = [scales(piece) for piece in recorder.pieces()]
    batches = {1: [1, 1, 1, 1, 1], 3: [3, 3, 1, 3, 3]}[accumulation]
    assert [len(piece) for piece in pieces] == [2 * count for count in batches]
    assert [piece[0] for piece in pieces] == pytest.approx(schedule(0.1, 5), rel=1e-12)
    assert all(len(set(piece)) == 1 for piece in pieces)
    assert max(scales(noises)) == 0.1


SCRIPT = """
import json, os, sys, torch, pyrolora
sys.path.insert(0, {tests!r})
from problems import mlp
from pyrolora.adapters.weight_noise import WeightNoise
from pyrolora.guides import Flat
from transformers import TrainingArguments
torch.set_num_threads(1)
torch.manual_seed(0)
used, frozen = [], WeightNoise.frozen
def spy(self, *args):
    used.append(self.scale)
    return frozen(self, *args)
WeightNoise.frozen = spy
pyrolora.fit(
    mlp(), (torch.randn(24, 4), torch.arange(24) % 3), guide=Flat(rho=0.1),
    task="classification", adapter=pyrolora.AdapterConfig(r=2),
    training=TrainingArguments(
        output_dir={out!r}, max_steps=4, per_device_train_batch_size=2,
        gradient_accumulation_steps=3, use_cpu=True, save_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, seed=3,
        ddp_find_unused_parameters=False,
    ),
)
rank = os.environ["RANK"]
with open({out!r} + "/scales-" + rank + ".json", "w") as file:
    json.dump([torch.distributed.get_world_size(), used], file)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_schedule_of_one(tmp_path):
    script = tmp_path / "script.py"
    tests = str(Path(__file__).parents[1])
    script.write_text(textwrap.dedent(SCRIPT).format(tests=tests, out=str(tmp_path)))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        world, used = json.loads((tmp_path / f"scales-{rank}.json").read_text())
        assert world == 2
        # Three batches a step, two layers each.
        expected = [scale for scale in schedule(0.1, 4) for _ in range(6)]
        assert used == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_parameters(tmp_path, noises):
    fits, passes = [], []
    for on in (False, True):
        args = arguments(tmp_path, max_steps=5, gradient_checkpointing=on)
        fits.append(
            pyrolora.fit(bert(), tokens(8), guide=Flat(rho=0.5), adapter=CONFIG, training=args)
        )
        passes.append(len(noises))
        noises.clear()
    assert passes[1] == 2 * passes[0]  # nothing is recomputed without it
    assert equal(*fits)


def peak_of_a_step(guide: Guide, dtype: torch.dtype) -> int:
    """Bytes beside the network and the posterior that a step on one big layer takes, at most."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 512), nn.Tanh(), nn.Linear(512, 512)).to(dtype)
    joint = joint_of(network, guide, "classification", 4)
    batch = {"inputs": torch.randn(4, 4, dtype=dtype), "labels": torch.arange(4)}
    elbo, program = NamedELBO(), JointGuide(joint.program)
    elbo.differentiable_loss(joint, program, batch)  # with Pyro's validation
    with LiveBytes(*joint.parameters(), *joint.buffers(), *batch.values()) as live:
        elbo.differentiable_loss(joint, program, batch).backward()
    return live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_takes_the_memory_of_plain_lora_and_a_few_chunks(dtype, monkeypatch):
    """Chunks of 2¹³ numbers, in float32; and one of the whole weight, which the counter sees."""
    chunk, weight = 2**13 * 4, 512 * 512 * 4
    plain = peak_of_a_step(MAP(), dtype)
    assert peak_of_a_step(Flat(), dtype) > weight
    monkeypatch.setattr(weight_noise, "CHUNK", 2**13)
    assert plain < peak_of_a_step(Flat(), dtype) < plain + 3 * chunk


# Around other guides -----------------------------------------------------------------------------


def test_the_terms_of_the_bound_are_those_of_the_inner_guide_and_a_zero():
    plain, flat = fitted("montec"), fitted("flat+montec")
    entries = [next(e for e in f.history if "elbo" in e) for f in (plain, flat)]
    terms = [{n: v for n, v in e.items() if n.startswith("kl/")} for e in entries]
    assert terms[1].pop("kl/seed") == 0
    assert terms[0].keys() == terms[1].keys() == {
        "kl/mixture_weights", "kl/covariance_tril", "kl/noise",
    }  # fmt: skip
    expected = entries[1]["log_likelihood"] - sum(terms[1].values())
    assert entries[1]["elbo"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("inner", "fits"),
    [
        (MonteCLoRA(), 1),
        (Laplace(prior_scale=0.5), 1),
        (Ensemble(members=3), 3),
        (Ensemble(members=3, side_by_side=True), 1),
    ],
    ids=["montec", "laplace", "ensemble", "side by side"],
)
def test_every_point_that_the_inner_guide_trains_is_trained_with_noise(inner, fits, noises):
    """Six steps, two layers; and none where curvature or predictions are computed."""
    posterior = fitted(Flat(inner=inner))
    one = [scale for scale in schedule(RHO, 6) for _ in range(2)]
    assert scales(noises) == pytest.approx(one * fits, rel=1e-12)
    posterior.predict(torch.randn(3, 4), num_samples=2)
    assert len(noises) == len(one) * fits


@pytest.mark.parametrize(
    "inner", [Ensemble(members=3, side_by_side=True), MonteCLoRA(draws_per_batch=3)]
)
def test_members_and_draws_in_one_pass_have_noise_of_their_own(inner, noises):
    fitted(Flat(inner=inner), batch_size=3, epochs=1)
    seeds = [noise.seeds for noise in noises]
    assert len(set(seeds)) == 4  # steps
    assert all(len(set(own)) == 3 for own in seeds)


# The seed as a site ------------------------------------------------------------------------------


def test_the_seed_is_a_site_of_draws_of_predictive_and_of_nuts(noises):
    posterior = fitted(Flat(inner=MeanField(latent="A")))
    noises.clear()
    seeds = posterior.sample(50, seed=0)["seed"]
    assert seeds.shape == (50,)
    assert len(seeds.unique()) == 50
    assert ((seeds > 0) & (seeds < 1)).all()
    batch = classification()
    found = Predictive(posterior.model, guide=posterior.guide, num_samples=5)(
        {"inputs": batch["inputs"]}
    )
    assert found["y"].shape == (5, 16)
    assert len(found["seed"].unique()) == 5
    chains = MCMC(Sampler(posterior.model), num_samples=5, warmup_steps=5, disable_progbar=True)
    chains.run(batch)
    assert set(chains.get_samples()) == {"A", "seed"}
    assert noises == []


def test_replaying_a_trace_of_the_guide_gives_the_same_output():
    batch = classification()
    joint = joint_of(mlp(), Flat(rho=0.5), "classification", 16)
    guide = JointGuide(joint.program)

    def output(trace: poutine.Trace) -> Tensor:
        replayed = poutine.trace(poutine.replay(joint, trace=trace)).get_trace(batch)
        return replayed.nodes["y"]["fn"].logits

    with torch.no_grad():
        one, other = (poutine.trace(guide).get_trace(batch) for _ in range(2))
        assert torch.equal(output(one), output(one))
        assert not torch.allclose(output(one), output(other))


@pytest.mark.parametrize("inner", [MAP(), MonteCLoRA(), Ensemble(members=2), Laplace()])
def test_predictions_are_those_of_the_inner_guide_to_the_bit_unless_noise_is_asked_for(
    inner, noises
):
    x = torch.randn(5, 4)
    flat, plain = fitted(Flat(inner=inner)), fitted(inner)
    state = flat.model.own_state()
    plain.model.load_own_state({n.replace("program.inner.", "program."): state[n] for n in state})
    noises.clear()
    expected = plain.predict(x, num_samples=6, seed=7).draws
    assert torch.equal(flat.predict(x, num_samples=6, seed=7).draws, expected)
    flat.model.train()
    assert torch.equal(flat.predict(x, num_samples=6, seed=7).draws, expected)
    assert noises == []


@pytest.mark.parametrize("inner", [MAP(), MonteCLoRA(), Ensemble(members=2)])
def test_noise_at_prediction_is_drawn_anew_for_every_draw_and_the_same_for_all_examples(
    inner, noises
):
    posterior = fitted(Flat(inner=inner, rho=0.3, at_prediction=True))
    noises.clear()
    x = torch.randn(5, 4)
    draws = posterior.predict(x, num_samples=6, seed=7).draws
    assert set(scales(noises)) == {0.3}
    assert len({seed for noise in noises for seed in noise.seeds}) == 6
    assert len(draws[:, 0].unique(dim=0)) == 6
    one_by_one = posterior.predict(x, num_samples=6, seed=7, batch_size=1).draws
    torch.testing.assert_close(draws, one_by_one)


@pytest.mark.parametrize("at_prediction", [False, True])
def test_evaluation_during_the_fit_is_that_of_the_prediction(at_prediction, noises):
    """Without noise, or at σ_T = ρ, so that the scores of epochs compare with each other; two
    batches and two layers each time. The last step is looked at after it."""
    data = (torch.randn(12, 4), torch.arange(12) % 3)
    fitted(Flat(rho=0.3, at_prediction=at_prediction), eval_data=data, batch_size=6, epochs=2)
    one, two, three, four = ([scale] * 2 for scale in schedule(0.3, 4))
    evaluated = [0.3] * 4 if at_prediction else []
    expected = [*one, *two, *evaluated, *three, *four, *evaluated, *evaluated]
    assert scales(noises) == pytest.approx(expected, rel=1e-12)


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, "rho must be a finite number > 0, got 0.0"),
        ({"rho": -0.1}, "rho must be a finite number > 0, got -0.1"),
        ({"rho": math.nan}, "rho must be a finite number > 0, got nan"),
        ({"inner": Flat()}, "inner must be another guide"),
        ({"inner": "map"}, "inner must be another guide.*got 'map'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Flat(**options)


def test_noise_at_prediction_is_refused_for_predictions_that_are_linear():
    with pytest.raises(ConfigError, match="linearised prediction takes no noise"):
        fitted(Flat(inner=Laplace(), at_prediction=True))


def test_a_draw_with_noise_is_no_adapter(tmp_path):
    posterior = fitted(Flat(at_prediction=True))
    for export in (lambda k: posterior.to_peft(tmp_path, k), posterior.merge):
        with pytest.raises(ConfigError, match="has noise on the weights, which no adapter holds"):
            export(0)
        export("mean")


def test_a_network_without_a_plain_weight_is_refused():
    network = mlp()
    nn.utils.parametrizations.orthogonal(network[0])
    with pytest.raises(ConfigError, match="ParametrizedLinear has none in memory"):
        fitted(Flat(), network)

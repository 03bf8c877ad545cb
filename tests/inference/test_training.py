"""Training: equal to PEFT + Trainer for `map`, one objective however it is cut, repeatable."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from peft_trainer import lora_layers
from problems import arguments, bert, llama, mlp, reviews, tokenizer, tokens
from transformers import Trainer, TrainerCallback, TrainingArguments

import pyrolora
from pyrolora import AdapterConfig, defaults
from pyrolora.guides import MAP, Flat, LowRank, MonteCLoRA

TARGETS = ["query", "key", "value"]


def peft_run(network, data, args, start=None, r=4, init=True):
    """LoRA by PEFT and the Trainer, from given factors or from PEFT's own: layer -> (A, B), and the
    head."""
    options = {"target_modules": TARGETS, "task_type": "SEQ_CLS", "init_lora_weights": init}
    model = peft.get_peft_model(network, peft.LoraConfig(r=r, lora_alpha=8, **options))
    layers = lora_layers(model, start)
    trainer = Trainer(model=model, args=args, train_dataset=data)
    # BERT's loss is a mean over the micro-batch: the Trainer has to divide by the accumulation
    # steps, which it leaves out for every forward() with **kwargs.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    factors = {
        name: (m.lora_A["default"].weight.detach(), m.lora_B["default"].weight.detach())
        for name, m in layers.items()
    }
    head = model.base_model.model.classifier.modules_to_save["default"]
    return factors, head.state_dict()


class Start(TrainerCallback):
    """Notes the factors before the first step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        bank = model.joint.program.bank
        matrices = bank.matrices(bank.means())
        self.factors = {
            name: (A.detach().clone(), B.detach().clone()) for name, (A, B) in matrices.items()
        }


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_map_equals_peft_and_trainer(tmp_path, accumulation, optim):
    """Same start, same parameters after six steps; weight decay, clipping, schedule included."""
    data, network = tokens(40), bert(initializer_range=0.3)
    changes = {
        "gradient_accumulation_steps": accumulation,
        "optim": optim,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "learning_rate": 1e-2 if optim.startswith("adam") else 1.0,
    }
    start = Start()
    other = copy.deepcopy(network)
    posterior = pyrolora.fit(
        network,
        data,
        guide="map",
        adapter=AdapterConfig(r=4, lora_alpha=8, target_modules=TARGETS),
        training=arguments(tmp_path / "ours", **changes),
        callbacks=[start],
    )
    expected, head = peft_run(other, data, arguments(tmp_path / "peft", **changes), start.factors)
    moved = 0.0
    for name, (A, B) in posterior.factors().items():
        torch.testing.assert_close(A, expected[name][0], atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(B, expected[name][1], atol=2e-6, rtol=1e-4)
        moved = max(moved, (B - start.factors[name][1]).abs().max().item())
    assert moved > 1e-2, "nothing was trained"
    own = posterior.model.named_heads()["classifier"][0].state_dict()
    for key, value in head.items():
        torch.testing.assert_close(own[key], value, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_map_from_the_weights_equals_peft_and_trainer(tmp_path, init):
    """PEFT takes its start off the weights, we take it off the update: the same function, before
    and after six steps. Rounding of W − s B₀ A₀ is PEFT's alone, and steps of AdamW enlarge it."""
    data, network = tokens(40), bert(initializer_range=0.3)
    changes = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.5}
    other = copy.deepcopy(network)
    posterior = pyrolora.fit(
        network,
        data,
        guide="map",
        adapter=AdapterConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=init),
        training=arguments(tmp_path / "ours", **changes),
    )
    expected, head = peft_run(other, data, arguments(tmp_path / "peft", **changes), init=init)
    bank = posterior.bank
    A, B = (bank.layouts[f].matrices(bank.get_parameter(f"{f}_loc").detach()) for f in "AB")
    for name, (other_a, other_b) in expected.items():
        torch.testing.assert_close(A[name], other_a, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(B[name].mT, other_b, atol=1e-5, rtol=1e-4)
    assert bank.update_norms(bank.means()).max() > 0.1, "nothing was trained"
    own = posterior.model.named_heads()["classifier"][0].state_dict()
    for key, value in head.items():
        torch.testing.assert_close(own[key], value, atol=1e-5, rtol=1e-4)


def one_step(tmp_path, guide, batch_size, accumulation, data):
    """State after one optimiser step of plain gradient descent over the whole data."""
    posterior = pyrolora.fit(
        mlp(),
        data,
        guide=guide,
        task="classification",
        adapter=AdapterConfig(r=2),
        training=arguments(
            tmp_path,
            optim="sgd",
            max_steps=1,
            max_grad_norm=0.0,
            learning_rate=1.0,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        ),
    )
    assert posterior.history[-1]["step"] == 1
    return posterior.model.own_state()


@pytest.mark.parametrize(("batch_size", "accumulation"), [(13, 1), (7, 2), (5, 3), (1, 13)])
def test_objective_does_not_depend_on_accumulation_or_micro_batch_sizes(
    tmp_path, batch_size, accumulation
):
    """Thirteen examples in one step: 13, 7 + 6, 5 + 5 + 3, or one by one give the same step. With a
    prior, so that likelihood and prior are weighed against each other."""
    data = (torch.randn(13, 4), torch.arange(13) % 3)
    guide = MAP(prior_scale=0.3)
    whole = one_step(tmp_path, guide, 13, 1, data)
    cut = one_step(tmp_path, guide, batch_size, accumulation, data)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, atol=1e-6, rtol=1e-5)


def test_same_seed_same_result_other_seed_another():
    states = [
        pyrolora.fit(bert(), tokens(), epochs=2, seed=seed).model.own_state() for seed in (1, 1, 2)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("updates", ["gradient", "curvature"])
def test_a_killed_run_resumes_to_the_same_result(tmp_path, updates):
    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise Killed

    data, guide = tokens(16), MonteCLoRA(scale_updates=updates)
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8}
    dropout = {"hidden_dropout_prob": 0.1}
    whole = pyrolora.fit(
        bert(**dropout), data, guide, training=arguments(tmp_path / "a", **changes)
    )
    with pytest.raises(Killed):
        pyrolora.fit(
            bert(**dropout),
            data,
            guide,
            training=arguments(tmp_path / "b", **changes),
            callbacks=[Kill()],
        )
    args = arguments(tmp_path / "b", **changes, resume_from_checkpoint=True)
    args.resume_from_checkpoint = True
    resumed = pyrolora.fit(bert(**dropout), data, guide, training=args)
    state = resumed.model.own_state()
    for name, value in whole.model.own_state().items():
        assert torch.equal(state[name], value), name
    assert [h["step"] for h in resumed.history] == [h["step"] for h in whole.history]


@pytest.mark.parametrize("scale_updates", ["gradient", "curvature"])
def test_evaluation_uses_the_predictive_mean_and_the_best_state_comes_back(tmp_path, scale_updates):
    """``load_best_model_at_end`` on the NLL of the predictive mean. Scales by curvature are then
    set to their optimum around the best means, and the posterior is evaluated once more."""
    data, held_out = reviews(32), reviews(24, seed=5)
    args = arguments(
        tmp_path,
        max_steps=24,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="nll",
        greater_is_better=False,
        learning_rate=0.1,
        per_device_train_batch_size=8,
    )
    guide = MonteCLoRA(scale_updates=scale_updates)
    means = []

    class Means(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            means.append(model.joint.program.bank.get_parameter("A_loc").detach().clone())

    posterior = pyrolora.fit(
        bert(), data, guide, eval_data=held_out, tokenizer=tokenizer(), training=args,
        callbacks=[Means()],
    )  # fmt: skip
    scores = [entry["eval_nll"] for entry in posterior.history if "eval_nll" in entry]
    best = min(range(6), key=scores.__getitem__)
    assert len(scores) == (6 if scale_updates == "gradient" else 7)
    assert torch.equal(posterior.bank.get_parameter("A_loc"), means[best])
    draws, entry = (defaults.EVAL_SAMPLES, best) if scale_updates == "gradient" else (None, -1)
    again = posterior.evaluate(held_out, draws, batch_size=8, seed=args.seed)
    assert again["nll"] == pytest.approx(scores[entry], rel=1e-5)


def test_history_names_each_kl():
    posterior = pyrolora.fit(bert(), tokens(), guide=MonteCLoRA(cooperation=0.1), epochs=2)
    entry = next(e for e in posterior.history if "loss" in e)
    names = {"kl/mixture_weights", "kl/covariance_tril", "kl/noise"}
    assert names | {"log_likelihood", "cooperation", "elbo"} <= set(entry)
    json.dumps(posterior.history)
    elbo = entry["log_likelihood"] + entry["cooperation"] - sum(entry[name] for name in names)
    assert entry["elbo"] == pytest.approx(elbo, rel=1e-5)


def test_loss_is_minus_the_tempered_elbo_an_observation(tmp_path):
    guide = MonteCLoRA(kl_weight=0.3)
    posterior = pyrolora.fit(
        mlp(), (torch.randn(8, 4), torch.arange(8) % 3), guide=guide,
        task="classification", adapter=AdapterConfig(r=2),
        training=arguments(tmp_path, max_steps=1, per_device_train_batch_size=8),
    )  # fmt: skip
    entry = posterior.history[0]
    kl = sum(value for name, value in entry.items() if name.startswith("kl/"))
    assert entry["loss"] == pytest.approx((0.3 * kl - entry["log_likelihood"]) / 8, rel=1e-4)


def test_a_language_models_loss_is_per_token_and_its_likelihood_per_sequence(tmp_path):
    network, data = llama(), tokens(6).remove_columns("labels")
    plain = copy.deepcopy(network)
    posterior = pyrolora.fit(
        network, data, guide="map",
        training=arguments(tmp_path, max_steps=1, per_device_train_batch_size=6),
    )  # fmt: skip
    ids = torch.tensor(data["input_ids"][:])
    with torch.no_grad():
        loss = plain(input_ids=ids, labels=ids).loss.item()  # transformers: the mean over tokens
    entry = posterior.history[0]
    assert entry["loss"] == pytest.approx(loss, rel=1e-4)
    assert entry["log_likelihood"] == pytest.approx(-loss * 6 * 7, rel=1e-4)


def test_bfloat16_autocast_trains_float32_factors(tmp_path):
    posterior = pyrolora.fit(bert(), tokens(), training=arguments(tmp_path, bf16=True, max_steps=3))
    assert {t.dtype for t in posterior.model.own_state().values()} == {torch.float32}
    assert all(torch.isfinite(torch.tensor(e["loss"])) for e in posterior.history if "loss" in e)


def test_a_bfloat16_base_keeps_float32_factors_and_head():
    network = bert().to(torch.bfloat16)
    before = {name: t.clone() for name, t in network.state_dict().items()}
    posterior = pyrolora.fit(network, tokens(), epochs=2)
    assert {t.dtype for t in posterior.model.own_state().values()} == {torch.float32}
    assert posterior.evaluate(tokens())["nll"] < 5
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())


def test_data_parallel_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(pyrolora.PyroLoraError, match="torchrun --nproc_per_node 2"):
        pyrolora.fit(bert(), tokens(), training=arguments(tmp_path))


def test_scales_have_their_own_learning_rate_and_no_weight_decay(tmp_path):
    class Groups(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            self.groups = optimizer.param_groups

    groups = Groups()
    pyrolora.fit(
        bert(), tokens(), guide=MonteCLoRA(scale_learning_rate=0.05, scale_updates="gradient"),
        training=arguments(tmp_path, weight_decay=0.1, max_steps=1), callbacks=[groups],
    )  # fmt: skip
    decayed, plain, scales = groups.groups
    assert [g["weight_decay"] for g in (decayed, plain, scales)] == [0.1, 0.0, 0.0]
    assert scales["initial_lr"] == 0.05
    assert len(scales["params"]) == 2  # concentration, scale_diag
    assert len(decayed["params"]) == 3  # A, B, the head's weight
    assert len(plain["params"]) == 1  # the head's bias


WARM = MonteCLoRA()
COLD = MonteCLoRA(kl_weight=0.2, scale_updates="gradient", units="one")
TOWARDS_WARM = MonteCLoRA(kl_weight=0.01, kl_weight_against="mean")  # 1 with 100 examples


@pytest.mark.parametrize(
    ("guide", "long"),
    [(MAP(), 1e-2), (WARM, 1e-2), (TOWARDS_WARM, 1e-2), (COLD, 5e-3)],
    ids=str,
)
def test_the_rate_of_scales_follows_that_of_the_means_and_the_length_of_a_cold_fit(guide, long):
    for kind in (guide, Flat(inner=guide)):
        assert kind.scale_rate(3e-4, 100, 100) == pytest.approx(3e-3)
        assert kind.scale_rate(1e-3, 256, 100) == pytest.approx(1e-2)
        assert kind.scale_rate(1e-1, 256, 100) == pytest.approx(1e-2)
        assert kind.scale_rate(1e-3, 1024, 100) == pytest.approx(long)
        assert kind.scale_rate(3e-4, 1024, 100) == pytest.approx(3e-3)


def test_scales_that_begin_at_the_width_of_the_prior_come_down_fast():
    trained = MonteCLoRA(scale_updates="gradient")
    for kind in (LowRank(), LowRank(kl_weight=0.5), trained, Flat(inner=LowRank())):
        assert kind.scale_rate(3e-4, 100, 100) == kind.scale_rate(1e-1, 1024, 9) == 0.1
    for kind in (LowRank(units="one"), MonteCLoRA()):
        assert kind.scale_rate(1e-3, 256, 100) == pytest.approx(1e-2)


def test_a_rate_of_scales_that_is_given_is_the_rate():
    own = MonteCLoRA(scale_learning_rate=0.05)
    assert own.scale_rate(1e-3, 10**6, 9) == Flat(inner=own).scale_rate(1e-3, 10**6, 9) == 0.05


def test_a_long_fit_has_a_lower_rate_of_scales_whatever_it_counts_in(tmp_path):
    class Once(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            self.steps, self.rate = state.max_steps, optimizer.param_groups[-1]["initial_lr"]
            control.should_training_stop = True

    data = tokens()
    by_epochs = {"max_steps": -1, "num_train_epochs": 1024, "per_device_train_batch_size": 1000}
    for length in ({"max_steps": 1024}, by_epochs):
        once = Once()
        training = arguments(tmp_path, **length)
        pyrolora.fit(bert(), data, COLD, training=training, callbacks=[once])
        assert once.steps == 1024
        assert once.rate == pytest.approx(5e-3)

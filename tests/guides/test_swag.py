"""SWAG: moments of the iterates, against the iterates themselves."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from problems import bert, mlp, reviews, tokenizer
from torch.nn.utils import parameters_to_vector
from transformers import TrainerCallback, TrainingArguments

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError, NonFiniteError
from pyrolora.guides import MAP, SWAG, Flat, Guide
from pyrolora.posterior import Posterior


class Iterates(TrainerCallback):
    """Everything that is trained, and the learning rate, after every step."""

    def __init__(self) -> None:
        self.factors: list[torch.Tensor] = []
        self.others: list[torch.Tensor] = []
        self.rates: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        joint = kwargs["model"].joint
        bank = joint.program.bank
        self.factors.append(torch.cat([bank.A_loc, bank.B_loc]).detach().clone())
        others = [*joint.heads.parameters(), *joint.task.parameters()]
        self.others.append(parameters_to_vector(others).detach().clone())
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


def fit(guide: Guide, iterates: Iterates | None = None, **options: Any) -> Posterior:
    return pyrolora.fit(
        bert(initializer_range=0.3),
        reviews(24),
        guide=guide,
        tokenizer=tokenizer(),
        adapter=AdapterConfig(r=2),
        callbacks=[iterates] if iterates else [],
        **{"epochs": 5, "batch_size": 6, "seed": 0, "learning_rate": 2e-2, **options},
    )


def latent_of(value: torch.Tensor, posterior: Posterior, latent: str) -> torch.Tensor:
    size = posterior.bank.layouts["A"].total
    return {"A": value[..., :size], "B": value[..., size:], "AB": value}[latent]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"start": 0.5, "snapshots": 10, "rank": 10}, range(11, 21)),
        ({"start": 0.5, "snapshots": 5, "rank": 3}, range(12, 21, 2)),
        ({"start": 0.2, "snapshots": 4, "rank": 2, "latent": "A"}, range(8, 21, 4)),
        ({"start": 0.75, "snapshots": 20, "rank": 8, "latent": "B"}, range(16, 21)),
    ],
    ids=str,
)
def test_the_law_is_that_of_the_moments_of_the_iterates(options, steps):
    """½ diag(v) + ½ D Dᵀ / (K − 1) around their mean; the head is the mean of the heads."""
    iterates = Iterates()
    posterior = fit(SWAG(**options), iterates)
    kept = torch.stack([iterates.factors[step - 1] for step in steps]).double()
    mean = kept.mean(0)
    bank = posterior.bank
    found = torch.cat([bank.A_loc, bank.B_loc]).detach().double()
    torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-6)
    latent = options.get("latent", "AB")
    deviations = latent_of(kept - mean, posterior, latent)
    last = deviations[-min(options["rank"], len(deviations)) :]
    low_rank = last.T @ last / (2 * (len(last) - 1))
    expected = 0.5 * deviations.var(0).diag() + low_rank
    program = posterior.model.program
    law = program.law(latent)
    covariance = law.covariance_matrix.double()
    assert int(program.count) == len(kept)
    torch.testing.assert_close(covariance, expected, rtol=1e-3, atol=1e-8)
    others = torch.stack([iterates.others[step - 1] for step in steps]).double().mean(0)
    heads = parameters_to_vector(posterior.model.heads.parameters()).detach().double()
    torch.testing.assert_close(heads, others, rtol=1e-5, atol=1e-6)
    # The mean is none of the iterates, and the draws are of this law.
    assert (mean - kept[-1]).abs().max() > 1e-3
    draws = program.draw(20_000)[latent].double()
    sd = expected.diagonal().sqrt()
    assert ((draws.var(0) - sd**2).abs() / (sd**2 + 1e-12)).max() < 6 * (2 / 20_000) ** 0.5


def test_the_training_is_that_of_plain_lora_until_the_rate_is_held():
    swag, plain = Iterates(), Iterates()
    fit(SWAG(start=0.5), swag)
    fit(MAP(), plain)
    for step in range(10):
        assert torch.equal(swag.factors[step], plain.factors[step])
    assert plain.rates[-1] < plain.rates[9] / 5
    assert swag.rates[:10] == plain.rates[:10]
    assert len(set(swag.rates[9:])) == 1


def test_the_noise_of_a_regression_is_the_mean_of_the_iterates():
    iterates = Iterates()
    x = torch.randn(24, 4)
    posterior = pyrolora.fit(
        mlp(outputs=1),
        (x, x[:, 0]),
        guide=SWAG(start=0.5, snapshots=4, rank=2),
        task="regression",
        adapter=AdapterConfig(r=1),
        epochs=4,
        batch_size=12,
        callbacks=[iterates],
    )
    (noise,) = posterior.task.parameters()
    expected = torch.stack([other[-1] for other in iterates.others[4:]]).mean(0)
    torch.testing.assert_close(noise.detach().reshape(()), expected)


def test_an_interrupted_run_ends_at_the_same_law(tmp_path):
    """The moments are in the checkpoint, which is written in the middle of the collection."""
    args: dict[str, Any] = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 8,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 10:
                raise KeyboardInterrupt

    def run(folder, callbacks=(), **changes):
        return pyrolora.fit(
            bert(initializer_range=0.3),
            reviews(24),
            guide=SWAG(start=0.5, snapshots=6, rank=4),
            tokenizer=tokenizer(),
            training=TrainingArguments(output_dir=str(folder), **args, **changes),
            callbacks=callbacks,
        )

    whole = run(tmp_path / "whole").model.own_state()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", [Stop()])
    checkpoint = str(tmp_path / "part" / "checkpoint-8")
    resumed = run(tmp_path / "part", resume_from_checkpoint=checkpoint).model.own_state()
    assert set(whole) == set(resumed)
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_the_posterior_of_a_failed_fit_can_be_used_and_saved(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 18:
                kwargs["model"].joint.program.bank.B_loc.data.fill_(float("inf"))

    with pytest.raises(NonFiniteError) as caught:
        pyrolora.fit(
            bert(),
            reviews(24),
            guide=SWAG(),
            tokenizer=tokenizer(),
            epochs=5,
            batch_size=6,
            callbacks=[Break()],
            output_dir=tmp_path,
        )
    found = pyrolora.load(tmp_path, bert())
    assert found.predict(reviews(3), 2).probs.shape == (3, 2)
    assert found.model.own_state().keys() == caught.value.posterior.model.own_state().keys()


@pytest.mark.parametrize("last", [5, 10, 11, 12])
def test_a_fit_that_is_stopped_early_has_the_spread_of_what_it_collected(last):
    """None of no iterate, and none of a single one."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == last

    few = last < 12
    told = pytest.warns(UserWarning, match="point mass") if few else contextlib.nullcontext()
    with told:
        posterior = pyrolora.fit(
            bert(initializer_range=0.3),
            reviews(24),
            guide=SWAG(),
            tokenizer=tokenizer(),
            epochs=5,
            batch_size=6,
            callbacks=[Stop()],
        )
    program = posterior.model.program
    assert int(program.count) == max(0, last - 10)
    spread = program.draw(100)["AB"].std(0).max()
    assert (spread > 1e-5) == (not few)


def test_a_rate_is_not_held_before_its_warm_up(tmp_path):
    iterates = Iterates()
    training = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        warmup_steps=5,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    pyrolora.fit(
        bert(),
        reviews(24),
        guide=SWAG(start=0.0),
        tokenizer=tokenizer(),
        training=training,
        callbacks=[iterates],
    )
    assert iterates.rates[-1] == pytest.approx(1e-2)


def test_khat_needs_a_prior():
    with pytest.raises(ConfigError, match="prior_scale"):
        fit(SWAG()).khat(reviews(24))


def test_a_schedule_that_follows_a_metric_is_refused(tmp_path):
    training = TrainingArguments(
        output_dir=str(tmp_path),
        lr_scheduler_type="reduce_lr_on_plateau",
        eval_strategy="epoch",
        report_to="none",
        use_cpu=True,
    )
    with pytest.raises(ConfigError, match="reduce_lr_on_plateau"):
        pyrolora.fit(
            bert(),
            reviews(12),
            guide="swag",
            eval_data=reviews(6),
            tokenizer=tokenizer(),
            training=training,
        )


def test_going_back_to_the_best_checkpoint_is_refused(tmp_path):
    training = TrainingArguments(
        output_dir=str(tmp_path),
        load_best_model_at_end=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        report_to="none",
        use_cpu=True,
    )
    for guide in (SWAG(), Flat(inner=SWAG())):
        with pytest.raises(ConfigError, match="load_best_model_at_end"):
            pyrolora.fit(
                bert(),
                reviews(12),
                guide=guide,
                eval_data=reviews(6),
                tokenizer=tokenizer(),
                training=training,
            )


def test_one_step_is_no_spread():
    with pytest.raises(ConfigError, match="train longer"):
        fit(SWAG(), epochs=1, batch_size=24)


@pytest.mark.parametrize(
    "options",
    [{"start": 1.0}, {"snapshots": 1}, {"rank": 1}, {"rank": 21}, {"prior_scale": -1.0}],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options):
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        SWAG(**options)

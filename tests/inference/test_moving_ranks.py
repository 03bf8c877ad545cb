"""Ranks that go, or move, in training: when, how many, what they leave alone; after a kill;
refusals."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math

import pytest
import torch
from problems import absolute, arguments, bert, mlp, tokens
from transformers import TrainerCallback

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.adapters.config import (
    INITIALIZERS,
    RANDOM_STARTS,
    SCHEDULES,
    RankAllocation,
)
from pyrolora.errors import ConfigError
from pyrolora.guides import MAP, SWAG, Ensemble, Flat, Laplace, LowRank, MeanField, MonteCLoRA

KINDS = ["alora", "snr"]


def allocation(kind="alora", schedule="move", **options):
    share = 0.3 if schedule == "move" else None
    named = {"importance": kind, "schedule": schedule, "rounds": 4, "share": share}
    return RankAllocation(**{**named, **options})


def fitted(tmp_path, kind="alora", guide="meanfield", callbacks=(), changes=None, **options):
    return pyrolora.fit(
        bert(initializer_range=0.3, hidden_dropout_prob=0.1),
        tokens(24),
        guide=guide,
        eval_data=tokens(10, seed=1),
        adapter=AdapterConfig(r=3, rank_allocation=allocation(kind, **options)),
        training=arguments(tmp_path, **{"max_steps": 12, **(changes or {})}),
        callbacks=callbacks,
    )


class Watch(TrainerCallback):
    """The ranks in use, the means and the optimiser's state after every step."""

    def __init__(self):
        self.masks, self.idle = [], []

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        bank = model.joint.program.bank
        self.masks.append(bank.mask().clone())
        for factor in "AB":
            parameter, idle = bank.get_parameter(f"{factor}_loc"), ~bank.entries(factor)
            kept = [t for t in optimizer.state.get(parameter, {}).values() if t.dim()]
            self.idle += [float(t.detach()[idle].abs().sum()) for t in (parameter, *kept)]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_move_on_schedule_within_the_budget(tmp_path, kind):
    watch = Watch()
    posterior = fitted(tmp_path, kind, callbacks=[watch], start=0.25, end=0.75)
    entries = [entry for entry in posterior.history if "ranks_lost" in entry]
    assert [entry["step"] for entry in entries] == [3, 5, 7, 9]
    assert all(entry["ranks_lost"] == 5 for entry in entries)  # 0.3 of 18
    json.dumps(posterior.history)
    ranks = posterior.ranks
    assert sum(ranks.values()) == 18
    assert set(ranks) == set(posterior.bank.specs)
    assert min(ranks.values()) >= 1
    assert max(ranks.values()) <= 6
    assert len(set(ranks.values())) > 1
    assert (entries[-1]["lowest_rank"], entries[-1]["highest_rank"]) == (
        min(ranks.values()),
        max(ranks.values()),
    )
    masks = [*watch.masks, posterior.bank.mask()]
    changes = [i for i in range(1, 13) if not torch.equal(masks[i], masks[i - 1])]
    assert changes == [3, 5, 7, 9]
    logged = [entry["step"] for entry in posterior.history if "loss" in entry]
    assert logged == list(range(1, 13)), "a round took the turn of a log"


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_are_pruned_on_schedule_to_the_budget(tmp_path, kind):
    """From 36 to 18, in four rounds; in each the least important ones, and none comes."""
    watch = Watch()
    posterior = fitted(tmp_path, kind, callbacks=[watch], schedule="prune", start=0.25, end=0.75)
    entries = [entry for entry in posterior.history if "ranks_lost" in entry]
    assert [(entry["step"], entry["ranks_lost"]) for entry in entries] == [
        (3, 4), (5, 5), (7, 5), (9, 4)
    ]  # fmt: skip
    masks = [*watch.masks, posterior.bank.mask()]
    assert masks[0].all()
    assert not any((later & ~earlier).any() for earlier, later in itertools.pairwise(masks))
    ranks = posterior.ranks
    assert sum(ranks.values()) == 18
    assert 1 <= min(ranks.values()) < max(ranks.values()) <= 6


def test_a_training_that_ends_before_the_last_round_says_so(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    with pytest.warns(UserWarning, match="9 ranks more than the budget of 18"):
        posterior = fitted(
            tmp_path, "snr", callbacks=[Stop()], schedule="prune", start=0.25, end=0.75
        )
    assert sum(posterior.ranks.values()) == 27


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "guide",
    [
        MAP(prior_scale=0.5),
        MeanField(latent="AB"),
        MonteCLoRA(latent="AB", learn_sample_scale=True),
        MonteCLoRA(component_prior="hierarchical", covariance="full", prior_mean="zero"),
    ],
    ids=["map", "mean field", "montec", "hierarchical"],
)
def test_idle_ranks_stay_at_zero_and_the_optimiser_knows_nothing_of_them(tmp_path, guide, schedule):
    watch = Watch()
    changes = {"weight_decay": 0.1}
    fitted(tmp_path, guide=guide, callbacks=[watch], changes=changes, schedule=schedule)
    assert set(watch.idle) == {0.0}


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("scale_updates", ["curvature", "gradient"])
def test_the_scales_of_idle_ranks_are_not_learnt(tmp_path, covariance, scale_updates):
    """An idle rank, of before or to come, has the covariance that one starts with."""
    guide = MonteCLoRA(covariance=covariance, scale_updates=scale_updates)
    watch = Watch()
    posterior = fitted(tmp_path, guide=guide, callbacks=[watch])
    program = posterior.model.program
    idle, used = ~posterior.bank.mask(), torch.stack(watch.masks).all(0)
    assert (idle & torch.stack(watch.masks).any(0)).any()
    if covariance == "diagonal":
        scales = program.param("scale_diag")
    else:
        scales = program.param("scale_tril").diagonal(dim1=-2, dim2=-1)
    start = guide.init_covariance**0.5
    torch.testing.assert_close(scales[idle], torch.full_like(scales[idle], start))
    assert (scales[used] - start).abs().min() > 1e-5


class Renewed(TrainerCallback):
    """The scales of new ranks after a round, and their state in the optimiser."""

    def __init__(self):
        self.before, self.came, self.stayed = None, {}, {}

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        program = model.joint.program
        now = program.bank.mask().clone()
        if self.before is not None and not torch.equal(now, self.before):
            for name, entries in program.rank_entries(now & ~self.before).items():
                parameter = program.get_parameter(name)
                moments = optimizer.state[parameter]["exp_avg"]
                for found, mine in ((self.came, entries), (self.stayed, ~entries)):
                    mine = mine.expand_as(parameter)
                    pair = (parameter.detach()[mine].clone(), moments[mine].clone())
                    found.setdefault(name, []).append(pair)
        self.before = now


@pytest.mark.parametrize(
    ("guide", "starts"),
    [
        (absolute(MeanField, latent="AB"), {"A_scale": "init_scale", "B_scale": "init_scale"}),
        (LowRank(latent="AB"), {"scale": "init_scale", "directions": None}),
        (absolute(MonteCLoRA, latent="AB"), {"scale_diag": "init_covariance"}),
        (absolute(MonteCLoRA, covariance="full"), {"scale_tril": "init_covariance"}),
        (Flat(inner=absolute(MeanField)), {"inner.A_scale": "init_scale"}),
    ],
    ids=["mean field", "low rank", "montec", "full covariance", "flat"],
)
def test_a_rank_that_comes_has_nothing_of_the_one_before_it(tmp_path, guide, starts):
    """Its scales start anew, without moments; those of the others go on."""
    watch = Renewed()
    fitted(tmp_path, "snr", guide=guide, callbacks=[watch])
    assert watch.came.keys() == starts.keys()
    for name, option in starts.items():
        assert len(watch.came[name]) == 4
        for values, moments in watch.came[name]:
            assert len(values)
            assert not moments.any()
            if option == "init_scale":
                start = math.log(getattr(guide, "inner", guide).init_scale)
                torch.testing.assert_close(values, torch.full_like(values, start))
            elif name == "scale_diag":
                start = 0.5 * math.log(guide.init_covariance)
                torch.testing.assert_close(values, torch.full_like(values, start))
            elif name == "directions":  # new random numbers of the scale of the start
                assert values.std() == pytest.approx(0.1 * guide.rank**-0.5, rel=0.1)
        for values, moments in watch.stayed[name]:
            assert moments.any()
            assert len(values.unique()) > 1


def test_the_covariance_of_moved_ranks_has_the_mean_that_the_guide_states():
    """E[Σ] = V over the active ranks, wherever idle ones lie between them; E[Σ] = I in the
    model."""
    config = AdapterConfig(r=3, rank_allocation=allocation("snr", growth=2.0))
    mask = torch.tensor(
        [[False, True, False, True, True, False], [True, False, False, False, False, True]]
    )
    for covariance in ("diagonal", "full"):
        guide = MonteCLoRA(covariance=covariance, df_per_rank=1)
        joint = pyrolora.fit(
            torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6)),
            (torch.randn(8, 6), torch.arange(8) % 6), guide=guide, task="classification",
            adapter=dataclasses.replace(config, modules_to_save=[]), epochs=1,
        ).model  # fmt: skip
        program = joint.program
        program.bank.activate(mask)
        if covariance == "diagonal":
            program.assign("scale_diag", torch.rand(2, 6) + 0.5)
            tril = program.param("scale_diag").diag_embed()
        else:
            program.assign("scale_tril", torch.randn(2, 6, 6).tril(-1) + torch.eye(6))
            tril = program.param("scale_tril")
        both = mask.unsqueeze(-1) & mask.unsqueeze(-2)
        tril = torch.where(both, tril, torch.eye(6)).detach()
        for law, expected in (
            (program._covariance(), tril @ tril.mT),
            (program._covariance_prior(), torch.eye(6).expand(2, 6, 6)),
        ):
            drawn = program._cut(law.sample((60_000,)))
            found = (drawn @ drawn.mT).mean(0)
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_idle_ranks_cost_no_kl(tmp_path):
    """Mean field with three times the slots has the bound of a uniform rank: Σ log(σ₀/σ) +
    (σ² + m²) / 2σ₀² − ½ over the entries in use."""
    data = (torch.randn(8, 4), torch.arange(8) % 3)
    widths = []
    for rank_allocation in ("uniform", allocation("snr", growth=3.0)):
        posterior = pyrolora.fit(
            mlp(), data, absolute(MeanField, latent="AB", kl_weight=1.0), task="classification",
            adapter=AdapterConfig(r=1, rank_allocation=rank_allocation, modules_to_save=[]),
            training=arguments(tmp_path, max_steps=1, learning_rate=1e-12),
        )  # fmt: skip
        entry = next(entry for entry in posterior.history if "kl/A" in entry)
        means = posterior.bank.means().A.detach()
        of_means = float(means.square().sum()) / (2 * posterior.options.prior_scale**2)
        widths.append((entry["kl/A"] - of_means, entry["kl/B"]))
    assert widths[0] == pytest.approx(widths[1], rel=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_to_the_same_result(tmp_path, kind, schedule):
    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:  # between rounds, of which there have been two
                raise Killed

    changes = {"save_strategy": "steps", "save_steps": 1}
    whole = fitted(tmp_path / "a", kind, changes=changes, schedule=schedule)
    with pytest.raises(Killed):
        fitted(tmp_path / "b", kind, changes=changes, callbacks=[Kill()], schedule=schedule)
    changes["resume_from_checkpoint"] = True
    resumed = fitted(tmp_path / "b", kind, changes=changes, schedule=schedule)
    state = resumed.model.own_state()
    for name, value in whole.model.own_state().items():
        assert torch.equal(state[name], value), name
    assert resumed.ranks == whole.ranks
    moves = [[h for h in p.history if "ranks_lost" in h] for p in (resumed, whole)]
    assert moves[0] == moves[1]
    assert len(moves[0]) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_leaves_the_random_numbers_of_the_training_alone(tmp_path, kind):
    """With no room to move, a fit is the one without slots to judge."""
    data = (torch.randn(16, 4), torch.arange(16) % 3)
    states = []
    for rank_allocation in (allocation(kind), "uniform"):
        posterior = pyrolora.fit(
            mlp(), data, guide="meanfield", task="classification", eval_data=data,
            adapter=AdapterConfig(r=3, target_modules=["2"], rank_allocation=rank_allocation),
            training=arguments(tmp_path, max_steps=12),
        )  # fmt: skip
        states.append(posterior.model.own_state())
    assert states[0].pop("program.bank.active").all()
    for name, value in states[1].items():
        assert torch.equal(states[0][name], value), name


@pytest.mark.parametrize("guide", ["laplace", Flat(inner=MonteCLoRA()), "flat"])
def test_the_ranks_of_a_point_estimate_are_those_of_its_posterior(tmp_path, guide):
    posterior = fitted(tmp_path, guide=guide)
    assert sum(posterior.ranks.values()) == 18
    assert len(set(posterior.ranks.values())) > 1
    assert len([h for h in posterior.history if "ranks_lost" in h]) == 4
    for name, (A, B) in posterior.factors(posterior.sample(3)).items():
        assert A.shape[-2] == B.shape[-1] == posterior.ranks[name]


def test_the_idle_entries_of_laplace_have_their_prior(tmp_path):
    posterior = fitted(tmp_path, guide=Laplace(prior_scale=3.0))
    draws = posterior.sample(4000, seed=0)
    for factor in "AB":
        idle = ~posterior.bank.entries(factor)
        spread = draws[factor].std(0)
        torch.testing.assert_close(
            spread[idle], torch.full_like(spread[idle], 3.0), rtol=0.06, atol=0
        )
        assert spread[~idle].min() < 2.7


@pytest.mark.parametrize("guide", ["laplace", "meanfield", "montec"])
def test_a_spread_for_given_ranks_moves_none(tmp_path, guide):
    given = fitted(tmp_path, guide="map")
    means = given.factors()
    again = pyrolora.fit(given, tokens(24), guide=guide)
    assert again.ranks == given.ranks
    assert torch.equal(again.bank.mask(), given.bank.mask())
    assert not [h for h in again.history if "ranks_lost" in h]
    for name, (A, B) in again.factors().items():
        assert torch.equal(A, means[name][0])
        assert torch.equal(B, means[name][1])


def test_a_new_round_of_the_same_seed_is_the_same(tmp_path):
    one, two = (fitted(tmp_path, "snr", guide="montec") for _ in range(2))
    state = two.model.own_state()
    assert all(torch.equal(value, state[n]) for n, value in one.model.own_state().items())


# What is refused ---------------------------------------------------------------------------------


def refused(steps, words, **options):
    with pytest.raises(ConfigError) as caught:
        pyrolora.fit(bert(), tokens(), **options)
    for word in words:
        assert word in str(caught.value)
    assert not steps


def test_ablation_without_held_out_data_is_refused(steps):
    adapter = AdapterConfig(rank_allocation="alora")
    refused(steps, ("'alora'", "held-out", "eval_data=", "'snr'"), adapter=adapter)


@pytest.mark.parametrize("guide", ["map", "flat", "laplace", MAP(prior_scale=1.0)])
def test_the_width_of_a_point_is_refused(steps, guide):
    adapter = AdapterConfig(rank_allocation="snr")
    refused(
        steps, ("'snr'", "map", "infers none there", "'alora'"), adapter=adapter, guide=guide,
        eval_data=tokens(),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "guide", ["ensemble", Ensemble(side_by_side=True), Flat(inner=Ensemble(members=2))]
)
def test_the_ranks_of_members_are_refused(steps, guide, kind):
    adapter = AdapterConfig(rank_allocation=kind)
    words = (repr(kind), "member", "ensemble", "'uniform'")
    refused(steps, words, adapter=adapter, guide=guide, eval_data=tokens())


@pytest.mark.parametrize(
    ("guide", "end"),
    [(SWAG(), 0.6), (Flat(inner=SWAG(start=0.4)), 0.6), (SWAG(start=0.0), 0.0)],
)
def test_iterates_of_ranks_that_move_are_refused(steps, guide, end):
    """A slot would have the moments of two ranks."""
    adapter = AdapterConfig(rank_allocation=allocation("alora", start=0.0, end=end))
    words = ("swag", f"end={end:g}", "RankAllocation(end=...)")
    refused(steps, words, adapter=adapter, guide=guide, eval_data=tokens())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"importance": "magnitude"}, ("'magnitude'", "'alora', 'snr'")),
        ({"rounds": 0}, ("rounds", ">= 1", "0")),
        ({"rounds": 2.5}, ("rounds", "2.5")),
        ({"share": 0}, ("share", "> 0")),
        ({"share": 0.2}, ("share=0.2", "schedule='move'", "rounds and growth")),
        ({"schedule": "grow"}, ("'grow'", "'prune', 'move'")),
        ({"schedule": "move", "share": 1.5}, ("share", "at most 1", "1.5")),
        ({"share": "half"}, ("share", "'half'")),
        ({"start": -0.1}, ("start", "-0.1")),
        ({"start": 0.6}, ("start=0.6", "end=0.5")),
        ({"end": 1.0}, ("end=1.0", "< 1")),
        ({"growth": 1}, ("growth", "above 1", "1")),
        ({"growth": float("nan")}, ("growth", "nan")),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    for make in (
        lambda: RankAllocation(**options),
        lambda: AdapterConfig(rank_allocation=options),
    ):
        with pytest.raises(ConfigError) as caught:
            make()
        assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("given", ["adalora", 3, None, ["alora"]])
def test_what_is_no_allocation_is_refused(given):
    with pytest.raises(ConfigError, match=r"rank_allocation .*'uniform', 'alora', 'snr'"):
        AdapterConfig(rank_allocation=given)


def test_an_option_that_an_allocation_does_not_have_is_named():
    with pytest.raises(ConfigError, match=r"no option 'speed'.*rounds"):
        AdapterConfig(rank_allocation={"speed": 3})


def test_an_allocation_is_what_its_json_says():
    config = AdapterConfig(rank_allocation=allocation("snr", growth=3.0))
    told = json.loads(json.dumps(dataclasses.asdict(config)))
    assert AdapterConfig(**told) == config
    assert AdapterConfig(rank_allocation="snr").allocation == RankAllocation(importance="snr")
    assert AdapterConfig().allocation is None
    assert copy.deepcopy(config) == config


@pytest.mark.parametrize("start", [name for name in INITIALIZERS if name not in RANDOM_STARTS])
def test_a_start_that_is_not_random_is_refused(start):
    AdapterConfig(init_lora_weights=start)
    with pytest.raises(ConfigError, match=rf"'{start}'.*rank_allocation.*kaiming, gaussian"):
        AdapterConfig(init_lora_weights=start, rank_allocation="snr")


def test_the_steps_of_the_rounds():
    assert RankAllocation(rounds=5).steps(100) == [10, 20, 30, 40, 50]
    assert RankAllocation(rounds=1, start=0.2).steps(100) == [20]
    assert RankAllocation(rounds=8, start=0.0).steps(4) == [1, 2]

"""The ensemble: members are separate fits, predictions their mean, and a killed fit goes on."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from problems import arguments, batch_of, bert, mlp, reviews, tokenizer, tokens
from pyro.infer import Predictive
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments

import pyrolora
from pyrolora import AdapterConfig, Posterior, defaults
from pyrolora.errors import ConfigError
from pyrolora.guides import MAP, Ensemble, Flat
from pyrolora.model import JointModel

K = 3
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 4, generator=GENERATOR)
CLASSES, NUMBERS = torch.arange(12) % 3, X[:, 0] + 0.1 * torch.randn(12, generator=GENERATOR)
HEADED = AdapterConfig(r=2, target_modules=["0"], modules_to_save=["2"])


def fitted(guide: Any, network: nn.Module | None = None, **options: Any) -> Posterior:
    """A classifier of numbers, adapter and head."""
    defaults_: dict[str, Any] = {
        "task": "classification",
        "adapter": HEADED,
        "epochs": 4,
        "learning_rate": 0.05,
        "batch_size": 5,
        "seed": 3,
    }
    data = options.pop("data", (X, CLASSES))
    return pyrolora.fit(network or mlp(), data, guide=guide, **{**defaults_, **options})


def member(posterior: Posterior, k: int) -> dict[str, Tensor]:
    """The factors and the head of a member, by the names that a single fit has."""
    program, factor = posterior.model.program, {}
    inner = program.inner if hasattr(program, "inner") else program
    for name in "AB":
        factor[f"{name}_loc"] = inner.get_parameter(f"{name}_locs")[k].detach()
    prefix = f".{k}."
    heads = posterior.model.heads.state_dict().items()
    return factor | {name.replace(prefix, "."): t for name, t in heads if prefix in name}


def single(posterior: Posterior) -> dict[str, Tensor]:
    bank = posterior.bank.state_dict()
    return {**bank, **posterior.model.heads.state_dict()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


def member_logits(posterior: Posterior, k: int, x: Tensor = X) -> Tensor:
    """Compute the output of a member by hand: adapter on the first layer, its own head."""
    network, state = posterior.base, member(posterior, k)
    spec = posterior.bank.specs["0"]
    A, Bt = state["A_loc"].view(spec.rank, -1), state["B_loc"].view(spec.rank, -1)
    first = network[0].base_layer
    hidden = (x @ (first.weight + spec.scaling * Bt.T @ A).T + first.bias).tanh()
    return hidden @ state["2.weight"].T + state["2.bias"]


@pytest.fixture(scope="module")
def ensemble() -> Posterior:
    return fitted(Ensemble(members=K))


# Sequential members -----------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "flat"])
def test_a_member_is_the_fit_with_its_own_seed(wrapped: bool) -> None:
    """Start of A, order of the data, noise on the weights, and all that follows; the head starts
    as the network has it."""
    guide: Any = Ensemble(members=2)
    posterior = fitted(Flat(inner=guide, rho=0.2) if wrapped else guide)
    for k in range(2):
        alone = fitted(Flat(rho=0.2) if wrapped else MAP(), seed=3 + k)
        assert_equal(member(posterior, k), single(alone))
    assert not torch.equal(member(posterior, 0)["A_loc"], member(posterior, 1)["A_loc"])
    assert not torch.equal(member(posterior, 0)["2.weight"], member(posterior, 1)["2.weight"])


def test_members_of_an_encoder_with_dropout_are_separate_fits() -> None:
    network = bert(hidden_dropout_prob=0.1)
    options = {"epochs": 2, "batch_size": 6, "learning_rate": 0.02}
    posterior = pyrolora.fit(network, tokens(), guide=Ensemble(members=2), seed=7, **options)
    alone = pyrolora.fit(network, tokens(), guide="map", seed=8, **options)
    assert_equal(member(posterior, 1), single(alone))


def test_the_largest_seed_has_members_too() -> None:
    """Seeds end at 2³² - 1 and go on from 0."""
    posterior = fitted(Ensemble(members=2), seed=defaults.MAX_SEED)
    assert_equal(member(posterior, 1), single(fitted("map", seed=0)))


def test_the_history_says_whose_entry_it_is(ensemble: Posterior) -> None:
    losses = [entry for entry in ensemble.history if "loss" in entry]
    assert {entry["member"] for entry in losses} == set(range(K))


def test_every_member_is_scored_on_held_out_data_and_at_the_end_the_ensemble() -> None:
    held_out = (X[:4], CLASSES[:4])
    posterior = fitted(Ensemble(members=2), eval_data=held_out, epochs=2)
    *single, last = [e for e in posterior.history if "eval_nll" in e]
    assert [(e["member"], e["epoch"]) for e in single] == [(0, 1.0), (0, 2.0), (1, 1.0), (1, 2.0)]
    expected = posterior.evaluate(held_out, num_samples=defaults.EVAL_SAMPLES)
    assert last == pytest.approx({f"eval_{name}": value for name, value in expected.items()})


@pytest.mark.parametrize("members", [1, 0, 2.0, True, "3"])
def test_an_ensemble_has_two_members_at_least(members: Any) -> None:
    with pytest.raises(ConfigError, match="members must be a whole number >= 2"):
        Ensemble(members=members)


# Members side by side ---------------------------------------------------------------------------


class Batches(TrainerCallback):
    """Notes the start and the batches of every step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[dict[str, Tensor]] = []
        original = JointModel.forward

        def noted(joint: JointModel, batch: Any, kl_weight: float = 1.0) -> Tensor:
            if joint.training:
                self.seen.append({name: t.clone() for name, t in batch.items()})
            return original(joint, batch, kl_weight)

        monkeypatch.setattr(JointModel, "forward", noted)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        joint = kwargs["model"].joint
        self.start = {name: t.clone() for name, t in joint.own_state().items()}


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_side_by_side_is_each_member_alone_on_the_same_batches(
    optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a loop of torch's own. The objective is the mean over members: AdamW does not see
    that factor but for its ε; plain gradient descent takes K times the rate."""
    noted = Batches(monkeypatch)
    adam = optim.startswith("adam")
    posterior = fitted(
        Ensemble(members=K, side_by_side=True),
        training=arguments(
            tmp_path, max_grad_norm=0.0, optim=optim, lr_scheduler_type="constant",
            learning_rate=0.02 if adam else 0.3 * K,
        ),
        callbacks=[noted], epochs=None, learning_rate=None, batch_size=None, seed=None,
    )  # fmt: skip
    starts = noted.start["program.A_locs"]
    assert not any(torch.equal(starts[0], other) for other in starts[1:])
    spec, network, s = posterior.bank.specs["0"], mlp(), posterior.bank.specs["0"].scaling
    assert len({len(batch["labels"]) for batch in noted.seen[:6]}) == 1
    for k in range(K):
        A = starts[k].view(spec.rank, -1).clone().requires_grad_()
        Bt = torch.zeros(spec.rank, spec.out_features).requires_grad_()
        head = copy.deepcopy(network[2])
        parameters = [A, Bt, *head.parameters()]
        kind: Any = torch.optim.AdamW if adam else torch.optim.SGD
        options = {"lr": 0.02, "weight_decay": 0.0} if adam else {"lr": 0.3}
        optimizer = kind(parameters, **options)
        for batch in noted.seen:
            x = batch["inputs"]
            hidden = (network[0](x) + s * (x @ A.T) @ Bt).tanh()
            optimizer.zero_grad()
            F.cross_entropy(head(hidden), batch["labels"]).backward()
            optimizer.step()
        found = member(posterior, k)
        expected = {"A_loc": A.flatten(), "B_loc": Bt.flatten()}
        expected |= {"2.weight": head.weight, "2.bias": head.bias}
        assert Bt.abs().max() > 0.02
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value.detach(), atol=2e-5, rtol=1e-3)


def test_side_by_side_keeps_members_apart_in_an_encoder() -> None:
    """With regression: one noise scale, learned; a head each."""
    data = [{**row, "labels": float(row["labels"])} for row in tokens(12)]
    posterior = pyrolora.fit(
        bert(1), data, guide=Ensemble(members=2, side_by_side=True), epochs=2, learning_rate=0.02
    )
    first, second = member(posterior, 0), member(posterior, 1)
    assert not any(torch.equal(first[name], second[name]) for name in first)


# Prediction -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side_by_side", [False, True])
def test_k_draws_are_the_members_each_with_its_own_head(side_by_side: bool) -> None:
    posterior = fitted(Ensemble(members=K, side_by_side=side_by_side))
    prediction = posterior.predict((X,), num_samples=K)
    expected = torch.stack([member_logits(posterior, k).softmax(-1) for k in range(K)])
    torch.testing.assert_close(prediction.draws, expected)
    torch.testing.assert_close(prediction.probs, expected.mean(0))
    assert (expected[0] - expected[1]).abs().max() > 0.01


@pytest.mark.parametrize(("draws", "counts"), [(32, (11, 11, 10)), (6, (2, 2, 2)), (4, (2, 1, 1))])
def test_draws_are_balanced_over_members(
    draws: int, counts: tuple[int, ...], ensemble: Posterior
) -> None:
    members = ensemble.sample(draws)["member"]
    assert tuple(members.bincount(minlength=K).tolist()) == counts
    each = torch.stack([member_logits(ensemble, k).softmax(-1) for k in range(K)])
    prediction = ensemble.predict((X,), num_samples=draws)
    torch.testing.assert_close(prediction.draws, each[members])


def test_fewer_draws_than_members_are_spread_evenly(ensemble: Posterior) -> None:
    assert ensemble.sample(2)["member"].tolist() == [0, 1]
    assert ensemble.sample(1)["member"].tolist() == [0]


def test_no_draw_is_the_mean_update_with_the_mean_head(ensemble: Posterior) -> None:
    states = [member(ensemble, k) for k in range(K)]
    spec, network = ensemble.bank.specs["0"], mlp()
    matrices = [(s["A_loc"].view(spec.rank, -1), s["B_loc"].view(spec.rank, -1)) for s in states]
    update = spec.scaling * torch.stack([Bt.T @ A for A, Bt in matrices]).mean(0)
    hidden = (network[0](X) + X @ update.T).tanh()
    head = {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}
    expected = hidden @ head["2.weight"].T + head["2.bias"]
    found = ensemble.predict((X,), num_samples=0).draws
    torch.testing.assert_close(found, expected.softmax(-1)[None])
    A, B = ensemble.factors()["0"]
    assert (A.shape, B.shape) == ((4, 4), (16, 4)), "K r ranks are more than the layer has"
    torch.testing.assert_close(spec.scaling * B @ A, update)
    torch.testing.assert_close(ensemble.merge()(X), expected)
    torch.testing.assert_close(ensemble.merge(draw=1)(X), member_logits(ensemble, 1))


def test_of_a_linear_network_the_merged_one_gives_the_mean_of_the_members() -> None:
    posterior = fitted(
        Ensemble(members=K), nn.Sequential(nn.Linear(4, 3)), adapter=AdapterConfig(r=2)
    )
    merged, members = posterior.merge(), [posterior.merge(draw=k)(X) for k in range(K)]
    torch.testing.assert_close(merged(X), torch.stack(members).mean(0))
    assert (members[0] - members[1]).abs().max() > 0.01


def test_the_noise_of_a_regression_makes_the_variance_that_of_the_mixture() -> None:
    options = {
        "network": mlp(outputs=1), "data": (X, NUMBERS), "task": "regression", "epochs": 5
    }  # fmt: skip
    posterior = fitted(Ensemble(members=K), **options)
    alone = [fitted("map", **{**options, "seed": 3 + k}) for k in range(K)]
    noise = torch.tensor([one.task.param("noise_scale").item() for one in alone])
    assert noise.std() > 1e-5
    pooled = posterior.task.param("noise_scale").item()
    assert pooled == pytest.approx(noise.square().mean().sqrt().item())
    means = torch.stack([one.predict((X,), 1).mean for one in alone])
    prediction = posterior.predict((X,), num_samples=K)
    torch.testing.assert_close(prediction.draws, means)
    second = (noise[:, None].square() + means.square()).mean(0)  # E y² of the mixture
    torch.testing.assert_close(prediction.std.square(), second - means.mean(0).square())


def test_pyro_sees_one_site_and_the_members_heads(ensemble: Posterior) -> None:
    batch = {"inputs": X}
    draws = Predictive(ensemble.model, guide=ensemble.guide, num_samples=400)(batch)
    assert set(draws) >= {"member", "y"}
    members = draws["member"].flatten().long()
    share = members.bincount(minlength=K) / 400
    assert (share - 1 / K).abs().max() < 4 * (1 / K * (1 - 1 / K) / 400) ** 0.5
    probs = torch.stack([member_logits(ensemble, k).softmax(-1) for k in range(K)])
    for k in range(K):
        labels = draws["y"].reshape(400, -1)[members == k]
        found = F.one_hot(labels.long(), 3).float().mean(0)
        assert (found - probs[k]).abs().max() < 5 * 0.5 / len(labels) ** 0.5
    guide = Predictive(ensemble.guide, num_samples=7)(batch)
    assert set(guide) == {"member"}


# Storage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True], ids=["plain", "flat"])
def test_an_ensemble_saves_and_loads(flat: bool, tmp_path: Path) -> None:
    options: Any = Ensemble(members=K)
    options = Flat(inner=options, rho=0.1) if flat else options
    posterior = fitted(options)
    posterior.save(tmp_path)
    again = pyrolora.load(tmp_path, mlp())
    assert again.options == options
    assert_equal(again.model.own_state(), posterior.model.own_state())
    for draws in (0, K, 7):
        expected = posterior.predict((X,), num_samples=draws).draws
        torch.testing.assert_close(again.predict((X,), num_samples=draws).draws, expected)


@pytest.mark.parametrize("make", [bert, lambda: bert(1)], ids=["classes", "numbers"])
def test_peft_loads_each_member_and_the_mean(make: Any, tmp_path: Path) -> None:
    data = tokens(10)
    if make().config.num_labels == 1:
        data = [{**row, "labels": float(row["labels"])} for row in data]
    posterior = pyrolora.fit(
        make(), data, guide=Ensemble(members=K), adapter=AdapterConfig(r=2),
        epochs=3, learning_rate=0.05, batch_size=5,
    )  # fmt: skip
    posterior.to_peft(tmp_path / "mean")
    posterior.to_peft(tmp_path / "each", draw=range(K))
    posterior.to_peft(tmp_path / "last", draw=K - 1)
    assert {p.name for p in (tmp_path / "each").iterdir()} == {f"draw-{k}" for k in range(K)}
    batch = {name: t for name, t in batch_of(tokens(10)).items() if name != "labels"}

    def pefts(name: str, rank: int) -> Tensor:
        model = PeftModel.from_pretrained(make(), tmp_path / name)
        layer = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
        assert layer.r["default"] == rank
        with torch.no_grad():
            return model(**batch).logits

    program = posterior.model.program
    with torch.no_grad():
        each = program.factors(program.pick(torch.arange(K)))
        expected = posterior.model.network(batch, each).view(K, 10, -1)
        mean = posterior.model.network(batch, program.mean()).view(10, -1)
    for k in range(K):
        torch.testing.assert_close(pefts(f"each/draw-{k}", 2), expected[k], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pefts("last", 2), expected[K - 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pefts("mean", 2 * K), mean, atol=1e-5, rtol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    with pytest.raises(ConfigError, match=f"there are {K} draws, numbered from 0, got draw={K}"):
        posterior.to_peft(tmp_path / "none", draw=K)


def test_the_mean_of_a_saved_ensemble_is_a_network_of_its_own(tmp_path: Path) -> None:
    """`from_peft` reads the mean of rank K r, heads included."""
    posterior = pyrolora.fit(
        bert(), reviews(10), guide=Ensemble(members=2), tokenizer=tokenizer(),
        adapter=AdapterConfig(r=2), epochs=2, learning_rate=0.05,
    )  # fmt: skip
    posterior.to_peft(tmp_path)
    read = pyrolora.from_peft(tmp_path, bert(), tokenizer=tokenizer())
    expected = posterior.predict(reviews(6), num_samples=0).draws
    torch.testing.assert_close(read.predict(reviews(6), num_samples=0).draws, expected)


# Going on ---------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the end of the process."""


class Kill(TrainerCallback):
    """At the n-th of these events, counted over all members."""

    def __init__(self, event: str, at: int) -> None:
        self.left = at
        setattr(self, event, self._count)

    def _count(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


SAVING = {"save_strategy": "steps", "save_steps": 2}
SHORT = {"epochs": None, "learning_rate": None, "batch_size": None, "seed": None}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Posterior:
    """The fit that nothing interrupts."""
    return run(tmp_path_factory.mktemp("whole"))


def run(folder: Path, resume: bool = False, kill: Kill | None = None, **changes: Any) -> Posterior:
    """A fit of three members with dropout, which needs the generators to come back."""
    adapter = AdapterConfig(r=2, target_modules=["0"], modules_to_save=["2"], lora_dropout=0.3)
    return fitted(
        changes.pop("guide", Ensemble(members=K)),
        training=arguments(
            folder, **{"learning_rate": 0.05, **SAVING, **changes}, resume_from_checkpoint=resume
        ),
        callbacks=[] if kill is None else [kill],
        adapter=adapter,
        **SHORT,
    )


@pytest.mark.parametrize(
    ("event", "at", "steps_left"),
    [
        ("on_step_begin", 2, 18),  # nothing is on disk
        ("on_step_begin", 6 + 5, 8),  # member 1 has checkpoint 4
        ("on_step_begin", 6 + 1, 12),  # member 1 has begun
        ("on_train_end", 2, 6),  # member 1 has its last checkpoint, and is not noted as done
        ("on_train_begin", 3, 6),  # member 2 has not begun
    ],
)
def test_a_killed_fit_goes_on_to_the_same_result(
    event: str, at: int, steps_left: int, whole: Posterior, tmp_path: Path, steps: list[int]
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, kill=Kill(event, at))
    steps.clear()
    resumed = run(tmp_path, resume=True)
    assert len(steps) == steps_left
    assert_equal(resumed.model.own_state(), whole.model.own_state())


def test_a_finished_fit_is_not_trained_again(tmp_path: Path, steps: list[int]) -> None:
    first = run(tmp_path)
    for checkpoint in tmp_path.glob("member-*/checkpoint-*"):
        shutil.rmtree(checkpoint)  # a member that is done needs none
    steps.clear()
    again = run(tmp_path, resume=True)
    assert not steps
    assert_equal(again.model.own_state(), first.model.own_state())


def test_side_by_side_members_go_on_together(tmp_path: Path) -> None:
    guide = Ensemble(members=K, side_by_side=True)
    whole = run(tmp_path / "whole", guide=guide)
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill=Kill("on_step_begin", 4), guide=guide)
    resumed = run(tmp_path / "killed", resume=True, guide=guide)
    assert_equal(resumed.model.own_state(), whole.model.own_state())


def test_a_new_fit_in_the_folder_of_an_older_one_takes_nothing_from_it(
    whole: Posterior, tmp_path: Path
) -> None:
    """Also when it is killed and goes on: no member of the older one counts as finished."""
    run(tmp_path, learning_rate=0.2)
    mine = tmp_path / "member-0" / "notes.txt"
    mine.write_text("not ours to remove")
    with pytest.raises(Killed):
        run(tmp_path, kill=Kill("on_step_begin", 4))
    resumed = run(tmp_path, resume=True)
    assert_equal(resumed.model.own_state(), whole.model.own_state())
    assert mine.exists()


def test_a_half_written_member_is_trained_on(
    whole: Posterior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies while it notes a member as done."""
    from pyrolora.inference import members as module

    original = module.save_state

    def dying(joint: JointModel, path: Path, *notes: Any) -> None:
        original(joint, path, *notes)
        path.write_bytes(path.read_bytes()[:50])
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_state", dying)
        with pytest.raises(Killed):
            run(tmp_path)
    resumed = run(tmp_path, resume=True)
    assert_equal(resumed.model.own_state(), whole.model.own_state())


def test_an_output_folder_holds_the_members_checkpoints_and_the_posterior(tmp_path: Path) -> None:
    posterior = fitted(Ensemble(members=2), output_dir=tmp_path)
    for k in range(2):
        assert list((tmp_path / f"member-{k}").glob("checkpoint-*"))
    again = pyrolora.load(tmp_path, mlp())
    assert_equal(again.model.own_state(), posterior.model.own_state())
    assert again.history == posterior.history
    shutil.rmtree(tmp_path / "member-0")
    assert_equal(pyrolora.load(tmp_path, mlp()).model.own_state(), posterior.model.own_state())


def test_members_of_other_settings_are_not_taken_for_this_fits(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ConfigError, match=r"another fit: training.num_train_epochs was .*, now 9"):
        run(tmp_path, resume=True, num_train_epochs=9)


def test_members_differ_in_the_order_of_the_data_whatever_seed_it_has(tmp_path: Path) -> None:
    orders: list[list[float]] = []

    class Seen(TrainerCallback):
        def on_train_begin(self, args: Any, *_: Any, train_dataloader: Any, **__: Any) -> None:
            orders.append([float(x) for b in train_dataloader for x in b["inputs"][:, 0]])

    same = TrainingArguments(
        str(tmp_path), data_seed=5, num_train_epochs=1, save_strategy="no", report_to="none"
    )
    pyrolora.fit(
        mlp(), (X, CLASSES), Ensemble(members=2), task="classification", adapter=HEADED,
        training=same, callbacks=[Seen()],
    )  # fmt: skip
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]

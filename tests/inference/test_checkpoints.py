"""A checkpoint is data of one fit: what is not whole is passed over, what is of another fit is
refused, no pickle is run, and a fit that goes on has the log of one that was never stopped."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from problems import Rows, arguments, bert, reviews, tokenizer, tokens
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.data import prepare
from pyrolora.errors import CheckpointError, ConfigError
from pyrolora.guides import SWAG, Ensemble, MeanField, MonteCLoRA
from pyrolora.inference import last_checkpoint
from pyrolora.inference.checkpoints import damage, remove_surplus
from pyrolora.inference.identity import digest_of_data
from pyrolora.inference.sealing import PARTS_FILE, seal
from pyrolora.tasks import task_for

STEPS = 6
BY_EPOCH = ("eval_strategy", "logging_strategy")
PARTS = [
    "trainer_state.json",
    "fit.json",
    "adapters.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    PARTS_FILE,
]


class Stopped(Exception):
    pass


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stopped


def fitted(folder: Path, guide: Any = "montec", data: Any = None, **changes: Any):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS, "logging_steps": 3}
    adapter = AdapterConfig(r=changes.pop("r", 2), lora_alpha=8)
    more = {name: changes.pop(name) for name in ("callbacks", "eval_data") if name in changes}
    network = changes.pop("network", None) or bert(hidden_dropout_prob=0.1)
    resume = changes.pop("resume", None)
    args = arguments(folder, **{**options, **changes})
    args.resume_from_checkpoint = resume
    data = tokens(16) if data is None else data
    return pyrolora.fit(network, data, guide, adapter=adapter, training=args, **more)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A fit that was stopped after the fifth of its six steps, between two logs."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stopped):
        fitted(folder, callbacks=Stop(5))
    return folder


@pytest.fixture
def run(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def timeless(history):
    """Entries without those that a clock makes."""
    return [
        {
            name: value
            for name, value in entry.items()
            if "runtime" not in name and "per_s" not in name
        }
        for entry in history
    ]


@pytest.mark.parametrize(
    ("guide", "changes"),
    [
        ("montec", {}),
        ("flat+montec", {"gradient_accumulation_steps": 2}),
        (SWAG(start=0.2, snapshots=3, rank=2), {"lr_scheduler_type": "constant"}),
        ("full", {"per_device_train_batch_size": 5}),
        (MonteCLoRA(draws_per_batch=2), {"eval_strategy": "steps", "eval_steps": 4}),
        ("map", {"per_device_train_batch_size": 8, **dict.fromkeys(BY_EPOCH, "epoch")}),
        ("map", {"optim": "adafactor"}),
    ],
    ids=["montec", "flat", "swag", "full", "draws", "epochs", "adafactor"],
)
@pytest.mark.parametrize("step", [2, 5])
def test_a_resumed_fit_has_the_tensors_and_the_log_of_one_in_one_go(guide, changes, step, tmp_path):
    """The averages since the last log are kept, at whichever step it was stopped; the last step of
    an epoch, too, after which the epoch is logged and scored."""
    if "eval_strategy" in changes:
        changes = {**changes, "eval_data": tokens(8, seed=1)}
    if guide == "full":
        fit = lambda folder, **more: pyrolora.fit(  # noqa: E731
            bert(hidden_dropout_prob=0.1),
            tokens(16),
            "full",
            callbacks=more.pop("callbacks", ()),
            training=_resumed(folder, more.pop("resume", None), **more, **changes),
        )
    else:
        fit = lambda folder, **more: fitted(folder, guide, **more, **changes)  # noqa: E731
    whole = fit(tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(tmp_path / "run", callbacks=[Stop(step)])
    resumed = fit(tmp_path / "run", resume=True)
    assert timeless(resumed.history) == timeless(whole.history)
    own = resumed.model.own_state()
    assert all(torch.equal(own[name], value) for name, value in whole.model.own_state().items())


def _resumed(folder, resume, **changes):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS, "logging_steps": 3}
    args = arguments(folder, **{**options, **changes})
    args.resume_from_checkpoint = resume
    return args


@pytest.mark.parametrize(
    "guide", ["map", SWAG(start=0.2, snapshots=4, rank=2)], ids=["map", "swag"]
)
def test_no_step_follows_the_checkpoint_of_the_last_one(guide, tmp_path):
    """Which is in the middle of an epoch; a process may die between it and the end of the fit."""
    options = {"lr_scheduler_type": "constant", "save_total_limit": 1, "resume": "auto"}
    whole = fitted(tmp_path, guide, **options)
    again = fitted(tmp_path, guide, **options)
    assert timeless(again.history) == timeless(whole.history)
    own = again.model.own_state()
    assert all(torch.equal(own[name], value) for name, value in whole.model.own_state().items())
    assert steps_in(tmp_path) == {STEPS}


# Whole or not ------------------------------------------------------------------------------------


def empty(path: Path) -> None:
    path.write_bytes(b"")


def half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def nonsense(path: Path) -> None:
    path.write_bytes(b'{"a": 1}')


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def flipped(path: Path) -> None:
    """One bit in the middle, which readers of the format do not see."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("spoil", [Path.unlink, empty, half, nonsense, pipe, flipped])
def test_a_checkpoint_with_a_part_that_is_torn_is_not_whole(spoil, name, run):
    checkpoint = run / "checkpoint-5"
    assert damage(checkpoint) is None
    spoil(checkpoint / name)
    assert (name in damage(checkpoint)) or (name == PARTS_FILE and "SHA-256" in damage(checkpoint))
    with pytest.warns(UserWarning, match="checkpoint-4, since .*checkpoint-5 is not whole"):
        assert last_checkpoint(run) == run / "checkpoint-4"


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "adapters.safetensors"])
@pytest.mark.parametrize("by_path", [True, False])
def test_a_fit_goes_on_from_the_older_checkpoint_if_the_newest_is_torn(name, by_path, run):
    half(run / "checkpoint-5" / name)
    begun = []

    class Note(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begun.append(state.global_step)

    asked = str(run / "checkpoint-5") if by_path else True
    with pytest.warns(UserWarning, match="checkpoint-4, since .*checkpoint-5 is not whole"):
        fitted(run, resume=asked, callbacks=Note())
    assert begun == [4]


def test_without_a_whole_checkpoint_there_is_nothing_to_go_on_from(run, steps):
    for checkpoint in run.glob("checkpoint-*"):
        half(checkpoint / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint .*checkpoint-5.*optimizer\.pt"):
        fitted(run, resume=True)
    assert not steps


@pytest.mark.parametrize("left", ["nothing", "torn", "whole"])
def test_auto_goes_on_where_it_can_and_else_begins(left, run, stopped, tmp_path):
    """The same call, whatever was there before it."""
    whole = fitted(tmp_path / "afresh", resume="auto")
    if left == "nothing":
        shutil.rmtree(run)
    for checkpoint in run.glob("checkpoint-*") if left == "torn" else ():
        half(checkpoint / "optimizer.pt")
    words = r"checkpoint-5 is not whole, and no older one is: .*optimizer\.pt.*beginning anew"
    with pytest.warns(UserWarning, match=words) if left == "torn" else nullcontext():
        again = fitted(run, resume="auto")
    assert timeless(again.history) == timeless(whole.history)
    own = again.model.own_state()
    assert all(torch.equal(own[name], value) for name, value in whole.model.own_state().items())


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "nll",
    "load_best_model_at_end": True,
    "learning_rate": 0.3,
    "save_total_limit": 2,
}


class Scores:
    """NLLs in the order in which they are asked for: the second is the best.

    The last one is that of the posterior, whose scales are set once more after the training.
    """

    def __init__(self, after: int) -> None:
        self.left = [3.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0][after:]

    def __call__(self, *_: Any, **__: Any) -> dict[str, float]:
        return {"nll": self.left.pop(0)}


@pytest.mark.parametrize("spoil", ["moved", "best"])
def test_the_best_model_is_found_again_or_made_again(spoil, tmp_path, monkeypatch):
    """In a folder that was moved; and where its checkpoint is torn, from an older one."""
    fit = importlib.import_module("pyrolora.fitting.fit")  # hidden behind its function
    options = {**BEST, "eval_data": tokens(8, seed=1), "save_total_limit": 3}
    monkeypatch.setattr(fit, "_score", Scores(0))
    whole = fitted(tmp_path / "whole", **options).model.own_state()
    monkeypatch.setattr(fit, "_score", Scores(0))
    with pytest.raises(Stopped):
        fitted(tmp_path / "run", **options, callbacks=Stop(4))
    assert steps_in(tmp_path / "run") == {2, 3, 4}
    run = (tmp_path / "run").rename(tmp_path / "elsewhere")
    if spoil == "best":
        flipped(run / "checkpoint-2" / "adapters.safetensors")
        assert "checkpoint-2/adapters.safetensors" in damage(run / "checkpoint-4")
        monkeypatch.setattr(fit, "_score", Scores(0))
        with pytest.warns(UserWarning, match="no older one is.*beginning anew"):
            again = fitted(run, **options, resume="auto")
    else:
        monkeypatch.setattr(fit, "_score", Scores(4))
        again = fitted(run, **options, resume=True)
    own = again.model.own_state()
    assert all(torch.equal(own[name], value) for name, value in whole.items())


def steps_in(folder: Path) -> set[int]:
    return {int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")}


@pytest.mark.parametrize("dies", ["before", "amid"])
def test_a_fit_that_died_as_it_removed_checkpoints_leaves_no_surplus(dies, tmp_path, monkeypatch):
    """After its last step, when no other checkpoint follows that would take the surplus along."""
    fit = importlib.import_module("pyrolora.fitting.fit")
    monkeypatch.setattr(fit, "_score", Scores(0))
    options = {**BEST, "eval_data": tokens(8, seed=1)}
    removed = shutil.rmtree

    def dying(folder, *args, **kwargs):
        if Path(folder).name != f"checkpoint-{STEPS - 1}":
            removed(folder, *args, **kwargs)
            return
        if dies == "amid":
            (Path(folder) / "optimizer.pt").unlink()
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", dying)
        with pytest.raises(Stopped):
            fitted(tmp_path, **options)
    assert steps_in(tmp_path) == {2, STEPS - 1, STEPS}
    fitted(tmp_path, **options, resume="auto")
    assert steps_in(tmp_path) == {2, STEPS}


def test_early_stopping_goes_on_counting_and_has_stopped(tmp_path, monkeypatch):
    """By a checkpoint between the two evaluations that are no better, and by that of the end."""
    fit = importlib.import_module("pyrolora.fitting.fit")
    options = {**BEST, "eval_data": tokens(8, seed=1)}
    patience = lambda: [EarlyStoppingCallback(2)]  # noqa: E731

    monkeypatch.setattr(fit, "_score", Scores(0))
    whole = fitted(tmp_path / "whole", **options, callbacks=patience())
    monkeypatch.setattr(fit, "_score", Scores(0))
    with pytest.raises(Stopped):
        fitted(tmp_path / "run", **options, callbacks=[*patience(), Stop(3)])
    for after in (3, 4):
        monkeypatch.setattr(fit, "_score", Scores(after))
        again = fitted(tmp_path / "run", **options, callbacks=patience(), resume="auto")
        assert timeless(again.history) == timeless(whole.history)
        assert steps_in(tmp_path / "run") == {2, 4}
    monkeypatch.setattr(fit, "_score", Scores(4))
    more = fitted(tmp_path / "run", **options, callbacks=EarlyStoppingCallback(4), resume="auto")
    assert [entry["step"] for entry in more.history if "step" in entry][-1] == STEPS

    file = tmp_path / "run" / f"checkpoint-{STEPS}" / "trainer_state.json"
    counts = json.loads(file.read_text())
    kept = counts["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"]
    kept["early_stopping_patience_counter"] = "four"
    file.write_text(json.dumps(counts))
    seal(file.parent)
    with pytest.raises(CheckpointError, match=r"patience_counter of EarlyStopp.*of another type"):
        fitted(tmp_path / "run", **options, callbacks=patience(), resume="auto")


class Lowest(TrainerCallback, ExportableState):
    """A callback of a user's that keeps the lowest loss, and the steps at which it fell."""

    def __init__(self):
        self.loss, self.at = None, []

    def state(self):
        return {"args": {}, "attributes": {"loss": self.loss, "at": self.at}}

    def on_log(self, args, state, control, logs, **kwargs):
        if self.loss is None or logs.get("loss", self.loss) < self.loss:
            self.loss, self.at = logs["loss"], [*self.at, state.global_step]


def test_what_a_callback_has_found_goes_on(tmp_path):
    options = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
    whole, died, again = Lowest(), Lowest(), Lowest()
    fitted(tmp_path / "whole", **options, callbacks=whole)
    with pytest.raises(Stopped):
        fitted(tmp_path / "run", **options, callbacks=[died, Stop(3)])
    fitted(tmp_path / "run", **options, callbacks=again, resume="auto")
    assert again.loss == whole.loss < 10
    assert again.at == whole.at


def test_the_oldest_checkpoints_go_and_those_that_are_not_whole_go_first(tmp_path):
    """The fourth is being removed; the eighth and the ninth are of before the fit went on."""

    def left(limit, step=6, best=None):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        for made in (2, 3, 4, 5, 6, 8, 9, 10):
            folder = tmp_path / "run" / f"checkpoint-{made}"
            folder.mkdir(parents=True)
            (folder / "part").touch()
            if made not in (4, 10):
                seal(folder)
        os.utime(tmp_path / "run" / "checkpoint-4", (2**32, 2**32))  # as a removal leaves it
        remove_surplus(tmp_path / "run", limit, step, best)
        return steps_in(tmp_path / "run")

    assert left(None) == left(0) == left(8) == {2, 3, 4, 5, 6, 8, 9, 10}
    assert left(7) == {2, 3, 4, 5, 6, 8, 9}
    assert left(6) == {2, 3, 5, 6, 8, 9}
    assert left(4) == {2, 3, 5, 6}
    assert left(2) == {5, 6}
    assert left(2, best=tmp_path / "run" / "checkpoint-3") == {3, 6}
    assert left(1, best=tmp_path / "run" / "checkpoint-3") == {3, 6}
    assert left(1, best=tmp_path / "gone" / "checkpoint-3") == {6}
    assert left(1, step=7) == left(1, best=tmp_path / "run" / "checkpoint-6") == {6}


def test_a_checkpoint_that_cannot_be_removed_is_told(tmp_path, monkeypatch):
    for made in (1, 2):
        (tmp_path / f"checkpoint-{made}").mkdir()
        seal(tmp_path / f"checkpoint-{made}")

    def refused(folder):
        raise PermissionError("not yours")

    monkeypatch.setattr(shutil, "rmtree", refused)
    with pytest.warns(UserWarning, match="checkpoint-1 cannot be .*save_total_limit=1: not yours"):
        remove_surplus(tmp_path, 1, 2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("nowhere", "is no folder.*'auto' for that one"),
        ("run", "holds some; pass '.*checkpoint-5'"),
        (True, "no checkpoint in .*empty"),
    ],
)
def test_what_is_no_checkpoint_is_refused(asked, message, run, steps):
    folder = run.parent / "empty" if asked is True else run
    asked = asked if asked is True else str(run.parent / asked)
    with pytest.raises(ConfigError, match=message):
        fitted(folder, resume=asked)
    assert not steps


def test_the_newest_checkpoint_is_that_of_the_highest_step(run):
    """By number, not by name, and not by the time it was written."""
    later = Path(shutil.copytree(run / "checkpoint-5", run / "checkpoint-10"))
    state = json.loads((later / "trainer_state.json").read_text())
    (later / "trainer_state.json").write_text(json.dumps({**state, "global_step": 10}))
    seal(later)
    (run / "checkpoint-4" / "trainer_state.json").touch()
    assert last_checkpoint(run) == later
    assert last_checkpoint(str(run)) == later


@pytest.mark.parametrize("name", ["checkpoint-best", "checkpoint-", "checkpoint--5", "my-30"])
def test_folders_of_other_names_are_no_checkpoints(name, run, tmp_path):
    shutil.copytree(run / "checkpoint-5", tmp_path / "others" / name)
    (tmp_path / "others" / "checkpoint-7").write_text("a file")
    assert last_checkpoint(tmp_path / "others") is None
    assert last_checkpoint(tmp_path / "gone") is None


@pytest.mark.parametrize(
    "change",
    [
        {"global_step": 4},
        {"global_step": "5"},
        {"log_history": [3]},
        {"stateful_callbacks": []},
        {"unheard_of": 1},
        {"best_model_checkpoint": 3},
    ],
)
def test_a_state_that_the_trainer_could_not_take_is_damaged(change, run):
    file = run / "checkpoint-5" / "trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    seal(file.parent)
    assert "is not the Trainer's" in damage(run / "checkpoint-5")


# No program --------------------------------------------------------------------------------------


class Malicious:
    """Its pickle, when it is loaded, writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin"]
)
@pytest.mark.parametrize("how", ["torch", "pickle", "in a dict"])
def test_no_file_of_a_checkpoint_is_run(name, how, run, tmp_path):
    marker = tmp_path / "was here"
    planted = Malicious(marker)
    for checkpoint in run.glob("checkpoint-*"):
        file = checkpoint / name
        if how == "pickle":
            file.write_bytes(pickle.dumps(planted))
        else:
            torch.save({"state": planted} if how == "in a dict" else planted, file)
        seal(checkpoint)
    if name == "training_args.bin":  # which nobody reads
        fitted(run, resume=True)
    else:
        with pytest.raises(CheckpointError, match=name):
            fitted(run, resume=True)
    assert not marker.exists()


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """Two members, the second of which was stopped; and what they give in one go."""
    folder, guide = tmp_path_factory.mktemp("ensemble"), Ensemble(members=2)
    with pytest.raises(Stopped):
        fitted(folder / "run", guide, callbacks=_StopSecond())
    return folder / "run", fitted(folder / "whole", guide)


@pytest.mark.parametrize("spoil", ["pickle", "sealed pickle", "flipped", "no list"])
def test_a_damaged_state_of_a_finished_member_is_made_again(spoil, ensemble, tmp_path):
    """From its last checkpoint; and it is read as tensors."""
    marker, run = tmp_path / "was here", Path(shutil.copytree(ensemble[0], tmp_path / "run"))
    finished = run / "member-0" / "adapters.safetensors"
    if spoil == "flipped":
        flipped(finished)
    elif spoil == "no list":
        (finished.parent / PARTS_FILE).unlink()
        died = finished.with_name(".0123456789abcdef.part")
        died.write_bytes(b"half of it")
    else:
        finished.write_bytes(pickle.dumps(Malicious(marker)))
    if spoil == "sealed pickle":
        seal(finished.parent, [finished.name])
    begun = []

    class Note(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begun.append(state.global_step)

    warned = pytest.warns(UserWarning, match="member-0 is not whole, and the member is made again")
    with nullcontext() if spoil == "no list" else warned:
        again = fitted(run, Ensemble(members=2), resume=True, callbacks=Note())
    assert begun == [STEPS, 4]
    assert not [*run.rglob(".*.part")]
    own = again.model.own_state()
    assert all(
        torch.equal(own[name], value) for name, value in ensemble[1].model.own_state().items()
    )
    assert not marker.exists()


class _StopSecond(TrainerCallback):
    """Stops the second training."""

    begun = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun += 1

    def on_step_begin(self, args, state, control, **kwargs):
        if self.begun == 2 and state.global_step == 4:
            raise Stopped


def edit_optimizer(change):
    def edit(checkpoint: Path) -> None:
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        change(state)
        torch.save(state, checkpoint / "optimizer.pt")

    return edit


def other_size(state):
    for moments in state["state"].values():
        moments["exp_avg"] = moments["exp_avg"].flatten()[:3].clone()


def infinite(state):
    for moments in state["state"].values():
        moments["exp_avg_sq"] = moments["exp_avg_sq"] * float("inf")


def no_groups(state):
    state["param_groups"] = []


def scheduler_without_a_rate(checkpoint: Path) -> None:
    torch.save({"step": 3}, checkpoint / "scheduler.pt")


def infinite_means(checkpoint: Path) -> None:
    state = load_file(checkpoint / "adapters.safetensors")
    state["program.bank.A_loc"][0] = float("nan")
    save_file(state, checkpoint / "adapters.safetensors")


def other_averages(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "fit.json").read_text())
    content["averages"] = {"terms": 3}
    (checkpoint / "fit.json").write_text(json.dumps(content))


def generators_of_another_kind(checkpoint: Path) -> None:
    torch.save({"python": 3}, checkpoint / "rng_state.pth")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_optimizer(other_size), "of another size"),
        (edit_optimizer(infinite), "or infinite"),
        (edit_optimizer(no_groups), r"optimizer\.pt"),
        (scheduler_without_a_rate, r"scheduler\.pt"),
        (infinite_means, "'program.bank.A_loc' .* is not finite"),
        (other_averages, r"fit\.json"),
        (generators_of_another_kind, "rng_state"),
    ],
)
def test_a_part_that_can_be_read_and_not_used_is_refused(edit, message, run):
    edit(run / "checkpoint-5")
    seal(run / "checkpoint-5")
    with pytest.raises(CheckpointError, match=message):
        fitted(run, resume=True)


# Of which fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.1}, r"training\.learning_rate was 0\.01, now 0\.1"),
        ({"per_device_train_batch_size": 2}, r"per_device_train_batch_size was 4, now 2"),
        ({"seed": 9}, r"training\.seed was 3, now 9"),
        ({"max_steps": 12}, r"training\.max_steps was 6, now 12.*schedule"),
        ({"weight_decay": 0.5}, r"training\.weight_decay was"),
        ({"lr_scheduler_type": "cosine"}, r"lr_scheduler_type was 'linear', now 'cosine'"),
        ({"data": tokens(16, seed=1)}, "data_digest was"),
        ({"data": tokens(12)}, "num_examples was 16, now 12"),
        ({"guide": "meanfield"}, "guide.name was 'montec', now 'meanfield'"),
        ({"guide": MonteCLoRA(sample_scale=1e-3)}, r"guide\.sample_scale was"),
        ({"r": 3}, r"adapter\.r was 2, now 3"),
        ({"network": bert(num_hidden_layers=1)}, r"network\.parameters was"),
    ],
)
@pytest.mark.parametrize("by_path", [True, False])
def test_a_checkpoint_of_another_fit_is_refused_by_what_differs(
    changes, message, by_path, run, steps
):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    steps.clear()
    with pytest.raises(ConfigError, match=message):
        fitted(run, resume=str(run / "checkpoint-5") if by_path else True, **changes)
    assert not steps
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_checkpoint_around_another_given_adapter_is_refused(tmp_path):
    """Its means are in the checkpoint, and would come in the place of those that are given."""
    given = [
        pyrolora.fit(bert(), tokens(16), "map", epochs=1, seed=seed, adapter=AdapterConfig(r=2))
        for seed in (0, 1)
    ]
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    guide = MeanField(scale_updates="gradient")
    pyrolora.fit(given[0], tokens(16), guide, training=_resumed(tmp_path, None, **options))
    args = _resumed(tmp_path, True, **options)
    with pytest.raises(ConfigError, match="constants_digest was"):
        pyrolora.fit(given[1], tokens(16), guide, training=args)


def test_the_members_of_another_ensemble_are_refused(ensemble, tmp_path):
    guide, run = Ensemble(members=2), Path(shutil.copytree(ensemble[0], tmp_path / "run"))
    with pytest.raises(ConfigError, match="data_digest was"):
        fitted(run, guide, tokens(16, seed=1), resume=True)
    with pytest.raises(ConfigError, match="every member of an ensemble has its own"):
        fitted(run, guide, resume=str(run / "member-1" / "checkpoint-4"))
    again = fitted(run, guide, resume="auto")
    assert timeless(again.history) == timeless(ensemble[1].history)
    own = again.model.own_state()
    assert all(
        torch.equal(own[name], value) for name, value in ensemble[1].model.own_state().items()
    )


def prepared(data):
    network = bert()
    return prepare(data, network, task_for(network), tokenizer())


def test_the_digest_of_data_is_of_what_they_hold():
    """Not of how they lie in memory, and of every row of a table."""
    rows = tokens(30)
    one = digest_of_data(prepared(rows))
    pieces = [rows.select(range(10)), rows.select(range(10, 30))]
    assert digest_of_data(prepared(datasets.concatenate_datasets(pieces))) == one
    assert digest_of_data(prepared(rows.select([*range(30)]))) == one
    for i in (0, 17, 29):
        ids = [list(row) for row in rows["input_ids"]]
        ids[i][3] = 4 + (ids[i][3] - 3) % 10
        other = rows.remove_columns("input_ids").add_column("input_ids", ids)
        assert digest_of_data(prepared(other.select_columns(rows.column_names))) != one
    texts = reviews(6)
    assert digest_of_data(prepared(texts)) == digest_of_data(prepared(reviews(6)))
    assert digest_of_data(prepared(texts)) != digest_of_data(prepared(reviews(6, seed=1)))
    own = Rows([dict(row) for row in rows])
    changed = Rows([dict(row) for row in rows.select([*range(1, 30), 0])])
    assert digest_of_data(prepared(own)) != digest_of_data(prepared(changed))

"""Two processes: the fit of one, by the same objective, and its work shared out.

They start once, which takes most of the time, and make everything that the tests look at.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import together
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from problems import bert, tokens

import pyrolora
from pyrolora.processes import alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes have written."""
    return run(tmp_path_factory.mktemp("two"))


def run(made: Path, *options: str) -> Path:
    """Have two processes write to a folder."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *command, processes.__file__, str(made), *options],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return made


def both(folder: Path, name: str) -> list[dict[str, Any]]:
    """What the two processes came to in one part."""
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in "01"]


def alike(folder: Path, name: str) -> dict[str, Any]:
    """What both came to, which has to be the same."""
    first, second = both(folder, name)
    assert first == second
    return first


# The fit ------------------------------------------------------------------------------------------


def test_two_processes_fit_as_one_does(folder, tmp_path):
    """Objective, log and ranks are those of one process with all of the examples."""
    found = alike(folder, "fits")
    for name, made in (("weighed", processes.weighed), ("allocated", processes.allocated)):
        one = processes.listed(made(tmp_path))
        tolerance = (
            {"atol": 1e-6, "rtol": 1e-5} if name == "weighed" else {"atol": 1e-5, "rtol": 1e-4}
        )
        assert found[name].keys() == one.keys()
        for key, value in one.items():
            expected = torch.tensor(value)
            torch.testing.assert_close(torch.tensor(found[name][key]), expected, **tolerance)
    active = torch.tensor(found["allocated"]["program.bank.active"])
    assert active.sum() == 4
    assert active.sum(-1).tolist() != [2, 2]


def test_the_log_has_means_over_the_processes(folder, tmp_path):
    """A point has no noise, so that the terms over all examples are those of one process."""
    one, several = processes.logged(tmp_path), alike(folder, "fits")["logged"]
    assert set(one[0]) == {"loss", "elbo", "log_likelihood", "kl/A", "kl/B"}
    assert [entry["elbo"] for entry in one] != [one[0]["elbo"]] * len(one)
    assert several == [pytest.approx(entry, rel=1e-5) for entry in one]


def test_each_process_has_noise_of_its_own(folder):
    """Factors and the seed of Flat-LoRA differ at every step; parameters and the log do not."""
    first, second = both(folder, "noise")
    pairs = [*zip(first["noise"]["drawn"], second["noise"]["drawn"], strict=True)]
    assert len(pairs) == 4
    assert all(own[0] != other[0] and own[1] != other[1] for own, other in pairs)
    assert first["noise again"] == first["noise"]
    assert second["noise again"] == second["noise"]
    for name in ("state", "elbo"):
        assert first["noise"][name] == second["noise"][name]


# Shared out ---------------------------------------------------------------------------------------


def test_members_are_those_of_one_process(folder, tmp_path):
    """Each is trained in one process, with its log, and the posterior is the same to the bit."""
    assert alike(folder, "members") == together.as_json(together.members(tmp_path))


@pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")
def test_the_first_chain_is_that_of_one_process_and_the_others_have_seeds(folder, tmp_path):
    chains = torch.tensor(alike(folder, "chains")["A"]).unflatten(0, (3, 4))
    one = together.chains(tmp_path)["A"].unflatten(0, (3, 4))
    torch.testing.assert_close(chains[0], one[0], atol=1e-4, rtol=1e-4)
    for other in (chains[1], chains[2], one[1]):
        assert (chains[0] - other).abs().max() > 0.05
    assert (chains[1] - chains[2]).abs().max() > 0.05


def test_predictions_are_shared_out_and_are_those_of_one_process(folder):
    found = alike(folder, "shared")
    assert found["together"] == found["alone"]
    assert torch.tensor(found["unseeded"]).std(0).max() > 0  # and the same draws in both
    written = alike(folder, "written")
    assert written["together"] == written["alone"]


def test_each_process_predicts_its_own_batches(folder):
    """Of four batches, two; alone, all."""
    assert alike(folder, "counted") == {"alone": 4, "together": 2, "draws at once": [6, 3]}


@pytest.mark.parametrize("what", ["draws", "data"])
def test_calls_that_differ_are_refused_by_both(folder, what):
    assert "asked for different things" in alike(folder, "shared")["refused"][what]


@pytest.mark.parametrize(
    ("what", "places"),
    [
        ("one call", "process 0 is at work to share out, process 1 is at the end of the block"),
        ("one seed", "process 0 is at draws without a seed, process 1 is at work to share out"),
    ],
)
def test_processes_at_different_places_do_not_wait_for_ever(folder, what, places):
    assert places in alike(folder, "shared")["refused"][what]


def test_an_error_of_one_process_is_that_of_all(folder):
    assert alike(folder, "shared")["refused"]["one fails"] == "DataError: example 3 cannot be read"


def test_a_process_that_opens_a_block_alone_does_not_hang(folder):
    first, second = both(folder, "waited")
    assert "process 0 of 2 has waited 0.5 s" in first["error"]
    assert "under 'if rank == 0'" in first["error"]
    assert not second["error"]
    assert first["seconds"] < 20


def test_processes_do_not_go_on_from_different_checkpoints(folder):
    """As where each machine has a disk of its own, on which the first process alone saves."""
    error = alike(folder, "resumed_apart")["error"]
    assert "process 0 has checkpoint-1, process 1 has None; set output_dir to one folder" in error


def test_a_block_in_one_process_changes_nothing():
    with pyrolora.all_processes():
        pass
    with (
        pytest.raises(pyrolora.errors.ConfigError, match="timeout"),
        pyrolora.all_processes(timeout=0),
    ):
        pass


def test_what_accelerate_knows_is_back_after_a_member():
    accelerator = Accelerator(cpu=True)
    states = PartialState._shared_state, AcceleratorState._shared_state
    before = [dict(state) for state in states]
    with alone():
        assert not states[1]
        assert Accelerator(cpu=True).num_processes == 1
    assert [dict(state) for state in states] == before
    assert accelerator.device.type == "cpu"


# FSDP2 --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(folder) -> dict[str, Any]:
    return alike(folder, "sharded")


def test_a_sharded_network_gives_the_fit_of_a_whole_one_to_the_bit(sharded):
    """Log with evaluations, posterior, predictions and metrics; half of the weights in each."""
    assert sharded["sharded"] == sharded["plain"]
    assert sharded["share of the weights"] == 0.5
    assert sharded["identities"] == [True, "BertForSequenceClassification"]
    assert sharded["a second fit"] == sharded["a second fit of the whole"]


def test_a_sharded_fit_resumes_to_the_same_result(sharded):
    assert sharded["resumed"] == {name: sharded["sharded"][name] for name in ("log", "state")}


def test_a_sharded_network_needs_all_processes_and_does_not_merge(sharded):
    assert "BindingError: each process has a part" in sharded["outside"]
    assert "load it in one process with the whole network" in sharded["merge"]


def test_one_process_reads_what_a_sharded_fit_has_saved(folder, sharded):
    posterior = pyrolora.load(folder / "sharded" / "saved", bert())
    assert together.as_json(together.read(posterior)) == {
        name: sharded["sharded"][name] for name in ("probs", "drawn", "metrics", "mean")
    }
    merged = posterior.merge()(**together.inputs(tokens(10, seed=1))).logits.softmax(-1)
    torch.testing.assert_close(merged, torch.tensor(sharded["sharded"]["mean"])[0])
    assert (folder / "sharded" / "saved" / "peft" / "adapter_config.json").exists()


@pytest.mark.slow
def test_every_guide_and_kind_of_network_is_the_same_when_sharded(tmp_path):
    made = run(tmp_path, "longer")
    for name, expected in (("guides", 11), ("networks", 4)):
        found = alike(made, name)
        assert len(found) == expected
        for kind, (whole, sharded) in found.items():
            assert sharded == whole, kind

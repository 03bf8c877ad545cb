"""Two processes: the fit of one, by the same objective, with noise of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import torch


def test_two_processes_fit_as_one_does(tmp_path):
    """Objective and ranks are those of one process with all of the examples.

    Factors and the seed of Flat-LoRA differ between the processes at every step; parameters and the
    log, a mean over the processes, do not; and a network with weights that it does not use is
    trained in full.
    """
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *command, processes.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in "01")

    for name, made in (("weighed", processes.weighed), ("allocated", processes.allocated)):
        one = processes.listed(made(Path(tmp_path)))
        tolerance = (
            {"atol": 1e-6, "rtol": 1e-5} if name == "weighed" else {"atol": 1e-5, "rtol": 1e-4}
        )
        for several in (first[name], second[name]):
            assert several.keys() == one.keys()
            for key, value in one.items():
                expected = torch.tensor(value)
                torch.testing.assert_close(torch.tensor(several[key]), expected, **tolerance)
    active = torch.tensor(first["allocated"]["program.bank.active"])
    assert active.sum() == 4
    assert active.sum(-1).tolist() != [2, 2]

    pairs = [*zip(first["noise"]["drawn"], second["noise"]["drawn"], strict=True)]
    assert len(pairs) == 4
    assert all(own[0] != other[0] and own[1] != other[1] for own, other in pairs)
    assert first["noise again"] == first["noise"]
    assert second["noise again"] == second["noise"]
    for name in ("state", "elbo"):
        assert first["noise"][name] == second["noise"][name]
    assert first["full"] == second["full"]

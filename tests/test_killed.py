"""A run that is killed outright, in a process of its own, goes on to the same result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from problems import bert

import pyrolora

SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch, pyrolora
from problems import bert, tokens
from transformers import TrainerCallback, TrainingArguments
torch.set_num_threads(1)

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

args = TrainingArguments(
    output_dir=sys.argv[1], max_steps=10, per_device_train_batch_size=4, save_strategy="steps",
    save_steps=3, report_to="none", disable_tqdm=True, use_cpu=True, seed=1,
)
args.resume_from_checkpoint = sys.argv[3] == "resume"
posterior = pyrolora.fit(
    bert(hidden_dropout_prob=0.1), tokens(), training=args, callbacks=[Kill()]
)
posterior.save(sys.argv[1] + "/posterior")
"""


@pytest.mark.slow
def test_a_run_killed_by_the_system_resumes_to_the_same_result(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent)))

    def run(out: str, kill_at: int, how: str) -> int:
        command = [sys.executable, str(script), str(tmp_path / out), str(kill_at), how]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, env=environment, timeout=300, check=False).returncode

    assert run("whole", -1, "afresh") == 0
    assert run("killed", 7, "afresh") == -signal.SIGKILL
    assert run("killed", -1, "resume") == 0
    whole, resumed = (
        pyrolora.load(tmp_path / name / "posterior", bert()).model.own_state()
        for name in ("whole", "killed")
    )
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())

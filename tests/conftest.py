"""Every test: seeded, Pyro validating, its parameter store empty, warnings as errors."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import datasets
import pyro
import pytest
import torch

from pyrolora.inference import SVITrainer
from pyrolora.seeding import seed_torch


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    seed_torch(0)
    pyro.clear_param_store()
    pyro.enable_validation(True)
    yield
    assert not pyro.get_param_store().keys(), "the process-wide parameter store was written"


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    datasets.disable_progress_bars()
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """accelerate collects after every fit, which would look at all of the libraries each time.

    Some are imported by the tests of the file before.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every training step that is begun."""
    begun: list[int] = []
    original = SVITrainer.training_step

    def counted(self: SVITrainer, *args: Any, **kwargs: Any) -> Any:
        begun.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SVITrainer, "training_step", counted)
    return begun

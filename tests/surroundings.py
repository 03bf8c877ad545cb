"""The state of the process that belongs to the caller, as a call finds it and has to leave it."""

from __future__ import annotations

import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
import transformers
from pyro.infer.util import is_validation_enabled
from pyro.poutine.runtime import _PYRO_STACK
from torch import nn


def surroundings() -> dict[str, Any]:
    """Return the state by name, in values that `==` compares."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    real = [log for log in loggers if isinstance(log, logging.Logger)]
    return {
        "Python's generator": random.getstate(),
        "NumPy's generator": str(np.random.get_state()),
        "torch's generator": torch.get_rng_state().tolist(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads of torch": torch.get_num_threads(),
        "threads of torch between operations": torch.get_num_interop_threads(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "anomaly detection": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "precision of products": torch.get_float32_matmul_precision(),
        "flushing of denormals": float(torch.tensor(1e-40) * 1.0) != 0,
        "torch's print options": dict(vars(torch._tensor_str.PRINT_OPTS)),
        "validation of laws": torch.distributions.Distribution._validate_args,
        "Pyro's validation": is_validation_enabled(),
        "Pyro's parameters": sorted(pyro.get_param_store().keys()),
        "Pyro's handlers": len(_PYRO_STACK),
        "NumPy's errors": np.geterr(),
        "NumPy's print options": str(np.get_printoptions()),
        "filters of warnings": [*warnings.filters],
        "how warnings are shown": warnings.showwarning,
        "loggers": {log.name: (log.level, log.disabled, log.propagate) for log in real},
        "handlers of loggers": {log.name: [*log.handlers] for log in real if log.handlers},
        "logging as a whole": logging.root.manager.disable,
        "verbosity of transformers": transformers.logging.get_verbosity(),
        "verbosity of datasets": datasets.logging.get_verbosity(),
        "progress bars of datasets": datasets.are_progress_bars_disabled(),
        "caching of datasets": datasets.is_caching_enabled(),
        "environment": dict(os.environ),
        "working folder": Path.cwd(),
        "umask": _umask(),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "hooks": (sys.excepthook, sys.displayhook, threading.excepthook),
        "streams": (sys.stdout, sys.stderr, sys.stdin),
        "recursion limit": sys.getrecursionlimit(),
        "collection of garbage": (gc.isenabled(), gc.get_threshold()),
        "locale": locale.setlocale(locale.LC_ALL),
        "matplotlib's settings": dict(mpl.rcParams),
        "open figures": plt.get_fignums(),
    }


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return what differs, by name, with both values; loggers that are new have not changed."""
    found = {}
    for name in {**before, **after}:
        old, value = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            keys = {*old} if "logger" in name else {*old, *value}
            parts = {k: (old.get(k), value.get(k)) for k in keys if old.get(k) != value.get(k)}
            if parts:
                found[name] = parts
        elif value != old:
            found[name] = (str(old)[:200], str(value)[:200])
    return found


@contextmanager
def undisturbed() -> Iterator[None]:
    """Assert that the block leaves the surroundings as they were."""
    before = surroundings()
    yield
    found = changed(before, surroundings())
    assert not found, found


def fingerprint(network: nn.Module) -> dict[str, Any]:
    """Return what a fit or a prediction may not change of a network, by name."""
    found: dict[str, Any] = {}
    for name, module in network.named_modules():
        hooks = {k: len(v) for k, v in vars(module).items() if k.endswith("hooks") and v}
        found[f"module {name}"] = (id(module), type(module), module.training, hooks)
        found[f"attributes of {name}"] = sorted(vars(module))
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        bits = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        found[f"tensor {name}"] = (id(tensor), tensor.requires_grad, tensor.grad is None, bits)
    return found

"""Posteriors over the low-rank adapters of a transformer.

    posterior = pyrolora.fit(model, data, guide="montec")
    prediction = posterior.predict(test, num_samples=32)

Names are imported on first use, so that ``import pyrolora`` is cheap.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from pyrolora.errors import PyroLoraError

if TYPE_CHECKING:
    __version__: str
    from pyrolora import arviz, diagnostics, distributions, guides, plots, tasks
    from pyrolora.adapters.config import AdapterConfig, RankAllocation
    from pyrolora.comparing import compare
    from pyrolora.data import TextOptions
    from pyrolora.fitting.fit import fit
    from pyrolora.loading import from_peft, load
    from pyrolora.posterior import Posterior
    from pyrolora.predictive import Generation, Prediction
    from pyrolora.processes import all_processes

_LAZY = {
    "AdapterConfig": "pyrolora.adapters",
    "Generation": "pyrolora.predictive",
    "Posterior": "pyrolora.posterior",
    "Prediction": "pyrolora.predictive",
    "RankAllocation": "pyrolora.adapters",
    "TextOptions": "pyrolora.data",
    "all_processes": "pyrolora.processes",
    "arviz": "",
    "compare": "pyrolora.comparing",
    "diagnostics": "",
    "distributions": "",
    "fit": "pyrolora.fitting",
    "from_peft": "pyrolora.loading",
    "guides": "",
    "load": "pyrolora.loading",
    "plots": "",
    "tasks": "",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("pyrolora")
    if name not in _LAZY:
        raise AttributeError(f"module 'pyrolora' has no attribute {name!r}")
    if not _LAZY[name]:
        return importlib.import_module(f"pyrolora.{name}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "errors"])


__all__ = [
    "AdapterConfig",
    "Generation",
    "Posterior",
    "Prediction",
    "PyroLoraError",
    "RankAllocation",
    "TextOptions",
    "all_processes",
    "arviz",
    "compare",
    "diagnostics",
    "distributions",
    "fit",
    "from_peft",
    "guides",
    "load",
    "plots",
    "tasks",
]

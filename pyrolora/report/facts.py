"""Facts about the posterior and about the data, as names and values."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
import pandas as pd
from torch import Tensor, nn

from pyrolora.adapters import AdapterBank
from pyrolora.guides import Guide, full_name
from pyrolora.inference.widths import chosen_width, has_measured
from pyrolora.model import JointModel
from pyrolora.predictive import Predictor
from pyrolora.report.examples import Examples
from pyrolora.tasks import Prediction, Task

MOST_CLASSES = 50
"""The most rows of the table of classes."""
PACKAGES = ("pyrolora", "torch", "pyro-ppl", "transformers", "arviz")


class Subject(Protocol):
    """The attributes and methods of a posterior that a report reads."""

    options: Guide
    model: JointModel
    history: list[dict[str, Any]]
    settings: dict[str, Any]
    tokenizer: Any
    temperature: float

    @property
    def held_back(self) -> int: ...

    @property
    def base(self) -> nn.Module: ...

    @property
    def bank(self) -> AdapterBank: ...

    @property
    def task(self) -> Task: ...

    def sample(self, num_samples: int, *, seed: int | None = None) -> Mapping[str, Tensor]: ...

    @property
    def predictor(self) -> Predictor: ...

    def predict(
        self,
        data: Any,
        num_samples: int | None = None,
        *,
        draws: Iterable[int] | None = None,
        batch_size: int,
        seed: int | None = None,
    ) -> Prediction: ...

    def inputs_of(self, data: Any) -> Any: ...

    def to_arviz(self, num_samples: int | None = None, *, seed: int | None = None) -> Any: ...


def posterior_facts(posterior: Subject) -> dict[str, str]:
    """Return facts about the guide, the network, the adapters and the fit."""
    specs = posterior.bank.specs.values()
    ranks = posterior.bank.ranks()
    sites = {name: draw[0].numel() for name, draw in posterior.sample(1, seed=0).items()}
    entries = sum(ranks[spec.name] * (spec.in_features + spec.out_features) for spec in specs)
    named = posterior.model.named_parameters()
    frozen = ("base.",) if specs else ()
    trained = sum(p.numel() for n, p in named if p.requires_grad and not n.startswith(frozen))
    config = getattr(posterior.base, "config", None)
    source = getattr(config, "name_or_path", "")
    return {
        "guide": full_name(posterior.options),
        "network": type(posterior.base).__name__ + (f" ({source})" if source else ""),
        "weights of the network": f"{sum(p.numel() for p in posterior.base.parameters()):,}",
        "adapted layers": f"{len(specs)}",
        "rank": ", ".join(map(str, sorted({*ranks.values()}))) or "none",
        "entries of the adapters": f"{entries:,}",
        "trained parameters": f"{trained:,}",
        "latent sites": ", ".join(f"{name} ({size:,})" for name, size in sites.items()),
        "task": posterior.task.name,
        "training examples": f"{posterior.model.num_examples:,}",
        **_by_held_back(posterior),
        "temperature": f"{posterior.temperature:.4g}",
        **{
            name.replace("_", " "): _value(value)
            for name, value in posterior.settings.items()
            if name != "held_back"
        },
    }


def _by_held_back(posterior: Subject) -> dict[str, str]:
    """Return how many examples were held back, and the width of the noise."""
    if not posterior.held_back:
        return {}
    chosen = "the width and the temperature" if chose_width(posterior) else "the temperature"
    return {
        "examples held back": f"{posterior.held_back:,}, for {chosen}",
        "width of the noise": f"{chosen_width(posterior.model):.4g}",
    }


def chose_width(posterior: Subject) -> bool:
    """Return whether examples that were held back chose the width of prior and posterior.

    After an earlier posterior the width is that one's; a short fit ends before the first choice.
    """
    return (
        posterior.held_back > 0
        and posterior.model.program.previous is None
        and has_measured(posterior.model)
    )


def moved_width(posterior: Subject) -> bool:
    """Return whether they moved it by more than 5 %.

    Where nothing is learnt, not even by heart, they do not.
    """
    return chose_width(posterior) and abs(math.log(chosen_width(posterior.model))) > 0.05


def option_facts(guide: Guide) -> dict[str, str]:
    """Return every option of the guide, with those of an inner guide after it."""
    facts = {}
    for field in dataclasses.fields(guide):
        value = getattr(guide, field.name)
        if isinstance(value, Guide):
            facts[field.name] = full_name(value)
            facts |= {f"{field.name}.{n}": shown for n, shown in option_facts(value).items()}
        else:
            facts[field.name] = _value(value)
    return facts


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that made the report."""
    return {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def data_facts(examples: Examples, prediction: Prediction) -> dict[str, str]:
    """Return the number of examples, their length, and whether they are labelled."""
    unit, sizes = examples.lengths()
    facts = {"examples": f"{len(examples):,}"}
    if examples.columns:
        facts["text columns"] = ", ".join(examples.columns)
    if sizes:
        low, middle, high = min(sizes), np.median(sizes), max(sizes)
        facts["length"] = f"{low} to {high} {unit}, median {middle:g}"
    facts["labels"] = "yes" if prediction.targets is not None else "none, hence no metrics"
    return {**facts, **prediction.facts()}


def label_table(examples: Examples, prediction: Prediction) -> pd.DataFrame | None:
    """Return how often each class is the target and how often it is predicted.

    For multiple choice the rows are the places of the choices; of very many classes only the most
    frequent are listed. None for predictions without class probabilities.
    """
    counts = prediction.class_counts()
    if not counts:
        return None
    classes = len(counts["predicted"])
    choosing = len(examples) and bool(examples.choices(0))
    names = [f"choice {k}" if choosing else examples.label(0, k) for k in range(classes)]
    made = pd.DataFrame({"class": names, **{name: n.tolist() for name, n in counts.items()}})
    if len(made) > MOST_CLASSES:
        made = made.sort_values(list(made)[1], ascending=False, kind="stable")[:MOST_CLASSES]
    return made


def _value(value: Any) -> str:
    """Return a value as text; mappings and sequences as JSON."""
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)

"""A fit of the study: its settings, and what depends on its guide alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyrolora
from pyrolora import guides

PEFT = "peft-montec"
# The layers of the first trials: with the feed-forward layers LoRA has more room to overfit.
ADAPTER = pyrolora.AdapterConfig(target_modules=("query", "key", "value", "dense"))
POINTS = ("map", "flat", PEFT, "full")  # one draw is all there is
OWN_RATE = {"full": 1e-4}  # where all weights move, the rate of adapters is far too high
FOLLOWED = "map"  # scored after every epoch: the rival that is stopped in time

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One fit."""

    task: str
    examples: int  # 0: all of them
    guide: str
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 8
    learning_rate: float = 1e-3
    batch: int = 32
    seed: int = 0
    draws: int = 8

    def settings(self, model: str, data: str, dtype: str) -> Row:
        """All that a row depends on, defaults spelled out: equal settings are not run twice."""
        about = dataclasses.asdict(self)
        about["draws"] = 0 if self.guide in POINTS else self.draws
        if self.guide != PEFT:
            about["options"] = describe(guides.from_options(self.guide, self.options))
        about["adapter"] = dataclasses.asdict(ADAPTER)
        return {**about, "model": model, "data": data, "dtype": dtype}


# The defaults until noise became relative to what is learnt, with a width by data.
FORMER: dict[str, Row] = {
    "montec": {
        "sample_scale": 0.3,
        "init_covariance": 0.01,
        "units": "one",
        "prior_mean": "zero",
        "kl_weight": 0.2,
        "scale_updates": "gradient",
    },
    "meanfield": {
        "prior_scale": 0.2,
        "init_scale": 0.02,
        "units": "one",
        "prior_mean": "zero",
        "kl_weight": 0.2,
        "scale_updates": "gradient",
    },
}
FORMER["lowrank"] = FORMER["meanfield"]
FORMER["flat+montec"] = {"inner": FORMER["montec"]}


def describe(guide: guides.Guide) -> Row:
    """A guide's options, an inner guide's below its own, with what None comes to."""
    shallow = {f.name: getattr(guide, f.name) for f in dataclasses.fields(guide)}
    if isinstance(guide, guides.Variational):
        shallow["scale_updates"] = "curvature" if guide.settles else "gradient"
        shallow["hold_back"] = guide.held_back
        if guide.unit is not None:
            shallow["units"] = guide.unit
    return {
        name: describe(value) if isinstance(value, guides.Guide) else value
        for name, value in shallow.items()
    }

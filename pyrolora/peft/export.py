"""The factors of a joint model, written as an adapter of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pyrolora.adapters import FlatFactors, LayerSpec
from pyrolora.model import JointModel
from pyrolora.peft.write import as_uniform, write_adapter


def export_factors(path: Path, joint: JointModel, factors: FlatFactors, *, uniform: bool) -> None:
    """Write one setting of the factors, and the task heads that go with it.

    Parameters
    ----------
    path
        The adapter's folder.
    joint
        The joint model.
    factors
        Factors without a dimension of draws.
    uniform
        Give all layers one rank and the scaling 1 (`as_uniform`).
    """
    heads = {name: head for name, (head,) in joint.named_heads(factors).items()}
    matrices = joint.program.bank.matrices(factors)
    specs: Mapping[str, LayerSpec] = joint.program.bank.specs
    if uniform:
        specs, matrices = as_uniform(specs, matrices)
    write_adapter(path, specs, matrices, heads, joint.base)

"""The check at the end of a fit: its posterior predicts."""

from __future__ import annotations

import torch

from pyrolora import defaults
from pyrolora.data import Prepared, to_device
from pyrolora.errors import NonFiniteError, listed
from pyrolora.guides import Guide, full_name
from pyrolora.model import JointModel, evaluating
from pyrolora.predictive import draw_factors
from pyrolora.predictive.predict import passes

FEW, MANY = 2, 16


@torch.no_grad()
def check_usable(
    joint: JointModel, guide: Guide, data: Prepared, seed: int, *, size: int = FEW
) -> None:
    """Raise `NonFiniteError` for a posterior whose numbers or predictions are not finite.

    So many of its draws run on so many of the training examples: ``MANY`` after a failure, near
    which some draws may overflow and others not. The process's random numbers stay.
    """
    broken = [name for name, tensor in joint.own_tensors() if not tensor.isfinite().all()]
    if broken:
        raise NonFiniteError(_message(guide, f"not finite in {listed(broken)}"))
    factors = draw_factors(joint, size, seed)
    drawn = [factors[number] for number in range(size)]
    if not all(one.A.isfinite().all() and one.B.isfinite().all() for one in drawn):
        raise NonFiniteError(_message(guide, "finite, and the adapters drawn from it are not"))
    examples = [data.examples[i] for i in range(min(size, len(data)))]
    batch = to_device(data.collate(examples), next(joint.parameters()).device)
    with evaluating(joint):
        outputs = torch.cat([*passes(joint, batch, factors, defaults.PREDICT_ROWS)])
    if outputs.isnan().any() or outputs.isposinf().any():
        raise NonFiniteError(_message(guide, "finite, and the network's outputs under it are not"))


def _message(guide: Guide, state: str) -> str:
    return (
        f"the posterior of {full_name(guide)!r} cannot be used: it is {state}. Lower the learning "
        "rate or the guide's scales (of its prior, too), or load the network in float32"
    )

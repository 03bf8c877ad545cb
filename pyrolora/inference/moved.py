"""The check that training has moved every adapter from its start."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor

from pyrolora.errors import listed
from pyrolora.model import JointModel


def starting_factors(joint: JointModel) -> dict[str, Tensor]:
    """Return copies of the factors B that are trained; none where they are constants.

    A shows little: weight decay moves it without a gradient.
    """
    return {
        name: parameter.detach().clone()
        for name, parameter in joint.named_parameters()
        if name.rpartition(".")[2] in ("B_loc", "B_locs") and parameter.requires_grad
    }


def warn_of_unmoved(joint: JointModel, starts: Mapping[str, Tensor], learning_rate: float) -> None:
    """Warn of layers whose B equals that in ``starts`` to the bit: their adapters do nothing."""
    layout = joint.program.bank.layouts["B"]
    still = set(joint.program.bank.specs) if starts else set()
    for name, start in starts.items():
        changed = joint.get_parameter(name).detach().to(start.device) != start
        still -= {layer for layer, moved in layout.matrices(changed).items() if moved.any()}
    if not still:
        return
    names = [name for name in joint.program.bank.specs if name in still]
    reason = (
        "no gradient reached them: what follows them in the network has no backward pass (a layer "
        "quantised for inference, detach(), no_grad()), or the output does not depend on them"
    )
    largest = max(float(start.abs().max()) for start in starts.values())
    if learning_rate <= 1e-8 * largest:  # rounding swallows such steps
        reason = f"the learning rate is {learning_rate:g}"
    warnings.warn(
        f"training has not moved the adapters of {len(names)} of "
        f"{len(joint.program.bank.specs)} layers, {listed(names)}: {reason}",
        UserWarning,
        stacklevel=2,
    )

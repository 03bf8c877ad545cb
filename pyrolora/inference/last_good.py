"""The last good state of a fit: that of the last step at which the objective was a number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyrolora.adapters import eagerly
from pyrolora.columns import Batch
from pyrolora.inference.objective import NotEvaluated, Objective
from pyrolora.model import JointModel, evaluating
from pyrolora.model.state import load_tensors
from pyrolora.seeding import seeded


class LastGood:
    """The posterior's tensors at the last step whose objective and gradient were finite.

    A step that leaves parameters at which nothing is finite is seen at the next one only, when its
    objective is computed: the state before it is kept until then. That costs one copy of what is
    trained; of the rest, such as the iterates of SWAG, a tensor is copied when it has changed.

    Parameters
    ----------
    objective
        The objective, whose joint model is trained.

    Attributes
    ----------
    step
        The number of steps after which the state was kept.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.step = 0
        self._trained = [p for p in objective.joint.parameters() if p.requires_grad]
        self._kept: dict[str, Tensor] = {}
        self._versions: dict[str, tuple[int, int] | None] = {}
        self._statistics: list[tuple[nn.Module, dict[str, Tensor]]] = []
        self._batch: tuple[Batch, float] | None = None

    @property
    def joint(self) -> JointModel:
        """The joint model that is trained."""
        return self.objective.joint

    @torch.no_grad()
    def keep(self, step: int, batch: tuple[Batch, float] | None = None) -> None:
        """Keep the state after ``step`` steps, at which the objective of ``batch`` was finite.

        ``batch`` has the batch and the weight of the KL.
        """
        self.step, self._batch = step, batch
        trained = {parameter.data_ptr() for parameter in self._trained}
        for name, tensor in self.joint.own_tensors():
            # Fused optimisers do not count as changes of a tensor's version.
            version = None if tensor.data_ptr() in trained else (tensor.data_ptr(), tensor._version)
            kept = self._kept.get(name)
            if kept is None or kept.shape != tensor.shape or kept.device != tensor.device:
                self._kept[name] = tensor.detach().clone()
            elif version is None or self._versions[name] != version:
                kept.copy_(tensor)
            self._versions[name] = version
        # Unlike parameters, running statistics change as soon as a batch is read.
        self._statistics = [
            (module, {name: buffer.clone() for name, buffer in module.named_buffers()})
            for module in self.joint.trained_statistics
        ]

    def restore(self, step: int) -> int:
        """Go back to the last good state; return the number of steps after which it was.

        That is the present state, after ``step`` steps, if the objective of the batch before is
        finite at it: then it is the newest batch that is at fault.
        """
        for module, buffers in self._statistics:
            for name, value in buffers.items():
                module.get_buffer(name).copy_(value)
        if self.is_good():
            return step
        load_tensors(self.joint.parts(), self._kept)
        return self.step

    @torch.no_grad()
    def is_good(self) -> bool:
        """Return whether tensors, objective and the mean's log-likelihood are finite.

        They are those of the last batch that was kept, and of the network in evaluation mode.
        """
        if not all(torch.isfinite(tensor).all() for tensor in self._floating()):
            return False
        if self._batch is None:
            return True
        batch, beta = self._batch
        joint = self.joint
        with seeded(0), evaluating(joint), eagerly(joint.base):
            try:
                loss = self.objective(batch, beta)
                output = joint.network(batch, joint.program.mean())
                likelihood = joint.task.log_prob(output, batch)
            except (ValueError, NotEvaluated):
                return False
        return bool(torch.isfinite(loss) & torch.isfinite(likelihood).all())

    def _floating(self) -> Iterator[Any]:
        return (tensor for _, tensor in self.joint.own_tensors() if tensor.is_floating_point())

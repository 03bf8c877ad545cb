"""The joint Pyro model of adapters and targets, and the guide that goes with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyrolora.adapters import Attachment
from pyrolora.columns import Batch
from pyrolora.guides import GaussianHead, HeadLaw, Program, averaged
from pyrolora.model import checkpointing
from pyrolora.model.network import AdaptedNetwork, batch_size, device_of
from pyrolora.model.state import check_tensors, load_tensors, tensors_of
from pyrolora.parameters import param_statement
from pyrolora.tasks import Task


class JointModel(AdaptedNetwork):
    """p(y, θ | x): the program's prior over the adapters, then the task's law of the targets.

    A Pyro model: ``model(batch)`` works under ``SVI``, ``Predictive`` and NUTS.

    Parameters
    ----------
    base, attachment, program, task
        As in `AdaptedNetwork`.
    num_examples
        n: the b examples of a batch are scaled by n / b.

    Attributes
    ----------
    rows
        The number of rows that hold these n examples: the b rows of a batch are scaled by rows / b.
        It differs from n within a fit alone, whose rows may have several texts each.
    """

    rows: float

    def __init__(
        self,
        base: nn.Module,
        attachment: Attachment,
        program: Program,
        task: Task,
        num_examples: int,
    ) -> None:
        super().__init__(base, attachment, program, task)
        self.num_examples = num_examples
        self.rows = num_examples

    def forward(self, batch: Batch, kl_weight: float = 1.0) -> Tensor:
        """Run the model on one batch, a mapping with ``labels``; without them y is sampled.

        ``kl_weight`` scales the prior alone; the default, 1, is the untempered joint density.
        """
        groups = self.program.groups(batch_size(batch))
        with averaged("members", self.program.side_by_side()):
            with torch.autocast(device_of(self).type, enabled=False):
                with averaged("groups", groups):
                    factors = self.program.model(kl_weight)
                for part, module in self._trained().items():
                    for name, parameter in module.named_parameters():
                        param_statement(f"{part}.{name}", parameter)
            # Groups share the rows of the batch out; other draws have all of them each.
            run = self.shared_out if groups > 1 else self.network
            return self.task(run(batch, factors), batch, self.rows)

    def _trained(self) -> dict[str, nn.Module]:
        """Return what is trained beside the program: the heads; without adapters, the network."""
        return {"heads": self.heads} if self.program.bank.specs else {"base": self.base}

    # Checkpointing -----------------------------------------------------------------------------

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Enable activation (gradient) checkpointing in the network (`checkpointing.enable`)."""
        checkpointing.enable(self.base, activation_checkpointing_kwargs, **kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable

    def activation_checkpointing_disable(self) -> None:
        """Switch activation checkpointing of the network off."""
        checkpointing.disable(self.base)

    # State -------------------------------------------------------------------------------------

    @torch.no_grad()
    def adopt(self, other: JointModel, member: int | None = None) -> None:
        """Take the means, the task heads and the task's parameters of ``other``.

        With ``member`` they are taken as that member's: its heads alone.
        """
        self.heads.adopt(other.heads, member)
        if member is None:
            self.program.adopt(other.program)
            self.task.load_state_dict(other.task.state_dict())

    def widen_head(self) -> None:
        """Give the last layer of the task head a Gaussian law, whose curvature is zero at first."""
        wider = GaussianHead(self.program, HeadLaw(self.heads.last_entries()))
        self.program = wider.train(self.program.training)
        self.align()

    def align(self) -> None:
        """Move all parts to the network's device: a later fit may have moved the network."""
        device = next(self.base.parameters()).device
        for part in (self.program, self.heads, self.task):
            part.to(device)

    def freeze(self) -> None:
        """Make constants of the means and the heads, so that their spread is left to infer."""
        self.program.bank.requires_grad_(False)
        self.heads.requires_grad_(False)

    def own_state(self) -> dict[str, Tensor]:
        """Return copies of all tensors that belong to the posterior: adapters, heads, task.

        The network's weights are among them where they are what was trained.
        """
        return {name: tensor.detach().clone() for name, tensor in self.own_tensors()}

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the tensors of `own_state` themselves."""
        return tensors_of(self.parts())

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the tensors of `own_state`; each has to be there, in its shape."""
        load_tensors(self.parts(), state)

    def check_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise `CheckpointError` unless ``state`` is one for `load_own_state`, values apart."""
        check_tensors(self.parts(), state)

    def parts(self) -> dict[str, nn.Module]:
        """Return the parts with the posterior's tensors."""
        own_base, program = not self.program.bank.specs, self.program
        parts = {"base": self.base, "program": program, "task": self.task, "heads": self.heads}
        if isinstance(program, GaussianHead):
            parts |= {"program": program.inner, "head_law": program.law}
        return {name: part for name, part in parts.items() if own_base or name != "base"}


class JointGuide(nn.Module):
    """q(θ): the guide of the program, with the signature of the model.

    It looks at the size of a batch alone, and while training alone.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, batch: Batch | None = None, kl_weight: float = 1.0) -> None:
        """Sample the latent sites."""
        groups = 1 if batch is None else self.program.groups(batch_size(batch))
        with (
            torch.autocast(device_of(self).type, enabled=False),
            averaged("members", self.program.side_by_side()),
            averaged("groups", groups),
        ):
            self.program.guide(kl_weight)

"""First passes of the data through the joint model: checks, gradients, outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from pyrolora.columns import PLACES, Batch
from pyrolora.data import Prepared, to_device
from pyrolora.errors import NonFiniteError, listed
from pyrolora.inference import weight_gradients
from pyrolora.inference.reading import check_reading, explained_pass
from pyrolora.model import JointModel, evaluating


@torch.no_grad()
def check_first_pass(joint: JointModel, data: Prepared, *, untrained: bool = False) -> None:
    """Raise an error unless the network runs on two examples and fits their labels.

    Its adapted layers have to be called, its outputs finite, and with ``untrained`` it has to be
    trainable from where it starts.
    """
    assert data.labels is not None
    examples = [data.examples[i] for i in range(min(2, len(data)))]
    batch = to_device(data.collate(examples), next(joint.parameters()).device)
    batch.pop(PLACES, None)  # the checks are of all logits
    with evaluating(joint):
        with explained_pass(joint.base, batch):
            output = joint.network(batch, joint.program.mean())
        joint.task.check_output(output, data.labels)
        _check_finite(joint, batch, output)
        check_reading(joint, batch, output)
        if untrained:
            joint.task.check_start(output, data.labels)


def _check_finite(joint: JointModel, batch: Batch, output: Tensor) -> None:
    """Raise `NonFiniteError` where no step can be made, since the loss is not finite to begin with.

    Infinite logits are fine, as of words that a network never writes.
    """
    if not output.isnan().any() and joint.task.log_prob(output, batch).isfinite().all():
        return
    broken = [name for name, tensor in joint.named_parameters() if not tensor.isfinite().all()]
    if broken:
        cause = f"NaN or infinity is in its weights {listed(broken)}; load or make it anew"
    else:
        cause = (
            f"its weights are finite, and its outputs for these have up to "
            f"{float(output.abs().nan_to_num(nan=torch.inf).max()):.3g}; load it in float32, or "
            "look for extreme inputs and labels"
        )
    raise NonFiniteError(
        f"the loss of this {type(joint.base).__name__} is not finite for the first examples, "
        f"before any step: {cause}"
    )


def weight_gradients_of(
    joint: JointModel,
    data: Prepared,
    args: TrainingArguments,
    read: Callable[[str, Tensor], Any],
) -> dict[str, Any]:
    """Read the gradient of each adapted layer's weight on one batch, which the seed chooses."""
    check_first_pass(joint, data)
    joint.to(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(data), generator=generator)[: args.per_device_train_batch_size]
    (batch,) = data.loader(len(order), order.tolist())
    return weight_gradients(joint, to_device(batch, args.device), read)


@torch.no_grad()
def mean_outputs(joint: JointModel, data: Prepared, args: TrainingArguments) -> Tensor:
    """Return the outputs of the mean adapter for all training examples."""
    joint.to(args.device)
    with evaluating(joint):
        outputs = [
            joint.network(to_device(batch, args.device), joint.program.bank.means())
            for batch in data.loader(args.per_device_train_batch_size)
        ]
    return torch.cat(outputs).cpu()

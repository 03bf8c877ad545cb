"""Assembly of a joint model."""

from __future__ import annotations

from torch import nn

from pyrolora.adapters import AdapterBank, AdapterConfig, Attachment, Start
from pyrolora.guides import Guide
from pyrolora.model.joint import JointModel
from pyrolora.tasks import Task


def build(
    network: nn.Module,
    attachment: Attachment,
    config: AdapterConfig,
    guide: Guide,
    task: Task,
    num_examples: int,
    start: Start | None = None,
) -> JointModel:
    """Return the joint model of a network with wrapped layers, in evaluation mode, on its device.

    Parameters
    ----------
    network
        The network.
    attachment
        The wrappers of its layers and heads.
    config
        The adapter configuration.
    guide
        The method, whose program is built over the bank of means.
    task
        The distribution of the targets.
    num_examples
        The number of training examples.
    start
        Layer -> (A₀, B₀), where ``config`` asks for a start that is not random.
    """
    bank = AdapterBank(attachment.specs, config, start)
    joint = JointModel(network, attachment, guide.build(bank), task, num_examples)
    joint.align()
    return joint.eval()

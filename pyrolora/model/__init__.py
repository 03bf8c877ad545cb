"""The joint Pyro model of a network, a guide's program and a task; its state; how it is built."""

from pyrolora.model.build import build
from pyrolora.model.joint import JointGuide, JointModel
from pyrolora.model.mixed import Mixture, Share, mixed_pass
from pyrolora.model.modes import evaluating
from pyrolora.model.network import NOT_CALLED, device_of

__all__ = [
    "NOT_CALLED",
    "JointGuide",
    "JointModel",
    "Mixture",
    "Share",
    "build",
    "device_of",
    "evaluating",
    "mixed_pass",
]

"""The demonstration: a task made of installed documentation, and an experiment on it."""

from pyrolora.demo.experiment import GUIDES, Contestant, machine, picture, run_guide
from pyrolora.demo.sentences import LIBRARIES, UNSEEN, sentences

__all__ = [
    "GUIDES",
    "LIBRARIES",
    "UNSEEN",
    "Contestant",
    "machine",
    "picture",
    "run_guide",
    "sentences",
]

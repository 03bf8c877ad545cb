"""The description of a posterior that is saved, entry by entry."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pyrolora.guides import Guide, full_name
from pyrolora.model import JointModel

logger = logging.getLogger(__name__)


def describe(
    joint: JointModel,
    guide: Guide,
    *,
    identity: Mapping[str, Any],
    settings: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    temperature: float,
) -> dict[str, Any]:
    """Return what ``posterior.json`` says of a posterior; `Description` has the types.

    A log says so where the network has no name to come back from.
    """
    if identity["config"] and not identity["name_or_path"]:
        logger.warning(
            "the network of this posterior, a %s, has no hub id or folder to come back from: "
            "keep it with posterior.base.save_pretrained(folder), and load the posterior "
            "with pyrolora.load(path, folder)",
            identity["class"],
        )
    bank, previous, names = joint.program.bank, joint.program.previous, joint.task.class_names
    return {
        "guide": _options(guide),
        "prior": None if previous is None else _options(previous.options),
        "task": joint.task.name,
        "classes": None if names is None else list(names),
        "texts": None if joint.task.texts is None else dataclasses.asdict(joint.task.texts),
        "adapter": dataclasses.asdict(bank.config),
        "layers": [dataclasses.asdict(spec) for spec in bank.specs.values()],
        "heads": list(joint.attachment.heads),
        "base": identity,
        "num_examples": joint.num_examples,
        "settings": settings,
        "history": history,
        "temperature": temperature,
    }


def _options(guide: Guide) -> dict[str, Any]:
    return {"name": full_name(guide), "options": dataclasses.asdict(guide)}

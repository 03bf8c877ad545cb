"""The part of a task that data depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pyrolora.data.chats.text_options import TextOptions


class Target(Protocol):
    """A kind of target, as `pyrolora.tasks.Task` defines it."""

    collator: ClassVar[Any]
    discrete: ClassVar[bool]
    names_classes: ClassVar[bool]
    class_names: Sequence[str] | None
    texts: TextOptions | None

    def check_labels(self, labels: Tensor, network: nn.Module) -> None:
        """Raise `DataError` for labels that the task cannot score."""

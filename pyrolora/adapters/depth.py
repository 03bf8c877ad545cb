"""Which blocks of a stack get adapters: ``layers_to_transform``, checked."""

from __future__ import annotations

from collections.abc import Sequence

from pyrolora.adapters.config import AdapterConfig
from pyrolora.adapters.names import block_of
from pyrolora.errors import TargetError, listed


def in_blocks(names: Sequence[str], config: AdapterConfig) -> list[str]:
    """Return the names in the blocks of ``layers_to_transform``; all of them without it.

    `names.block_of` says which block a name is in.

    Raises
    ------
    TargetError
        For a number that no name has.
    """
    wanted = config.layers_to_transform
    if wanted is None or not names:
        return [*names]
    assert not isinstance(wanted, int)  # `AdapterConfig` makes a list of it
    numbers = {name: block_of(name, config.layers_pattern) for name in names}
    present = {number for number in numbers.values() if number is not None}
    missing = [number for number in wanted if number not in present]
    if missing:
        where = f" behind {config.layers_pattern!r}" if config.layers_pattern else ""
        raise TargetError(
            f"layers_to_transform names {listed([*map(str, missing)])}, and the layers that "
            f"target_modules={config.target_modules!r} selects have {_span(present)}{where}; they "
            "are counted from 0"
        )
    return [name for name in names if numbers[name] in wanted]


def _span(numbers: set[int]) -> str:
    return f"the numbers {listed([str(n) for n in sorted(numbers)])}" if numbers else "no number"

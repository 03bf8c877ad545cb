"""Inputs with several pieces per row, such as the pictures of a text, in batches and for networks.

transformers' networks take the pieces of all rows one after the other: the pictures of LLaVA,
(pictures, C, H, W), or the patches of Qwen2-VL, (patches, features). A batch has rows first, so
that it can be cut and repeated: (b, m, ...), with zeros where a row has fewer than m pieces, and
beside it a column with the number of pieces per row, (b,).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyrolora.data.examples import as_numbers
from pyrolora.errors import DataError

COUNT = "_pieces"
"""The end of the name of a column with numbers of pieces."""
PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "global_attention_mask")
"""Inputs that have a value for every token."""
GRIDS = {"image_grid_thw": "pixel_values", "video_grid_thw": "pixel_values_videos"}
"""Columns with the sizes of a row's pictures, beside those with their patches."""


def counts_of(names: Iterable[str]) -> set[str]:
    """Return the names of the columns with the numbers of pieces of these inputs."""
    return {f"{name}{COUNT}" for name in names}


def joined(name: str, rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return rows of pieces, (m_i, ...) each, as a column (b, m, ...) and their numbers (b,).

    Pieces of different sizes are filled up with zeros, as transformers' processors do.
    """
    sizes = [max(row.shape[d] for row in rows) for d in range(rows[0].dim())]
    whole = rows[0].new_zeros(len(rows), *sizes)
    for place, row in zip(whole, rows, strict=True):
        place[tuple(slice(size) for size in row.shape)] = row
    return {name: whole, f"{name}{COUNT}": torch.tensor([len(row) for row in rows])}


def for_network(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs with the pieces of all rows one after the other, as a network takes them."""
    counts = {name: n for name, n in inputs.items() if f"{name}{COUNT}" in inputs}
    made = {n: v for n, v in inputs.items() if n.removesuffix(COUNT) not in counts or n in counts}
    for name in counts:
        rows, numbers = inputs[name], inputs[f"{name}{COUNT}"]
        places = torch.arange(rows.shape[1], device=rows.device)
        made[name] = rows[places < numbers[:, None]]
    return made


def picture_token(network: nn.Module) -> int | None:
    """Return the token in whose places a network reads a picture; None without one."""
    config = getattr(network, "config", None)
    names = ("image_token_id", "image_token_index")
    return next((n for n in (getattr(config, name, None) for name in names) if n is not None), None)


def per_prompt(
    columns: Mapping[str, Tensor], prompts: Sequence[Tensor], token: int | None
) -> dict[str, list[Tensor]]:
    """Return the pieces of each prompt, of columns that have a row per prompt or per piece.

    Pieces are divided as the tokens of pictures are: each patch, or each picture of a network that
    gives all the same tokens, has as many of them.

    Raises
    ------
    DataError
        For pieces that do not divide so.
    """
    grids = {name for name in GRIDS if name in columns}
    made = {}
    for name, column in columns.items():
        if len(prompts) == 1:
            made[name] = [column]
        elif len(column) == len(prompts) and not grids:
            made[name] = [*column.split(1)]
        elif name not in grids:
            made[name] = [*column.split(_shares(name, len(column), prompts, token))]
    for name in grids - {*made}:
        sizes = torch.tensor([len(rows) for rows in made.get(GRIDS[name], [])]).cumsum(0)
        ends = columns[name].prod(-1).cumsum(0)
        counts = torch.searchsorted(ends, sizes, right=True).diff(prepend=torch.zeros(1).long())
        made[name] = [*columns[name].split(counts.tolist())]
    return made


def _shares(name: str, pieces: int, prompts: Sequence[Tensor], token: int | None) -> list[int]:
    """Return how many pieces each prompt has, by its tokens of pictures."""
    counts = [0 if token is None else int((ids == token).sum()) for ids in prompts]
    total = sum(counts)
    if total == 0 or any(count * pieces % total for count in counts):
        raise DataError(
            f"{name!r} has {pieces} rows for {len(prompts)} prompts, with {counts} tokens of "
            "pictures, and it cannot be told which rows are whose"
        )
    return [count * pieces // total for count in counts]


def take_pieces(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Take the patches of pictures out of rows, with their sizes, and return their columns."""
    made: dict[str, Tensor] = {}
    for pair in GRIDS.items():
        if not all(name in rows[0] and f"{name}{COUNT}" not in rows[0] for name in pair):
            continue
        for name in pair:
            made |= joined(name, [as_numbers(row.pop(name)) for row in rows])
    return made

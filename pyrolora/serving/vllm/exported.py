"""A folder with the draws of a posterior as adapters for vLLM, described by ``vllm.json``.

The description has a digest of itself and of every file, as that of a saved posterior has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pyrolora.data.media.media import tokenizer_of
from pyrolora.errors import CheckpointError
from pyrolora.files import read_bytes, read_strict_json
from pyrolora.peft.config import CONFIG_FILE, WEIGHTS_FILE
from pyrolora.storage.description import DIGEST, TOKENIZER_NAME, digest_of
from pyrolora.storage.schema import choice, count, items, mapping, number, optional, record, text
from pyrolora.storage.tokenizer_files import read_tokenizer
from pyrolora.tasks import CausalLM

FILE = "vllm.json"
FORMAT = "pyrolora-vllm"
FORMAT_VERSION = 1
MOST_BYTES = 2**34
"""The largest file of an adapter that is read."""
ADAPTER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}"
SHA = r"[0-9a-f]{64}"

_SCORES = items(number(-1e6, 1e-3))
_ADAPTER = record(
    {
        "name": text(ADAPTER_NAME),
        "draw": count(0),
        "sha256": text(SHA),
        "probe_scores": _SCORES,
    }
)
_CHECK = record(
    {
        "format": choice(FORMAT),
        "format_version": choice(FORMAT_VERSION),
        "versions": mapping(text()),
        "task": choice(CausalLM.name),
        "base": record({"class": text(), "name_or_path": optional(text())}),
        "vocabulary": count(1),
        "context": optional(count(1)),
        "ends": items(count(0)),
        "temperature": number(1e-6, 1e6),
        "rank": count(1),
        "targets": items(text(r"[A-Za-z0-9_]{1,200}")),
        "tokenizer": text(TOKENIZER_NAME),
        "tokenizer_files": mapping(text(SHA), 1),
        "probe": items(count(0)),
        "probe_scores": _SCORES,
        "adapters": items(_ADAPTER),
        DIGEST: text(SHA),
    }
)


@dataclass(frozen=True)
class Adapter:
    """A draw as a plain LoRA adapter.

    Attributes
    ----------
    name
        The name in vLLM, which is that of its folder; a digest of the adapter is part of it.
    draw
        The number of the draw.
    sha256
        Of its files.
    probe_scores
        log p of the tokens of the probe after the first, under this draw, in nats.
    """

    name: str
    draw: int
    sha256: str
    probe_scores: list[float]


@dataclass(frozen=True)
class Exported:
    """An exported posterior, with what is needed to ask vLLM for its answers.

    Attributes
    ----------
    path
        The folder.
    adapters
        The draws.
    base
        The class of the network, and where it was loaded from.
    vocabulary
        The number of tokens that the network scores.
    context
        The most tokens that it reads; None: any number.
    ends
        The ids that end a text.
    temperature
        T of the posterior.
    rank
        The rank of every layer of every adapter.
    targets
        The last parts of the names of adapted layers.
    probe, probe_scores
        Token ids, and log p of those after the first under the network without an adapter.
    tokenizer
        The tokenizer.
    """

    path: Path
    adapters: list[Adapter]
    base: Mapping[str, str | None]
    vocabulary: int
    context: int | None
    ends: frozenset[int]
    temperature: float
    rank: int
    targets: list[str]
    probe: list[int]
    probe_scores: list[float]
    tokenizer: Any

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def context_length(self) -> float:
        """The most tokens that network and tokenizer take."""
        length = getattr(tokenizer_of(self.tokenizer), "model_max_length", float("inf"))
        return min(length, self.context or float("inf"))

    def numbered(self, draws: Sequence[int]) -> list[Adapter]:
        """Return the adapters of the draws with these numbers."""
        by_number = {adapter.draw: adapter for adapter in self.adapters}
        return [by_number[draw] for draw in draws]


def read_exported(path: Path) -> Exported:
    """Read an exported posterior; its adapters have to be those that were written.

    Raises
    ------
    CheckpointError
        When the folder is incomplete, edited, or of another program or version.
    """
    file = path / FILE
    if not file.is_file():
        raise CheckpointError(
            f"{path} is no posterior for vLLM: it has no {FILE}; pass a folder that "
            "'pyrolora export --to vllm' wrote"
        )
    meta = read_strict_json(file)
    _CHECK(FILE, meta)
    if digest_of(meta) != meta[DIGEST]:
        raise CheckpointError(f"{file} was changed since it was written; restore it from a copy")
    adapters = [Adapter(**entry) for entry in meta["adapters"]]
    _check_adapters(path, adapters, len(meta["probe"]) - 1)
    if not len(meta["probe_scores"]) == len(meta["probe"]) - 1 > 0:
        raise CheckpointError(f"{file} has no score per token of its probe; export it anew")
    return Exported(
        path=path,
        adapters=adapters,
        ends=frozenset(meta["ends"]),
        tokenizer=read_tokenizer(path / meta["tokenizer"], meta["tokenizer_files"]),
        **{
            name: meta[name]
            for name in (
                *("base", "vocabulary", "context", "temperature", "rank"),
                *("targets", "probe", "probe_scores"),
            )
        },
    )


def _check_adapters(path: Path, adapters: Sequence[Adapter], scored: int) -> None:
    for what in ("name", "draw"):
        values = [getattr(adapter, what) for adapter in adapters]
        if not values or len({*values}) < len(values):
            raise CheckpointError(
                f"{path / FILE} needs at least one adapter, each with a {what} of its own, got "
                f"{values}; export it anew"
            )
    for adapter in adapters:
        if len(adapter.probe_scores) != scored:
            raise CheckpointError(
                f"{path / FILE}: {adapter.name} has {len(adapter.probe_scores)} scores of the "
                f"probe, which has {scored}; export it anew"
            )
        if adapter_digest(path / adapter.name) != adapter.sha256:
            raise CheckpointError(
                f"the adapter in {path / adapter.name} is not the one that was written; restore "
                "it from a copy"
            )


def adapter_digest(folder: Path) -> str:
    """Return the SHA-256 of an adapter's tensors and configuration."""
    digest = hashlib.sha256()
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        content = read_bytes(folder / name, MOST_BYTES)
        digest.update(f"{name}\0{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()

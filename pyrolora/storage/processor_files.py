"""Processors of pictures and sounds among a posterior's files, of transformers' own classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    FeatureExtractionMixin,
    ImageProcessingMixin,
    ProcessorMixin,
)
from transformers.models.auto.feature_extraction_auto import feature_extractor_class_from_name
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
from transformers.models.auto.processing_auto import processor_class_from_name

from pyrolora.errors import CheckpointError
from pyrolora.files import read_strict_json, shown

PROCESSOR = "processor_config.json"
PART = "preprocessor_config.json"


@dataclass(frozen=True)
class Kind:
    """A kind of processor: its file, the entry that names its class, and how it is loaded."""

    file: str
    entry: str
    find: Callable[[str], Any]
    base: type
    auto: Any


KINDS = (
    Kind(PROCESSOR, "processor_class", processor_class_from_name, ProcessorMixin, AutoProcessor),
    Kind(
        PART,
        "image_processor_type",
        get_image_processor_class_from_name,
        ImageProcessingMixin,
        AutoImageProcessor,
    ),
    Kind(
        PART,
        "feature_extractor_type",
        feature_extractor_class_from_name,
        FeatureExtractionMixin,
        AutoFeatureExtractor,
    ),
)


def auto_class(folder: Path, *, trust_remote_code: bool) -> Any:
    """Return transformers' Auto class for the processor in a folder; None without one.

    Raises
    ------
    CheckpointError
        For a class that is none of transformers' processors, and a configuration that asks for
        other code or files.
    """
    for kind in KINDS:
        config = _config(folder / kind.file)
        if config is None or (kind.file == PART and kind.entry not in config):
            continue
        if trust_remote_code and "auto_map" in config:
            return kind.auto
        for path, value in _elsewhere(config):
            raise CheckpointError(
                f"{folder / kind.file} asks for other code or files, by {path}={shown(value)}; a "
                "processor is read from its own folder alone. If you trust whoever wrote it, pass "
                "pyrolora.load(path, trust_remote_code=True)"
            )
        name = config.get(kind.entry)
        found = kind.find(name) if isinstance(name, str) else None
        if not (isinstance(found, type) and issubclass(found, kind.base)):
            raise CheckpointError(
                f"{folder / kind.file} names the class {shown(name)}, which is no processor of "
                "transformers'"
            )
        return kind.auto
    return None


def _config(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    config = read_strict_json(file)
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is no configuration of a processor; restore it from a copy")
    return config


def _elsewhere(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries by which transformers would read code or files from elsewhere."""
    for name, value in config.items():
        outside = name in ("auto_map", "audio_tokenizer") or name.endswith(
            ("_file", "_files", "name_or_path")
        )
        if outside and value:
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _elsewhere(value, f"{prefix}{name}.")

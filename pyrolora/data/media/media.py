"""Pictures and sounds: their columns, and the inputs that a processor makes of them per batch."""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from transformers import FeatureExtractionMixin, ImageProcessingMixin

from pyrolora.columns import PICTURE_PATHS, PICTURES, SOUND_PATHS, SOUNDS
from pyrolora.data.examples import as_dict, is_plain
from pyrolora.data.media.pictures import as_picture, checked_array
from pyrolora.data.media.sounds import Sound, as_sound, length_matters, warn_cut, warn_padded
from pyrolora.errors import DataError


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor: its own part, or itself; None where it reads no text."""
    if isinstance(processor, ImageProcessingMixin | FeatureExtractionMixin):
        return None
    return getattr(processor, "tokenizer", processor)


def media_of(network: nn.Module, processor: Any, taken: set[str]) -> Media | None:
    """Return the reader of pictures or sounds, where these are a network's main input."""
    name = getattr(network, "main_input_name", None)
    kind = next((kind for kind in KINDS if name in kind.inputs), None)
    return None if kind is None else kind(network, processor, taken)


class Media(ABC):
    """Pictures or sounds, of which a processor of transformers makes the inputs of a network.

    It does so batch by batch: the data hold what the user gave, and pixels are not stored.
    """

    column: ClassVar[str]
    """The column that holds them once it is chosen."""
    names: ClassVar[tuple[str, ...]]
    """The names of columns in which they are looked for, beside their own feature."""
    paths: ClassVar[tuple[str, ...]]
    """The names of columns that hold their paths."""
    inputs: ClassVar[tuple[str, ...]]
    """The inputs of networks that read them."""
    feature: ClassVar[Any]
    """Their feature in a ``datasets.Dataset``."""
    part: ClassVar[str]
    """The name of their part in a processor of several inputs."""
    reads: ClassVar[type]
    """The class of their processors."""
    auto: ClassVar[str]
    """transformers' Auto class that loads their processor."""
    heads: ClassVar[str]
    """The name of their classifiers in transformers' lists."""
    auto_model: ClassVar[str]
    """transformers' Auto class that loads a classifier of them."""

    def __init__(self, network: nn.Module, processor: Any, taken: set[str]) -> None:
        self.config = getattr(network, "config", None)
        self.reader, self.taken = type(network).__name__, taken
        whole = isinstance(processor, self.reads)
        self.decoder: Any = self.feature()
        self.processor: Any = processor if whole else getattr(processor, self.part, None)
        self.passed = None if processor is None else type(processor).__name__

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of an example in which pictures or sounds are looked for."""
        return (self.column, *self.names, *self.paths)

    @classmethod
    def raw_in(cls, examples: Any) -> bool:
        """Return whether examples have pictures or sounds themselves, not tensors of them."""
        if is_plain(examples):
            return cls.column_of(examples) is not None
        row = examples[0] if len(examples) else {}
        if not isinstance(row, Mapping | tuple):
            return False
        names = (cls.column, *cls.names, *cls.paths)
        return any(name in as_dict(row, cls.inputs[0]) for name in names)

    @classmethod
    def column_of(cls, data: datasets.Dataset) -> str | None:
        """Return the column with the pictures or sounds, if there is one.

        Raises
        ------
        DataError
            For several such columns.
        """
        features = data.features
        groups = (
            [name for name, feature in features.items() if isinstance(feature, cls.feature)],
            [name for name in cls.names if name in features],
            [name for name in cls.paths if isinstance(features.get(name), datasets.Value)],
        )
        found = next((group for group in groups if group), [])
        if len(found) > 1:
            raise DataError(
                f"cannot tell which of the columns {found} is the input; drop the others with "
                f"data.remove_columns(...), or rename it to {cls.column!r}"
            )
        return next(iter(found), None)

    def select(self, data: datasets.Dataset) -> tuple[datasets.Dataset, tuple[str, ...]]:
        """Return the data with the pictures or sounds under one name, and the columns read.

        Raises
        ------
        DataError
            For missing values, and files that do not exist.
        """
        name = self.column_of(data)
        if name is None:
            return data, ()
        check_whole(data, name)
        self._check_processor(name)
        chosen = self.cast(data, name)
        if name != self.column:
            chosen = chosen.remove_columns([n for n in chosen.column_names if n == self.column])
            chosen = chosen.rename_column(name, self.column)
        beside = [n for n in data.column_names if n in self.paths or n.endswith("_path")]
        return chosen, (name, *beside)

    def cast(self, data: datasets.Dataset, name: str) -> datasets.Dataset:
        """Return the data with this column as paths and bytes, if it has such.

        They are decoded batch by batch, by the column's own feature.
        """
        feature = data.features[name]
        files = isinstance(feature, datasets.Value) or (
            isinstance(feature, dict) and {*feature} <= {"bytes", "path"}
        )
        if isinstance(feature, datasets.Value) and feature.dtype not in _FILES:
            raise DataError(
                f"the column {name!r} holds {feature.dtype}, and must hold {self.column}s: their "
                "paths, their bytes, or what datasets makes of them; rename it if it is none"
            )
        if isinstance(feature, self.feature):
            self.decoder = replace(feature, decode=True)
        elif not files:
            return data
        return data.cast_column(name, self.feature(decode=False))

    def of_row(self, row: Mapping[str, Any]) -> Any:
        """Return the picture or sound of an example; None where it has another input.

        Raises
        ------
        DataError
            For one that is missing.
        """
        named = [name for name in self.columns if name in row]
        if not named or any(name in row for name in self.inputs):
            return None
        value = next((row[name] for name in named if row[name] is not None), None)
        if value is None:
            raise DataError(f"an example has no {named[0]!r}; leave it out")
        return value

    @abstractmethod
    def batch(self, values: Sequence[Any]) -> dict[str, Tensor]:
        """Return the network's inputs of these pictures or sounds, as the processor makes them."""

    def _check_processor(self, name: str) -> None:
        if self.processor is None:
            raise DataError(
                f"the column {name!r} needs a processor that makes "
                f"{' or '.join(sorted({*self.inputs} & self.taken))} of it, got "
                f"{self.passed}; pass tokenizer={self.auto}.from_pretrained(...), or the tensors "
                "themselves"
            )

    def _kept(self, made: Mapping[str, Any]) -> dict[str, Tensor]:
        kept = {n: torch.as_tensor(v) for n, v in made.items() if n in self.taken}
        if not kept:
            raise DataError(
                f"{type(self.processor).__name__} makes {sorted(made)}, and the "
                f"{self.reader} takes {sorted(self.taken)}; pass the network's own "
                "processor"
            )
        return kept


_FILES = ("string", "large_string", "binary", "large_binary")


class Pictures(Media):
    """Pictures: of PIL, in files, in bytes, or as arrays."""

    column = "image"
    names: ClassVar[tuple[str, ...]] = PICTURES
    paths = PICTURE_PATHS
    inputs = ("pixel_values",)
    feature = datasets.Image
    part = "image_processor"
    reads = ImageProcessingMixin
    auto = "AutoImageProcessor"
    heads = "IMAGE_CLASSIFICATION"
    auto_model = "AutoModelForImageClassification"

    def batch(self, values: Sequence[Any]) -> dict[str, Tensor]:
        self._check_processor(self.column)
        channels = getattr(self.config, "num_channels", 3)
        rescales = getattr(self.processor, "do_rescale", False)
        pictures = [as_picture(value, channels, self.decoder) for value in values]
        for picture in pictures:
            checked_array(picture, channels, rescales=bool(rescales))
        try:
            made = self.processor(images=pictures, return_tensors="pt")
        except (ValueError, TypeError, RuntimeError) as error:
            raise DataError(
                f"{type(self.processor).__name__} cannot make one batch of these pictures: "
                f"{str(error)[:300]}; give all the same form, and the processor a size to resize to"
            ) from error
        return self._kept(made)


class Sounds(Media):
    """Sounds: arrays with their sampling rate, files or bytes.

    Files, bytes, and sounds that datasets decodes are resampled by it to the rate of the feature
    extractor; an array of another rate is an error.
    """

    column = "audio"
    names = SOUNDS
    paths = SOUND_PATHS
    inputs = ("input_values", "input_features")
    feature = datasets.Audio
    part = "feature_extractor"
    reads = FeatureExtractionMixin
    auto = "AutoFeatureExtractor"
    heads = "AUDIO_CLASSIFICATION"
    auto_model = "AutoModelForAudioClassification"

    def __init__(self, network: nn.Module, processor: Any, taken: set[str]) -> None:
        super().__init__(network, processor, taken)
        self.warned: set[str] = set()
        call = inspect.signature(self.processor.__call__).parameters if self.processor else {}
        padding = call.get("padding")
        # Whisper's and AST's pad to the length that the network reads, whatever the batch.
        self.options = {"padding": True} if padding and padding.default is False else {}

    def batch(self, values: Sequence[Any]) -> dict[str, Tensor]:
        self._check_processor(self.column)
        rate = int(self.processor.sampling_rate)
        decoder = replace(self.decoder, sampling_rate=rate)
        sounds: list[Sound] = [as_sound(value, rate, decoder) for value in values]
        try:
            made = self._kept(
                self.processor(sounds, sampling_rate=rate, return_tensors="pt", **self.options)
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise DataError(
                f"{type(self.processor).__name__} cannot make one batch of sounds of "
                f"{[len(sound) for sound in sounds]} samples: {str(error)[:300]}; leave out those "
                "that are too short"
            ) from error
        sizes = [len(sound) for sound in sounds]
        warn_cut(self.processor, sizes, self.warned)
        if self.options and len({*sizes}) > 1 and length_matters(self.config, made):
            warn_padded(self.processor, self.warned)
        return made


KINDS: tuple[type[Media], ...] = (Pictures, Sounds)


def check_whole(data: datasets.Dataset, name: str) -> None:
    """Raise `DataError` for missing values of a column, and for paths without a file."""
    stored = data.with_format("arrow")
    column = stored[:][name] if len(data) else None
    if column is None:
        return
    missing = np.flatnonzero(pc.is_null(column).to_numpy(zero_copy_only=False)).tolist()
    if missing:
        raise DataError(
            f"{len(missing)} examples have no {name!r}, such as example "
            f"{', '.join(map(str, missing[:5]))}; leave them out"
        )
    for i, path in enumerate(_paths(column)):
        if path is not None and "://" not in path and not os.path.exists(path):
            raise DataError(
                f"the {name!r} of example {i} is the file {path!r}, which does not exist (seen "
                f"from {os.getcwd()}); give its whole path"
            )


def _paths(column: Any) -> list[str | None]:
    """Return the path of each value that has no bytes of its own."""
    kind = column.type
    if str(kind) in ("string", "large_string"):
        return [*column.to_pylist()]
    if not hasattr(kind, "fields") or {f.name for f in kind.fields} != {"bytes", "path"}:
        return []
    column = column.combine_chunks()
    empty = pc.is_null(pc.struct_field(column, "bytes")).to_pylist()
    paths = pc.struct_field(column, "path").to_pylist()
    return [path if alone else None for path, alone in zip(paths, empty, strict=True)]

"""Sounds as feature extractors of transformers take them: one channel, at their sampling rate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from pyrolora.data.padding import MASK
from pyrolora.errors import DataError

Sound = np.ndarray
"""(T,), real numbers in -1..1."""


def as_sound(value: Any, rate: int, decoder: datasets.Audio) -> Sound:
    """Return the samples of a sound at this sampling rate, (T,).

    ``value`` is {"array": ..., "sampling_rate": ...}, what datasets decodes to, or a path or bytes
    for the decoder.

    Raises
    ------
    DataError
        For another rate, several channels, whole numbers, no sample, and a rate that is unknown.
    """
    value = _decoded(value, decoder)
    try:
        array, own = np.asarray(value["array"]), int(value["sampling_rate"])
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            "a sound is {'array': numbers, 'sampling_rate': Hz}, or a column of datasets.Audio, "
            f"got {_form(value)}; without its rate it cannot be told how fast it is"
        ) from error
    if own != rate:
        raise DataError(
            f"a sound has {own} samples per second, and the network was trained on {rate}; "
            "resample it, as data.cast_column('audio', datasets.Audio(sampling_rate="
            f"{rate})) does for files"
        )
    if array.ndim != 1 or not len(array):
        raise DataError(
            f"a sound has shape {array.shape}, and a network reads one channel of at least one "
            "sample, (T,); average its channels, or leave it out"
        )
    if array.dtype.kind != "f":
        raise DataError(
            f"a sound is of {array.dtype}, and its samples are real numbers in -1..1; divide "
            "16-bit samples by 32768"
        )
    return array.astype(np.float32)


def _decoded(value: Any, decoder: datasets.Audio) -> Any:
    """Return what datasets makes of a path or of bytes; other values as they are."""
    if isinstance(value, str | bytes):
        value = {"path": None, "bytes": None, "path" if isinstance(value, str) else "bytes": value}
    if not isinstance(value, Mapping) or "bytes" not in value:
        return value
    try:
        return decoder.decode_example(dict(value))
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"a sound cannot be decoded, got {type(error).__name__}: {str(error)[:200]}; leave it "
            "out, restore its file, or give {'array': ..., 'sampling_rate': ...}"
        ) from error


def _form(value: Any) -> str:
    return f"a mapping with {sorted(value)}" if isinstance(value, Mapping) else type(value).__name__


def length_matters(config: Any, made: Mapping[str, Tensor]) -> bool:
    """Return whether padding changes how a network reads a sound.

    It does without a mask. With one it does, too, in Wav2Vec2 and its kin where they normalise each
    channel over time (``feat_extract_norm="group"``), padding included.
    """
    norm = getattr(config, "feat_extract_norm", None)
    return MASK not in made or norm == "group"


def warn_padded(extractor: Any, warned: set[str]) -> None:
    """Warn, once, of sounds whose scores depend on the length of their neighbours."""
    if "padded" in warned:
        return
    warned.add("padded")
    masked = getattr(extractor, "return_attention_mask", False)
    reason = (
        "the network normalises over time, padding included"
        if masked
        else f"this {type(extractor).__name__} gives no attention_mask (return_attention_mask)"
    )
    warnings.warn(
        f"sounds of different lengths share a batch, and {reason}: how a sound is scored depends "
        "on its neighbours; cut or fill all to one length, or take batch_size=1",
        stacklevel=3,
    )


def warn_cut(extractor: Any, sizes: Sequence[int], warned: set[str]) -> None:
    """Warn, once, of sounds that are longer than an extractor of a fixed length reads."""
    limit = longest(extractor)
    count = 0 if limit is None else sum(size > limit for size in sizes)
    if limit is None or not count or "cut" in warned:
        return
    warned.add("cut")
    warnings.warn(
        f"{count} of the first {len(sizes)} sounds are longer than the "
        f"{limit / extractor.sampling_rate:.3g} s that {type(extractor).__name__} reads, and are "
        "cut there",
        stacklevel=3,
    )


def longest(extractor: Any) -> int | None:
    """Return the most samples that an extractor of a fixed length reads; None for the others."""
    samples = getattr(extractor, "n_samples", None)  # Whisper's
    if isinstance(samples, int):
        return samples
    frames = getattr(extractor, "max_length", None)  # AST's, of 10 ms, 25 ms wide
    if isinstance(frames, int) and hasattr(extractor, "num_mel_bins"):
        return frames * extractor.sampling_rate // 100 + extractor.sampling_rate * 15 // 1000
    return None

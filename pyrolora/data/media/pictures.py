"""Pictures as processors of transformers take them: of PIL, with the channels of the network."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from pyrolora.errors import DataError

DEEP = ("I", "I;16", "I;16B", "I;16L", "F")
"""Modes of PIL with more than eight bits per channel, which it would cut to eight."""
_DECODER = datasets.Image()
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def as_picture(value: Any, channels: int, decoder: datasets.Image = _DECODER) -> Any:
    """Return a picture of PIL with so many channels, or an array as it is.

    Pictures of PIL, files, bytes, and arrays (H, W), (H, W, 1 to 4) of eight bits are converted by
    PIL: grey ones and palettes to RGB, where the network reads three channels. Other arrays are
    left to the processor.

    Raises
    ------
    DataError
        For what is no picture, and pictures of more than eight bits, which PIL would cut.
    """
    picture = _opened(value, decoder)
    if not is_picture(picture):
        array = np.asarray(picture)
        if array.dtype.kind in "iu" and array.size and 0 <= array.min() <= array.max() <= 255:
            array = array.astype(np.uint8)
        plain = array.dtype == np.uint8 and (array.ndim == 2 or _channels_last(array))
        if not plain:
            return array
        from PIL import Image

        picture = Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
    if picture.mode in DEEP:
        raise DataError(
            f"a picture has mode {picture.mode!r}, more than eight bits per channel, which PIL "
            "would cut; scale it to eight bits yourself, or give the processor's pixel_values"
        )
    mode = MODES.get(channels)
    return picture if mode is None or picture.mode == mode else picture.convert(mode)


def is_picture(value: Any) -> bool:
    """Return whether a value is a picture of PIL."""
    return hasattr(value, "convert") and hasattr(value, "getbands")


def stored(value: Any) -> Any:
    """Return a value with bytes in place of each picture of PIL in it, without loss.

    datasets would store a picture that came from a file as that file, whatever was done to it
    since, and one that came from JPEG as JPEG once more.
    """
    if is_picture(value):
        stream = io.BytesIO()
        value.save(stream, "PNG" if value.mode in _PNG else "TIFF")
        return {"bytes": stream.getvalue(), "path": None}
    if isinstance(value, Mapping):
        return {name: stored(part) for name, part in value.items()}
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float | str):
        return [stored(part) for part in value]
    return value


_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def _channels_last(array: np.ndarray) -> bool:
    """Return whether an array is (H, W, 1 to 4) and cannot be (1 to 4, H, W)."""
    return array.ndim == 3 and array.shape[2] in (1, 2, 3, 4) and array.shape[0] > 4


def _opened(value: Any, decoder: datasets.Image) -> Any:
    """Return the picture of PIL, or the array, that a value is or names."""
    if isinstance(value, Tensor):
        return value.numpy()
    if isinstance(value, str | bytes) or (isinstance(value, Mapping) and "bytes" in value):
        entry = value if isinstance(value, Mapping) else {"path": None, "bytes": None}
        if isinstance(value, str):
            entry = {"path": value, "bytes": None}
        elif isinstance(value, bytes):
            entry = {"path": None, "bytes": value}
        try:
            return decoder.decode_example(dict(entry))
        except (OSError, ValueError) as error:
            raise DataError(
                f"a picture cannot be read, got {type(error).__name__}: {str(error)[:200]}; leave "
                "it out, or restore its file"
            ) from error
    if is_picture(value) or isinstance(value, np.ndarray | list):
        return value
    raise DataError(
        f"a picture is one of PIL, a path, bytes, or an array, got {type(value).__name__}; make it "
        "one of these"
    )


def checked_array(picture: Any, *, rescales: bool) -> None:
    """Raise `DataError` for an array that the processor would read in two ways, or not at all."""
    if not isinstance(picture, np.ndarray):
        return
    if picture.ndim not in (2, 3) or picture.dtype == object:
        raise DataError(
            f"a picture as an array is (H, W, channels) or (channels, H, W), got {picture.shape} "
            f"of {picture.dtype}; give one picture per example, all rows of the same length"
        )
    if picture.dtype.kind == "f" and rescales and picture.size and picture.max() <= 1:
        raise DataError(
            "a picture is an array of real numbers up to "
            f"{float(picture.max()):.3g}, and the processor divides by 255 (do_rescale): give "
            "numbers up to 255, or load the processor with do_rescale=False"
        )

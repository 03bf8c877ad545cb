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

    Pictures of PIL, files, bytes, and arrays (H, W), (H, W, C) or (C, H, W) of eight bits with one
    to four channels are converted by PIL: grey ones and palettes to RGB, where the network reads
    three channels. Other arrays are left to the processor.

    Raises
    ------
    DataError
        For what is no picture, and pictures of more than eight bits, which PIL would cut.
    """
    picture = _opened(value, decoder)
    if not is_picture(picture):
        array = np.asarray(picture)
        if array.dtype == bool:
            array = array.astype(np.uint8) * 255
        elif array.dtype.kind in "iu" and array.size and 0 <= array.min() <= array.max() <= 255:
            array = array.astype(np.uint8)
        plain = _channels_last(array)
        if array.dtype != np.uint8 or plain is None:
            return array
        from PIL import Image

        picture = Image.fromarray(plain)
    if picture.mode in DEEP:
        raise DataError(
            f"a picture has mode {picture.mode!r}, more than eight bits per channel, which PIL "
            "would cut; scale it to eight bits yourself, or give the processor's pixel_values"
        )
    mode, picture = MODES.get(channels), _common(picture)
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
        stream, picture = io.BytesIO(), _common(value)
        picture.save(stream, "PNG" if picture.mode in _PNG else "TIFF")
        return {"bytes": stream.getvalue(), "path": None}
    if isinstance(value, Mapping):
        return {name: stored(part) for name, part in value.items()}
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float | str):
        return [stored(part) for part in value]
    return value


_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_RARE = {"HSV": "RGB", "RGBa": "RGBA", "La": "LA"}
"""Modes of PIL that no file holds, and those that PIL converts them to."""


def _common(picture: Any) -> Any:
    """Return a picture of PIL in a mode that files hold."""
    return picture.convert(_RARE[picture.mode]) if picture.mode in _RARE else picture


def _channels_last(array: np.ndarray) -> np.ndarray | None:
    """Return an array (H, W) or (H, W, 2 to 4) of pixels; None where its form is another.

    An array that may be (H, W, C) and (C, H, W) is left to the processor.
    """
    if array.ndim == 3:
        first, last = array.shape[0] <= 4, array.shape[2] <= 4
        if first == last:
            return None
        array = array.transpose(1, 2, 0) if first else array
        array = array[..., 0] if array.shape[2] == 1 else array
    return np.ascontiguousarray(array) if array.ndim in (2, 3) and array.size else None


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


def checked_array(picture: Any, channels: int, *, rescales: bool) -> None:
    """Raise `DataError` for an array that the processor would read in two ways, or not at all."""
    if not isinstance(picture, np.ndarray):
        return
    if picture.ndim not in (2, 3) or picture.dtype == object or not picture.size:
        raise DataError(
            f"a picture as an array is (H, W, channels) or (channels, H, W), got {picture.shape} "
            f"of {picture.dtype}; give one picture per example, all rows of the same length"
        )
    if channels not in (picture.shape[0], picture.shape[-1]) and picture.dtype.kind == "f":
        raise DataError(
            f"a picture is an array of {picture.dtype} with the shape {picture.shape}, and the "
            f"network reads {channels} channels; give it so many, or eight bits (uint8), which "
            "are converted"
        )
    if picture.dtype.kind in "iu" and (picture.min() < 0 or picture.max() > 255):
        raise DataError(
            f"a picture is an array of whole numbers in {picture.min()}..{picture.max()}; scale "
            "them to eight bits, 0..255"
        )
    if not np.isfinite(picture).all():
        raise DataError("a picture has pixels that are not finite (NaN or infinity); fill them")
    if picture.dtype.kind == "f" and rescales and 0 < picture.max() <= 1:
        raise DataError(
            "a picture is an array of real numbers up to "
            f"{float(picture.max()):.3g}, and the processor divides by 255 (do_rescale): give "
            "numbers up to 255, or load the processor with do_rescale=False"
        )

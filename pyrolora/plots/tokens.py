"""A plot of text, each token shaded by a number."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyrolora.checks import positive
from pyrolora.errors import ConfigError
from pyrolora.plots.arguments import check_axes
from pyrolora.plots.arguments import numbers as numbers_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

CHARACTER = 0.602
"""Width of a character of DejaVu Sans Mono, which comes with matplotlib, in font sizes."""
LINE = 1.7
"""Height of a line, in font sizes."""
LARGEST, SMALLEST = 11.0, 4.0
"""Font sizes, in points."""


def token_text(
    tokens: Sequence[str],
    values: ArrayLike,
    *,
    ax: Axes,
    label: str = "entropy (nats)",
    top: float | None = None,
) -> Axes:
    """Draw text with its tokens shaded: the darker, the higher the number.

    Lines are wrapped at the width of the axes, in the largest font in which all of them fit.

    Parameters
    ----------
    tokens
        Strings; a token that ends in a line feed ends its line. Any character is shown as it is.
    values
        One number per token, (T,); NaN for a token without shading.
    label
        The label of the colour bar below the text.
    top
        The number of the darkest shade, by default the highest of ``values``. Pass the same to
        plots that are compared.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    check_axes(ax, label)
    if not isinstance(tokens, list | tuple) or not all(isinstance(t, str) for t in tokens):
        raise ConfigError(f"tokens must be a list of texts, got {tokens!r:.60}")
    if top is not None:
        positive("top", top, or_zero=True)
    numbers = numbers_of("values", values, "(T,)", finite=False).astype(float)
    if numbers.shape != (len(tokens),):
        raise ConfigError(
            f"token_text needs one number per token, ({len(tokens)},), got shape {numbers.shape}; "
            "pass NaN for a token without shading"
        )
    finite = numbers[np.isfinite(numbers)]
    top = float(finite.max(initial=0.0)) if top is None else top
    shades = ScalarMappable(Normalize(0, top or 1.0), "Oranges")
    ax.figure.colorbar(shades, ax=ax, orientation="horizontal", label=label, shrink=0.6, aspect=40)
    ax.set_axis_off()
    size, columns = _largest(tokens, ax)
    pieces = list(_wrapped(tokens, columns))
    height = 1 + max((row for _, _, row, _ in pieces), default=0)
    for number, column, row, text in pieces:
        if np.isfinite(numbers[number]):
            colour = shades.to_rgba(numbers[number])
            ax.add_patch(Rectangle((column, row), _width(text), 0.9, color=colour, linewidth=0))
        dark = np.isfinite(numbers[number]) and numbers[number] > 0.6 * (top or 1.0)
        ax.text(
            column,
            row + 0.45,
            text,
            size=size,
            family="DejaVu Sans Mono",
            color="white" if dark else "black",
            verticalalignment="center_baseline",
            parse_math=False,
            usetex=False,
        )
    ax.set(xlim=(0, columns), ylim=(max(height, _lines(ax, size)), 0))
    return ax


def _largest(tokens: Sequence[str], ax: Axes) -> tuple[float, int]:
    """Return the font size, and the characters per line, with which the text fits."""
    ax.figure.figure.draw_without_rendering()  # a layout moves the axes only when it is drawn
    width = ax.get_window_extent().width / ax.figure.dpi * 72
    for size in np.arange(LARGEST, SMALLEST, -0.5):
        columns = max(1, int(width / (CHARACTER * size)))
        rows = 1 + max((row for _, _, row, _ in _wrapped(tokens, columns)), default=0)
        if rows <= _lines(ax, size):
            break
    return float(size), columns


def _lines(ax: Axes, size: float) -> float:
    """Return how many lines the axes hold."""
    return ax.get_window_extent().height / ax.figure.dpi * 72 / (LINE * size)


def _wrapped(tokens: Sequence[str], columns: int) -> Iterator[tuple[int, int, int, str]]:
    """Yield the place of each piece of text: number of the token, column, row, text.

    A token that does not fit into the rest of its line begins the next; one longer than a line is
    cut.
    """
    column = row = 0
    for number, token in enumerate(tokens):
        for i, part in enumerate(token.split("\n")):
            if i:
                column, row = 0, row + 1
            text = part.expandtabs(4)
            if column and column + _width(text) > columns:
                column, row, text = 0, row + 1, text.lstrip(" ") or text
            while text:
                piece = _fitting(text, max(1, columns - column))
                yield number, column, row, piece
                column, text = column + _width(piece), text[len(piece) :]
                if text:
                    column, row = 0, row + 1


def _fitting(text: str, columns: int) -> str:
    """Return as much of the beginning of a text as fits, at least one character."""
    length = 1
    while length < len(text) and _width(text[: length + 1]) <= columns:
        length += 1
    return text[:length]


def _width(text: str) -> int:
    """Return the width in characters of a fixed pitch.

    East Asian wide characters count twice, combining ones not at all.
    """
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )

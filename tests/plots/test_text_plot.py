"""Text with shaded tokens: where each token stands, how dark it is, and that nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pyrolora.errors import ConfigError
from pyrolora.plots import token_text

WORDS = ["the", " film", " was", " not", " dull"]


@pytest.fixture
def figure() -> Iterator[Figure]:
    figure = Figure(figsize=(6, 2), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    figure.canvas.draw()


@pytest.fixture
def ax(figure: Figure) -> Axes:
    return figure.subplots()


def lines_of(ax: Axes) -> list[str]:
    """The text as it is read, line by line, every piece where it was put."""
    rows: dict[float, str] = {}
    for text in ax.texts:
        column, row = text.get_position()
        assert len(rows.get(row, "")) == column, "a piece begins where the one before it ends"
        rows[row] = rows.get(row, "") + text.get_text()
    return [rows[row] for row in sorted(rows)]


def test_tokens_follow_each_other_and_are_as_dark_as_their_number(ax: Axes) -> None:
    assert token_text(WORDS, [0.0, 1.0, np.nan, 4.0, 2.0], ax=ax) is ax
    assert lines_of(ax) == ["the film was not dull"]
    boxes = [(b.get_x(), b.get_y(), b.get_width()) for b in ax.patches]
    assert boxes == [(0, 0, 3), (3, 0, 5), (12, 0, 4), (16, 0, 5)], (
        "no box where there is no number"
    )
    shades = colormaps["Oranges"]
    for box, share in zip(ax.patches, (0.0, 0.25, 1.0, 0.5), strict=True):
        np.testing.assert_allclose(box.get_facecolor(), shades(share))


def test_the_scale_can_be_given(ax: Axes) -> None:
    token_text(WORDS[:2], [1.0, 2.0], ax=ax, top=8.0, label="mutual information")
    np.testing.assert_allclose(ax.patches[1].get_facecolor(), colormaps["Oranges"](0.25))
    bar = ax.figure.axes[1]
    assert bar.get_xlabel() == "mutual information"
    assert bar.get_xlim() == (0, 8)


def test_lines_are_wrapped_between_tokens_and_stay_inside(figure: Figure, ax: Axes) -> None:
    token_text(WORDS * 12, np.arange(60.0), ax=ax)
    lines = lines_of(ax)
    assert len(lines) > 1
    words = "".join(WORDS).split()
    assert " ".join(lines).replace("dullthe", "dull the").split() == words * 12
    columns = ax.get_xlim()[1]
    assert max(map(len, lines)) <= columns
    figure.canvas.draw()
    inside = ax.get_window_extent()
    for text in ax.texts:
        box = text.get_window_extent()
        assert box.x1 <= inside.x1 + 1
        assert box.y0 >= inside.y0 - 1


def test_more_text_is_smaller(figure: Figure) -> None:
    short, long = figure.subplots(2)
    token_text(WORDS, np.ones(5), ax=short)
    token_text(WORDS * 20, np.ones(100), ax=long)
    assert short.texts[0].get_size() > long.texts[0].get_size()


def test_a_token_longer_than_a_line_is_cut(ax: Axes) -> None:
    token_text(["x" * 500], [1.0], ax=ax)
    lines = lines_of(ax)
    assert "".join(lines) == "x" * 500
    assert {len(line) for line in lines[:-1]} == {int(ax.get_xlim()[1])}
    assert len(ax.patches) == len(lines)


def test_line_feeds_break_lines(ax: Axes) -> None:
    token_text(["one", "\n", "\ntwo", "three\n", "four"], np.ones(5), ax=ax)
    assert [(t.get_text(), *t.get_position()) for t in ax.texts] == [
        ("one", 0, 0.45),
        ("two", 0, 2.45),
        ("three", 3, 2.45),
        ("four", 0, 3.45),
    ]


@pytest.mark.parametrize("token", ["$x^2$", "$", r"\$5", r"$\nothing{$", "a_b^c", "100 %", "<b>&"])
def test_any_text_is_shown_as_it_is(token: str, figure: Figure, ax: Axes) -> None:
    token_text([token, " end"], [1.0, 2.0], ax=ax)
    figure.canvas.draw()  # would raise for mathematics that cannot be read
    assert lines_of(ax) == [f"{token} end"]
    width = ax.texts[0].get_window_extent().width / len(token)
    assert width == pytest.approx(ax.texts[1].get_window_extent().width / 4, rel=0.15)


def test_wide_characters_have_room(ax: Axes, figure: Figure) -> None:
    token_text(["日本", "e\u0301", "x"], np.ones(3), ax=ax)
    assert [box.get_width() for box in ax.patches] == [4, 1, 1]
    figure.clear()  # the font has no such glyphs, of which matplotlib would warn


def test_no_tokens_at_all(ax: Axes) -> None:
    token_text([], [], ax=ax)
    assert not ax.texts


def test_one_number_per_token_is_needed(ax: Axes) -> None:
    with pytest.raises(ConfigError, match=r"one number per token, \(5,\), got shape \(4,\)"):
        token_text(WORDS, np.ones(4), ax=ax)

"""Progress: bars on a terminal alone, lines in a log, and nothing where that is asked."""

from __future__ import annotations

import io
import sys

import pytest
from problems import bert, tokens

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.inference.callbacks import log_line
from pyrolora.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_leaves_nothing_behind_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    shown = {"delay": 0, "mininterval": 0, "file": screen, "disable": False}
    assert [*progress(range(3), title="reading", **shown)] == [0, 1, 2]
    assert "reading" in screen.getvalue()
    assert not screen.getvalue().split("\r")[-1].strip()
    assert screen.getvalue().count("\n") == 0


@pytest.mark.parametrize("hidden", [True, False])
def test_a_log_file_gets_no_bar(monkeypatch: pytest.MonkeyPatch, hidden: bool) -> None:
    screen = Terminal() if hidden else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    assert [*progress(range(3), title="reading", hidden=hidden, delay=0)] == [0, 1, 2]
    assert not screen.getvalue()


def test_entries_of_the_log_are_rounded_and_aligned() -> None:
    lines = [
        log_line(
            {"loss": "26.90334", "kl/A": 1234567.8, "learning_rate": 1e-3, "epoch": "0.08"}, 1, 100
        ),
        log_line({"loss": 4.0, "kl/A": 0.25, "learning_rate": 3.3333e-5, "epoch": 12.0}, 100, 100),
    ]
    assert lines[0].startswith("step   1/100  epoch   0.08  loss       26.9  kl/A  1.235e+06")
    assert len({len(line) for line in lines}) == 1
    assert len({line.index("learning_rate") for line in lines}) == 1


def test_a_fit_logs_lines_where_no_bar_is_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    options = {"epochs": 2, "adapter": AdapterConfig(r=1), "batch_size": 4}
    pyrolora.fit(bert(), tokens(8), **options)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line[:9] for line in printed.err.splitlines()] == [
        "step 1/4 ",
        "step 2/4 ",
        "step 3/4 ",
        "step 4/4 ",
        "step 4/4 ",
    ]
    assert "it/s" not in printed.err
    monkeypatch.setenv("TQDM_DISABLE", "1")
    pyrolora.fit(bert(), tokens(8), **options)
    assert "step" not in capsys.readouterr().err

"""The command line in this process: what it prints, and how it ends."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from problems import tokenizer
from torch import nn

from pyrolora.cli import main


@dataclass(frozen=True)
class Result:
    """The end of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document and nothing else."""
        return json.loads(self.out)


def pyrolora_(*arguments: Any) -> Result:
    """Run ``pyrolora`` with these arguments; an exception that is no exit goes through."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            return Result(end.code, out.getvalue(), err.getvalue())
    raise AssertionError("main() came back without an exit")


def done(*arguments: Any) -> Result:
    """Run a command that has to work."""
    result = pyrolora_(*arguments)
    assert result.code == 0, result.err
    return result


def refused(result: Result, *words: str, code: int = 2) -> str:
    """The command ended with ``code`` and one line of error, the last, that holds ``words``."""
    lines = result.err.rstrip("\n").split("\n")
    errors = [line for line in lines if "pyrolora: error:" in line]
    assert result.code == code, result
    assert len(errors) == 1, result.err
    assert lines[-1].startswith("pyrolora: error: "), f"not a line of its own: {lines[-1]!r}"
    assert len(lines[-1]) > len("pyrolora: error: "), "the error says nothing"
    assert "Traceback" not in result.out + result.err
    for word in words:
        assert word in lines[-1], f"{word!r} is not in {lines[-1]}"
    return lines[-1]


def saved(network: nn.Module, folder: Path) -> Path:
    """A folder that transformers loads the network and the tests' tokenizer from."""
    with contextlib.redirect_stderr(io.StringIO()):
        network.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder

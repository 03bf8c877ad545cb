"""The command line: ``pyrolora fit|calibrate|predict|evaluate|compare|generate|...``."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

import typer
from typer.exceptions import TyperException

from pyrolora.cli.acquire import acquire
from pyrolora.cli.calibrate import calibrate
from pyrolora.cli.compare import compare
from pyrolora.cli.demo import demo
from pyrolora.cli.evaluate import evaluate
from pyrolora.cli.export import export
from pyrolora.cli.fit import fit
from pyrolora.cli.generate import generate
from pyrolora.cli.imported import imported
from pyrolora.cli.output import say
from pyrolora.cli.predict import predict
from pyrolora.cli.registered import RegisteredHelp
from pyrolora.cli.report import report
from pyrolora.cli.serve import serve
from pyrolora.errors import NonFiniteError, PyroLoraError, SaveError
from pyrolora.visible import visible

FAILED, MISUSED, NOT_FINITE, INTERRUPTED = 1, 2, 3, 130
DEBUG = "PYROLORA_DEBUG"
HELP = (
    "Posteriors over the low-rank adapters of a transformer: fit one, score it, predict with its "
    "uncertainty, hand it to other tools. 'pyrolora demo' shows it all on a small model."
)

app = typer.Typer(
    rich_markup_mode=None,  # two columns: the help of a verb fits a screen
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done; 2 a wrong option, file, column or folder; 3 the fit met NaN or "
    "infinity (its last good state is saved); 1 anything else; 130 interrupted.",
)
app.callback(help=HELP)(imported)
app.command(cls=RegisteredHelp)(fit)
commands = (
    *(calibrate, predict, evaluate, compare, generate, acquire, report, export, serve, demo),
)
for command in commands:
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors that a user can fix are one line on standard error."""
    for library in ("TRANSFORMERS", "DATASETS", "HF_HUB"):  # read on import
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():  # a log file has no use for bars
        for library in ("HF_DATASETS", "HF_HUB"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    words = sys.argv[1:] if arguments is None else list(arguments)
    usual = warnings.formatwarning
    warnings.formatwarning = lambda *of, **more: visible(usual(*of, **more))
    try:
        code = app(args=words, prog_name="pyrolora", standalone_mode=False, obj=words) or 0
    except TyperException as error:
        code = _report(error.format_message(), MISUSED)
    except NonFiniteError as error:
        code = _report(error, NOT_FINITE)
    except SaveError as error:  # a full disk, a missing permission
        code = _report(error, FAILED)
    except PyroLoraError as error:
        code = _report(error, MISUSED)
    except OSError as error:
        code = _report(error, FAILED)
    except Exception as error:
        if DEBUG in os.environ:
            raise
        code = _report(f"{type(error).__name__}: {error} ({DEBUG}=1 shows where)", FAILED)
    finally:
        warnings.formatwarning = usual
    if code == INTERRUPTED:  # typer makes an exit code of a KeyboardInterrupt
        _report("interrupted", code)
    sys.exit(code)


def _report(error: object, code: int) -> int:
    message = " ".join(str(error).split())
    if message:
        say(f"pyrolora: error: {message}")
    return code

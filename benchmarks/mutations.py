"""Plant single faults in the mathematics, one at a time, and run the tests that must see them.

    python benchmarks/mutations.py                # ten minutes on one core
    python benchmarks/mutations.py --only wishart # the faults whose name has this in it

The faults are those of `mutation_table.py`. Each is written into a copy of the package, never into
the package itself. The exit status is 1 if the tests of a fault pass, if they cannot be run, or if
the text that a fault replaces is no longer in its file exactly once. Where the tests fail without a
fault, no fault is planted.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from mutation_table import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("pyrolora", "tests")
LINKED = ("models", "pyproject.toml")
SECONDS = 600
"""Time that the tests of one fault may take."""
PASSED, FAILED = 64, 65
"""The exit statuses of a run whose tests all passed, and of one in which some failed: those of
pytest, 0 and 1, plus 64, since a run that breaks before them ends with 1, too."""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "torch", "transformers", "datasets", "pyro", "arviz"])
"""Every run of tests is a process that starts with these, whose import takes longest."""


def faulty(fault: Fault, root: Path) -> str:
    """Return the text of the file with the fault in it.

    Raises
    ------
    ValueError
        When the text that it replaces is not in the file exactly once.
    """
    text = (root / fault.file).read_text()
    count = text.count(fault.old)
    if count != 1:
        raise ValueError(
            f"{fault.name}: the old text is in {fault.file} {count} times, and has to be there "
            f"once: {fault.old!r}; write the line of the fault anew for the code as it is"
        )
    return text.replace(fault.old, fault.new)


def copy_of(root: Path, folder: Path) -> Path:
    """Copy what the tests need into ``folder``."""
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / name, folder / name, ignore=ignored)
    for name in LINKED:
        if (root / name).exists():
            (folder / name).symlink_to(root / name)
    return folder


def run_tests(tests: Sequence[str], copy: Path, seconds: float | None = SECONDS) -> tuple[int, str]:
    """Run tests on a copy; return the exit status and the end of the output."""
    with tempfile.NamedTemporaryFile("r") as output:
        process = SERVER.Process(target=_tested, args=([*tests], copy, output.name))
        process.start()
        process.join(seconds)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        said = "\n".join(output.read().strip().splitlines()[-12:])
        if late:
            said = f"{said}\nstopped after {seconds} s"
    assert process.exitcode is not None
    return process.exitcode, said


def _tested(tests: list[str], copy: Path, output: str) -> None:
    """Run tests in this process, which has not imported the package yet."""
    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")])
    import pytest

    found = importlib.util.find_spec("pyrolora")
    if found is None or found.origin != str(copy / "pyrolora" / "__init__.py"):
        sys.exit(f"the tests would import {found}, and not the copy in {copy}")
    options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--tb", "line", "-rf"]
    imported = "ignore::pytest.PytestAssertRewriteWarning"  # plugins may come with the server
    status = int(pytest.main([*tests, *options, "-o", "addopts=", "-W", imported]))
    sys.stdout.flush()
    os._exit(PASSED + status)


def verdict(fault: Fault, root: Path, copy: Path) -> str:
    """Return "" where the tests of the fault fail with it in ``copy``, else what went wrong."""
    try:
        text = faulty(fault, root)
    except ValueError as error:
        return str(error)
    file = copy / fault.file
    _write(file, text)
    try:
        status, output = run_tests(fault.tests, copy)
    finally:
        _write(file, (root / fault.file).read_text())
    if status == FAILED:
        return ""
    if status == PASSED:
        return f"{fault.name}: SURVIVED {' '.join(fault.tests)}"
    return f"{fault.name}: {' '.join(fault.tests)} could not be run (status {status}):\n{output}"


def _write(file: Path, text: str) -> None:
    """Write a module, and drop what was compiled of it: files may be of one size and second."""
    file.write_text(text)
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        compiled.unlink()


def run(
    faults: Sequence[Fault], root: Path, workers: int = 1, say: Callable[[str], None] = print
) -> list[str]:
    """Run the tests of every fault; return what went wrong, a text per fault that was not seen."""
    if not faults:
        return ["there is no such fault"]
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copies: Queue[Path] = Queue()
        for number in range(workers):
            place = Path(folder).resolve() / str(number)
            place.mkdir()
            copies.put(copy_of(root, place))
        tests = {test: None for fault in faults for test in fault.tests}
        status, output = run_tests([*tests], place, None)  # the tests of all faults at once
        if status != PASSED:
            return [f"the tests fail without a fault (status {status}):\n{output}"]

        def one(fault: Fault) -> str:
            copy, start = copies.get(), time.monotonic()
            try:
                wrong = verdict(fault, root, copy)
            finally:
                copies.put(copy)
            say(wrong or f"{fault.name}: caught ({time.monotonic() - start:.0f} s)")
            return wrong

        with ThreadPoolExecutor(workers) as pool:
            return [wrong for wrong in pool.map(one, faults) if wrong]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="run the faults whose name has this in it")
    parser.add_argument("--workers", type=int, default=1, help="number of faults at a time")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if args.only in fault.name]
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        print(line, flush=True)

    wrong = run(faults, ROOT, args.workers, say)
    for text in wrong:
        print(text, file=sys.stderr)
    # One line is said per planted fault, and none if the tests fail without a fault.
    print(f"{len([line for line in said if line not in wrong])} of {len(faults)} faults caught")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

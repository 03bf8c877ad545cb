"""Kill fits at every file operation and at random moments, and go on with the same command or call.

    python benchmarks/faults.py --events 1 --moments 200

A small encoder, evaluation after every epoch, and the best model loaded where the guide allows it.
Each fit is made once in one go, in a process of its own, which counts its file operations (opening
to write, renaming, removing, making folders, flushing, and the two halves of every file that a
library in another language writes). Then it is made again and killed: before one of the operations,
or after a random time of the processor, at whichever instruction. The same command, or the same
call of ``pyrolora.fit`` with ``resume_from_checkpoint="auto"``, is given once more. What it leaves
has to have the same tensors and the same history to the bit, and to hold no other files. Anything
else is a failure, is printed, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import safetensors.torch
import torch
import transformers
from fuzz import network, tokenizer

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.cli import main as command_line
from pyrolora.guides.registry import from_options

BEST = {"load_best_model_at_end": True, "metric_for_best_model": "nll"}
SETTINGS: dict[str, dict[str, Any]] = {
    "montec": {"guide": "montec", "training": BEST},
    "rank allocation": {
        "guide": "montec",
        "adapter": {"rank_allocation": "snr"},
        "training": BEST,
    },
    "swag": {"guide": "swag", "options": {"start": 0.2, "snapshots": 4, "rank": 2}},
    "ensemble": {"guide": "ensemble", "options": {"members": 2}, "training": BEST},
    "laplace": {"guide": "laplace", "training": BEST},
    "nuts": {
        "guide": "nuts",
        "options": {"chains": 1, "num_samples": 4, "warmup_steps": 4, "max_tree_depth": 3},
        "training": BEST,
    },
    "flat+montec": {"guide": "flat+montec", "training": BEST},
}
WAYS = ("command", "call")
EPOCHS, BATCH, EXAMPLES = 4, 4, 12
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
TIMES = ("runtime", "per_second", "seconds")


@dataclass(frozen=True)
class Trial:
    """A fit in a folder, and when it is killed: before an event, or after seconds of CPU time."""

    setting: str
    way: str
    folder: Path
    event: int | None = None
    moment: float | None = None


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts of a few words, with a label."""
    generator = random.Random(seed)
    words = ["a", "good", "film", "was", "not", "dull", "bad", "book", "very"]
    return [
        {"text": " ".join(generator.choices(words, k=5)), "label": generator.randrange(2)}
        for _ in range(count)
    ]


def prepare(place: Path) -> None:
    """Write the network, the tokenizer and the data of all fits."""
    made = network()
    made.config.id2label = {0: "no", 1: "yes"}
    made.save_pretrained(place / "network")
    tokenizer().save_pretrained(place / "network")
    for name, count in (("train", EXAMPLES), ("validation", 8)):
        lines = [json.dumps(row) for row in rows(count, count)]
        (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def by_command(place: Path, trial: Trial) -> None:
    """Give the command of a setting."""
    setting = SETTINGS[trial.setting]
    parts = {"guide": setting.get("options", {}), "adapter": setting.get("adapter", {})}
    parts["training"] = {"save_strategy": "epoch", **setting.get("training", {})}
    words = ["fit", str(place / "train.jsonl"), "--model", str(place / "network")]
    words += ["--eval-data", str(place / "validation.jsonl"), "--guide", setting["guide"]]
    words += ["--output-dir", str(trial.folder), "--epochs", str(EPOCHS), "--json"]
    words += ["--batch-size", str(BATCH), "--learning-rate", "0.05"]
    for part, options in parts.items():
        for name, value in options.items():
            words += ["--set", f"{part}.{name}={json.dumps(value).strip(chr(34))}"]
    try:
        command_line(words)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"exit code {end.code}") from end


def by_call(place: Path, trial: Trial) -> None:
    """Make the call of a setting."""
    setting = SETTINGS[trial.setting]
    args = pyrolora.inference.training_arguments(
        trial.folder,
        epochs=EPOCHS,
        batch_size=BATCH,
        learning_rate=0.05,
        eval_strategy="epoch",
        disable_tqdm=True,
        resume_from_checkpoint="auto",
        **{"save_strategy": "epoch", **setting.get("training", {})},
    )
    data = [datasets.Dataset.from_list(rows(count, count)) for count in (EXAMPLES, 8)]
    pyrolora.fit(
        place / "network",
        data[0],
        from_options(setting["guide"], setting.get("options", {})),
        eval_data=data[1],
        adapter=AdapterConfig(**setting.get("adapter", {})),
        training=args,
    ).save(trial.folder)


# Dying --------------------------------------------------------------------------------------------


class Events:
    """Counts the file operations in a folder, and kills the process before one of them."""

    def __init__(self, folder: Path, last: int | None) -> None:
        self.folder, self.last, self.count = str(folder), last, 0

    def __call__(self, name: str, arguments: Sequence[Any]) -> None:
        if name == "open":
            path, _, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes:
                self.meet(path)
        elif name in CHANGES:
            self.meet(arguments[0])

    def meet(self, path: Any) -> None:
        if str(path).startswith(self.folder):
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1

    def in_halves(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that writes a file, with an event before, amid and after it."""

        def written(content: Any, file: Any, *more: Any, **options: Any) -> Any:
            amid = self.count + 1 == self.last
            self.meet(file)
            result = write(content, file, *more, **options)
            if amid:
                os.truncate(file, Path(file).stat().st_size // 2)
            self.meet(file)
            return result

        return written

    def install(self) -> None:
        """See what Python does, and what it calls others to do."""
        sys.addaudithook(self)
        torch.save = self.in_halves(torch.save)  # type: ignore[assignment]
        saving = self.in_halves(safetensors.torch.save_file)
        pyrolora.inference.checkpoints.save_file = saving  # type: ignore[attr-defined]
        flush = os.fsync

        def fsync(handle: int) -> None:
            self.meet(os.readlink(f"/proc/self/fd/{handle}"))
            flush(handle)

        os.fsync = fsync  # type: ignore[assignment]


def in_child(place: Path, trial: Trial) -> tuple[int, dict[str, Any]]:
    """Run a trial in a process of its own; return how it ended, and what it counted."""
    report = place / "report.json"
    report.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        status = 1
        try:
            with open(place / "log", "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                warnings.simplefilter("ignore")
                events = Events(trial.folder, trial.event)
                events.install()
                before = _cpu_seconds()
                if trial.moment is not None:
                    signal.setitimer(signal.ITIMER_PROF, trial.moment)  # SIGPROF kills
                {"command": by_command, "call": by_call}[trial.way](place, trial)
                signal.setitimer(signal.ITIMER_PROF, 0)
                content = {"events": events.count, "seconds": _cpu_seconds() - before}
                report.write_text(json.dumps(content))
            status = 0
        except BaseException as error:
            with contextlib.suppress(Exception):
                report.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    found = json.loads(report.read_text()) if report.exists() else {}
    return os.waitstatus_to_exitcode(status), found


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# Comparing ----------------------------------------------------------------------------------------


def left_in(folder: Path) -> dict[str, Any]:
    """Return what a fit has left: its tensors, its history but for clocks, its files by name."""
    posterior = pyrolora.load(folder)
    history = [
        {name: value for name, value in entry.items() if not any(t in name for t in TIMES)}
        for entry in posterior.history
    ]
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {"tensors": posterior.model.own_state(), "history": history, "files": files}


def difference(found: dict[str, Any], whole: dict[str, Any]) -> str | None:
    """Return what differs, or None."""
    tensors, expected = found["tensors"], whole["tensors"]
    if tensors.keys() != expected.keys():
        return "other tensors"
    if not all(torch.equal(tensors[name], value) for name, value in expected.items()):
        return "other values of tensors"
    for name in ("history", "files"):
        more, fewer = (
            [entry for entry in of[name] if entry not in others[name]]
            for of, others in ((found, whole), (whole, found))
        )
        if found[name] != whole[name]:
            return f"other {name}: {str(more)[:300]}, and without {str(fewer)[:300]}"
    return None


def outcome(place: Path, trial: Trial, whole: dict[str, Any]) -> str | None:
    """Kill a fit, and make it again; return what went wrong, or None; "" if it was over before."""
    code, found = in_child(place, trial)
    if code == 0:
        return ""
    if code not in (-signal.SIGKILL, -signal.SIGPROF):
        return f"the fit failed before it was killed: {found}"
    again = Trial(trial.setting, trial.way, trial.folder)
    code, found = in_child(place, again)
    if code:
        return f"the same {trial.way} ended with {code}: {found.get('error')}"
    try:
        return difference(left_in(trial.folder), whole)
    except Exception as error:
        return f"what it left cannot be loaded: {error}"


def trials(
    events: Iterable[int], moments: Iterable[float], setting: str, way: str, folder: Path
) -> Iterable[Trial]:
    """Iterate over the kills of one fit."""
    yield from (Trial(setting, way, folder, event=event) for event in events)
    yield from (Trial(setting, way, folder, moment=moment) for moment in moments)


def kill_all(place: Path, setting: str, way: str, every: int, moments: int, seed: int) -> list[str]:
    """Kill one fit at every ``every``-th file operation and at random moments; print a row."""
    folder = place / "run"
    code, counted = in_child(place, Trial(setting, way, folder))
    if code:
        return [f"{setting}, {way}: not even in one go: {counted}"]
    whole = left_in(folder)
    generator = random.Random(f"{seed} {setting} {way}")
    at = range(generator.randrange(every), counted["events"], every) if every else ()
    times = [generator.uniform(0, counted["seconds"]) for _ in range(moments)]
    failures, killed = [], {"events": 0, "moments": 0}
    for trial in trials(at, times, setting, way, folder):
        shutil.rmtree(folder)
        found = outcome(place, trial, whole)
        when = f"event {trial.event}" if trial.moment is None else f"{trial.moment:.3f} s"
        killed["events" if trial.moment is None else "moments"] += found != ""
        if found:
            failures.append(f"{setting}, {way}, {when}: {found}")
            print(f"FAILED {failures[-1]}", flush=True)
    shutil.rmtree(folder)
    print(
        f"{setting:16} {way:8} {counted['events']:5} operations; killed at {killed['events']} of "
        f"them and at {killed['moments']} moments: {len(failures)} failures",
        flush=True,
    )
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--events", type=int, default=1, help="kill at every N-th file operation; 0: at none"
    )
    parser.add_argument("--moments", type=int, default=200, help="random moments of each fit")
    parser.add_argument("--only", nargs="*", default=[*SETTINGS], choices=[*SETTINGS])
    parser.add_argument("--ways", nargs="*", default=[*WAYS], choices=[*WAYS])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"
    failures = []
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        prepare(place)
        by_call(place, Trial("montec", "call", place / "run"))  # imports, once for all children
        shutil.rmtree(place / "run")
        gc.freeze()  # children need not look at what the parent has
        for setting in options.only:
            for way in options.ways:
                one = kill_all(place, setting, way, options.events, options.moments, options.seed)
                failures += one
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

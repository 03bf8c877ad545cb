"""Do two commits give the same numbers? Every guide is fitted on every task at both, and compared.

    python benchmarks/same_tensors.py --old main              # with the working tree
    python benchmarks/same_tensors.py --old v0.1 --new main   # with another commit

For changes that move code around and are meant to change no result. Each commit is checked out into
a temporary folder and runs in a process of its own, one after the other: tiny transformers networks
with random weights, 24 examples, two epochs, one thread, fixed seeds. Compared are all tensors of
the posterior, by name (but for `RENAMED`), order, shape and type; losses and scores in the history
of the fit; and what `predict` says with a seed. The exit status is 1 unless every difference is
exactly zero. What one commit refuses, the other has to refuse as well; a guide that only the new
one has is listed, and is no difference.

Networks and data are those of this checkout's ``tests/problems.py``, for both commits.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
# Beginnings of tensors' names that a restructuring changed: the old one, and the new one.
RENAMED = {"likelihood.": "task."}
TIMES = ("runtime", "per_second")  # in the history, and never the same twice
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TQDM_DISABLE"), "1"),
    "PYTHONHASHSEED": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}

# Guides with options, beside all registered ones with their defaults: as `guides.from_options`
# takes them, so that no class is imported. A variant that has a guide's own name replaces it.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "flat+montec": ("flat+montec", {}),
    "nuts": ("nuts", {"num_samples": 4, "warmup_steps": 2, "max_tree_depth": 2}),
    "map, prior": ("map", {"prior_scale": 0.5}),
    "montec, all options": (
        "montec",
        {
            "component_prior": "hierarchical",
            "covariance": "full",
            "latent": "AB",
            "learn_sample_scale": True,
            "cooperation": 0.5,
            "init_covariance": 0.5,
            "kl_weight": 1.0,
            "kl_warmup": 0.5,
            "prior_mean": "zero",
        },
    ),
    "montec, curvature": (
        "montec",
        {
            "scale_updates": "curvature",
            "units": "fan_in",
            "sample_scale": 1.6,
            "prior_mean": "start",
            "covariance": "full",
            "latent": "AB",
        },
    ),
    "montec, held back": (
        "montec",
        {
            "scale_updates": "curvature",
            "units": "row",
            "prior_mean": "learned",
            "kl_weight": 1.0,
            "hold_back": 0.2,
        },
    ),
    "montec, sparse": ("montec", {"sparse": True, "latent": "B", "num_components": 1}),
    "montec, two draws": ("montec", {"draws_per_batch": 2}),
    "meanfield, both": ("meanfield", {"latent": "AB", "draws_per_batch": 5, "kl_warmup": 0.5}),
    "meanfield, rows": ("meanfield", {"units": "row", "prior_mean": "learned"}),
    "lowrank, both": ("lowrank", {"latent": "AB", "rank": 3, "draws_per_batch": 2}),
    "swag, prior": ("swag", {"prior_scale": 0.5, "latent": "A", "rank": 2, "snapshots": 2}),
    "flat+swag": ("flat+swag", {"inner": {"latent": "B"}}),
    "flat+laplace on A": ("flat+laplace", {"inner": {"latent": "A", "prior_scale": 0.5}}),
    "laplace, sampled": ("laplace", {"linearised": False, "latent": "B"}),
    "laplace, validation": ("laplace", {"tune": "validation"}),
    "laplace, full": ("laplace", {"curvature": "full", "num_draws": 3}),
    "dropout, ranks": ("dropout", {"unit": "rank", "p": 0.5, "draws_per_batch": 1}),
    "ensemble, at once": ("ensemble", {"members": 3, "side_by_side": True}),
    "nuts+montec": (
        "nuts+montec",
        {
            "chains": 1,
            "num_samples": 4,
            "warmup_steps": 2,
            "max_tree_depth": 2,
            "inner": {"component_prior": "hierarchical", "kl_weight": 0.5},
        },
    ),
}
# Fits that start from another one, by its means or with it as the prior; and their epochs.
SECOND: dict[str, tuple[str, str, str, int | None]] = {
    "montec on map": ("map", "montec", "model", 2),
    "laplace on map": ("map", "laplace", "model", None),  # which trains nothing
    "montec after montec": ("montec", "montec", "prior", 2),
}


# At one commit ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A network, whose class says what is learnt, and its data."""

    network: Callable[[], Any]
    data: Callable[[int], Any]
    adapter: dict[str, Any]
    tokenizer: Any = None


def tasks() -> dict[str, Task]:
    """The networks and data, with several kinds of adapters among them."""
    import problems

    words, small = problems.tokenizer(), {"r": 2}

    def numbers(n: int) -> list[dict[str, Any]]:
        return [{**row, "labels": float(row["labels"])} for row in problems.tokens(n)]

    mixed = {
        "r": 3,
        "target_modules": "all-linear",
        "rank_pattern": {"key": 1},
        "alpha_pattern": {"key": 4},
        "init_lora_weights": "lora-ga",
    }
    moving = {"r": 2, "rank_allocation": "alora"}
    masks = problems.mask_tokenizer()
    return {
        "classification": Task(problems.bert, problems.reviews, small, words),
        "classification, LoRA-GA": Task(problems.bert, problems.tokens, mixed),
        "classification, ALoRA": Task(problems.bert, problems.reviews, moving, words),
        "regression": Task(
            lambda: problems.bert(1), numbers, {"r": 2, "use_rslora": True, "lora_dropout": 0.1}
        ),
        "causal LM": Task(problems.llama, problems.texts, small, words),
        "causal LM, GPT-2": Task(problems.gpt2, problems.texts, small, words),
        "masked LM": Task(problems.bert_mlm, problems.texts, small, masks),
        "multiple choice": Task(problems.bert_choice, problems.questions, small, words),
    }


def variants() -> list[str]:
    """The names of all that is fitted."""
    from pyrolora import guides

    return list(dict.fromkeys([*guides.available(), *MORE, *SECOND]))


def fitted(name: str, task: Task) -> Any:
    """The posterior of that variant."""
    import pyrolora
    from pyrolora import guides

    def fit(model: Any, guide: Any, epochs: int | None = 2, **more: Any) -> Any:
        torch.manual_seed(0)
        return pyrolora.fit(
            model,
            task.data(24),
            guide=guide,
            eval_data=task.data(8),
            tokenizer=task.tokenizer,
            epochs=epochs,
            batch_size=6,
            seed=1,
            **more,
        )

    adapter = {"adapter": pyrolora.AdapterConfig(**task.adapter)}
    if name in SECOND:
        first, second, role, epochs = SECOND[name]
        earlier = fit(task.network(), first, **adapter)
        if role == "prior":
            return fit(earlier.base, second, prior=earlier, epochs=epochs)
        return fit(earlier, second, epochs=epochs)
    guide = guides.from_options(*MORE.get(name, (name, {})))
    return fit(task.network(), guide, **(adapter if guide.adapts else {}))


def numbers_of(name: str, task: Task) -> dict[str, Any]:
    """What the variant's fit gives: tensors by name of the posterior, its history and its
    predictions; or the error in their place."""
    try:
        posterior = fitted(name, task)
        prediction = posterior.predict(task.data(7), num_samples=3, seed=0)
    except Exception as error:
        ours = type(error).__module__.partition(".")[0] == "pyrolora"
        return {"refused" if ours else "failed": f"{type(error).__name__}: {error}"}
    said = {part.name: getattr(prediction, part.name) for part in dataclasses.fields(prediction)}
    return {
        "tensors": dict(posterior.model.own_state()),
        "losses": {
            f"{i}.{key}": torch.tensor(value, dtype=torch.float64)
            for i, entry in enumerate(posterior.history)
            for key, value in sorted(entry.items())
            if isinstance(value, int | float) and not key.endswith(TIMES)
        },
        "predictions": {
            key: torch.as_tensor(value)
            for key, value in sorted(said.items())
            if isinstance(value, Tensor | float)
        },
    }


def dump(file: Path, only: Sequence[str]) -> None:
    """Make all fits with the pyrolora that is first on the path, and save what they give."""
    import datasets

    import pyrolora

    tree = Path(os.environ["PYTHONPATH"].partition(os.pathsep)[0])
    if Path(pyrolora.__file__).resolve().parent.parent != tree:
        raise SystemExit(f"expected the pyrolora of {tree}, got that of {pyrolora.__file__}")
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    jobs = {
        (name, title): task
        for title, task in tasks().items()
        for name in variants()
        if not only or {name, title} & {*only}
    }
    bar = tqdm(jobs.items(), desc="fits", disable=False)
    gc.freeze()  # accelerate collects after every fit: most of its time, over all of the libraries
    with contextlib.chdir(file.parent):  # nothing that a fit writes stays in the checkout
        torch.save({key: numbers_of(key[0], task) for key, task in bar}, file)


# Both commits -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The largest absolute one of two lists of tensors, and what makes them no match."""

    largest: float
    note: str = ""


def renamed(name: str) -> str:
    """The tensor's name in the new commit."""
    for old, new in RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def difference(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Difference:
    """Of tensors that have to agree in name, order, shape, type and every value."""
    names = [renamed(name) for name in old], [renamed(name) for name in new]
    if len(old) != len(new):
        odd = sorted({*names[0]} ^ {*names[1]})
        return Difference(math.inf, f"{len(old)} and {len(new)} tensors, not in both: {odd[:3]}")
    notes, largest = [], 0.0
    for here, there, a, b in zip(*names, old.values(), new.values(), strict=True):
        if here != there:
            notes.append(f"{here} is now {there}")
        if a.dtype != b.dtype:
            notes.append(f"{there} was {a.dtype}, is {b.dtype}")
        if a.shape != b.shape:
            notes.append(f"{there} was {(*a.shape,)}, is {(*b.shape,)}")
            largest = math.inf
        else:
            largest = max(largest, gap(a, b))
    return Difference(largest, "; ".join(notes[:2]))


def gap(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; NaN differs from all but NaN."""
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    apart = (a - b).abs()[~same].nan_to_num(nan=math.inf, posinf=math.inf)
    return apart.max().item() if len(apart) else 0.0


PARTS = ("tensors", "losses", "predictions")


@dataclass(frozen=True)
class Row:
    """A line of the table, and whether both commits agree in it."""

    guide: str
    task: str
    same: bool
    tensors: int = 0
    largest: tuple[float, ...] = ()
    note: str = ""


def row_of(guide: str, task: str, old: dict[str, Any] | None, new: dict[str, Any] | None) -> Row:
    """One fit at both commits; None where a commit has no such guide."""
    if old is None:
        return Row(guide, task, True, note="only in the new commit")
    if new is None:
        return Row(guide, task, False, note="only in the old commit")
    for kind in ("failed", "refused"):
        texts = [found[kind] for found in (old, new) if kind in found]
        if len(texts) == 2:
            first, second = (text.partition(":")[0] for text in texts)
            same = first == second and kind == "refused"
            return Row(
                guide,
                task,
                same,
                note=f"{kind} in both" if same else f"{kind}: {' / '.join(texts)}",
            )
        if texts:
            where = "old" if kind in old else "new"
            return Row(guide, task, False, note=f"{kind} in the {where} commit alone: {texts[0]}")
    found = [difference(old[part], new[part]) for part in PARTS]
    note = "; ".join(f"{p}: {d.note}" for p, d in zip(PARTS, found, strict=True) if d.note)
    largest = tuple(d.largest for d in found)
    return Row(guide, task, not note and not any(largest), len(new["tensors"]), largest, note)


def compared(old: Mapping[Any, dict[str, Any]], new: Mapping[Any, dict[str, Any]]) -> list[Row]:
    """A row for every guide of either commit on every task."""
    return [row_of(*key, old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new])]


def shown(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}"


def show(rows: Sequence[Row]) -> None:
    """Print the table, and the largest differences below it."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("guide", "task"):
        table.add_column(title, no_wrap=True)
    for title in ("tensors", *(f"Δ {part}" for part in PARTS)):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in rows:
        values = [shown(value) for value in row.largest] or ["", "", ""]
        count = str(row.tensors) if row.largest else ""
        style = "" if row.same else "red"
        table.add_row(row.guide, row.task, count, *values, row.note, style=style)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    fits = [row.largest for row in rows if row.largest]
    largest = [max(values) for values in zip(*fits, strict=True)] or [math.nan] * 3
    parts = ", ".join(f"{p} {shown(v)}" for p, v in zip(PARTS, largest, strict=True))
    apart = sum(not row.same for row in rows)
    refused = sum(row.note == "refused in both" for row in rows)
    console.print(
        f"largest differences: {parts}; {len(fits)} fits compared, {refused} refused in both, "
        f"{apart} not the same",
        soft_wrap=True,
    )


# The job ----------------------------------------------------------------------------------------


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def checked_out(reference: str | None, folder: Path) -> Iterator[Path]:
    """That commit in a folder of its own; None: this checkout, with what is not committed."""
    if reference is None:
        yield ROOT
        return
    git("worktree", "add", "--detach", str(folder), reference)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def numbers_at(reference: str | None, folder: Path, only: Sequence[str]) -> dict[Any, Any]:
    """All numbers of one commit, made in a process that has its pyrolora alone."""
    folder.mkdir()
    with checked_out(reference, folder / "tree") as tree:
        paths = [str(tree), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        subprocess.run(
            [sys.executable, __file__, "--dump", str(folder / "numbers.pt"), "--only", *only],
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            check=True,
        )
    return torch.load(folder / "numbers.pt", weights_only=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", metavar="REF", help="the commit to compare with")
    parser.add_argument("--new", metavar="REF", help="the other one; by default the working tree")
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        metavar="NAME",
        help="guides or tasks, by the table's names",
    )
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.dump is None and args.old is None:
        parser.error("--old is required")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.dump is not None:
        dump(args.dump, args.only)
        return 0
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for side, reference in (("old", args.old), ("new", args.new)):
            if reference is not None:
                reference = git("rev-parse", "--verify", f"{reference}^{{commit}}")
            print(f"{side}: {reference or 'the working tree'}", flush=True)
            found.append(numbers_at(reference, Path(folder).resolve() / side, args.only))
    rows = compared(*found)
    if not rows:
        raise SystemExit(f"no guide and no task is called {' or '.join(args.only)}")
    show(rows)
    return 0 if all(row.same for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

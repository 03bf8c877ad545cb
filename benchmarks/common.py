"""What the benchmarks share: the machine, the versions, the model's identity, tables, files."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainingArguments

from pyrolora.storage import as_json

PACKAGES = ("pyrolora", "torch", "pyro-ppl", "transformers", "peft", "datasets", "arviz")
RESULTS = Path("benchmarks/results")
BLOCK = 1 << 20


# Arguments --------------------------------------------------------------------------------------


def existing_folder(value: str) -> Path:
    """An argparse type."""
    path = Path(value)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{value!r} is not a folder")
    return path


def model_folder(value: str) -> Path:
    """An argparse type: a folder with a transformers model in it."""
    path = existing_folder(value)
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise argparse.ArgumentTypeError(
            f"{value!r} has no config.json (it has {found}); expected a folder that "
            "save_pretrained wrote, with config.json and model.safetensors"
        )
    return path


def positive(value: str) -> int:
    """An argparse type: a whole number >= 1."""
    if not value.isdigit() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {value!r}")
    return int(value)


def pick_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the accelerator, if there is one."""
    if name != "auto":
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


# Identity of what was measured ------------------------------------------------------------------


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Package -> version, None where it is not installed; and Python's own."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """The processor, its cores, torch's threads, the GPU; nothing that names the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    """Linux has the model's name in /proc/cpuinfo; elsewhere Python's best guess."""
    info = Path("/proc/cpuinfo")
    match = None
    if info.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def describe_network(network: nn.Module) -> dict[str, Any]:
    """Class, shape and size of a transformers model."""
    config: Any = network.config
    return {
        "class": type(network).__name__,
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


def digest(paths: Iterable[Path]) -> str:
    """16 hexadecimal digits of the contents of files: results of other files are no match."""
    sha = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                sha.update(block)
    return sha.hexdigest()[:16]


def tag(device: torch.device) -> str:
    """A part of a file name: ``cpu``, or the GPU's name."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


# Time -------------------------------------------------------------------------------------------


def milliseconds(action: Callable[[], object], device: torch.device) -> float:
    """How long ``action`` takes, until the device has done its work."""
    start = time.perf_counter()
    action()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def take_turns(
    actions: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    device: torch.device,
    label: str,
) -> dict[str, list[float]]:
    """Milliseconds of each action, in turns; round k starts with action k. The first ``warmup``
    rounds do not count."""
    names = list(actions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in tqdm(range(warmup + rounds), desc=label):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            spent = milliseconds(actions[name], device)
            if turn >= warmup:
                times[name].append(spent)
    return times


def time_table(times: Mapping[str, list[float]], references: Iterable[str]) -> pd.DataFrame:
    """One row a contestant: median and quartiles, and the median over rounds of the ratio to each
    reference in the same round."""
    values = pd.DataFrame(times)
    frame = values.quantile([0.25, 0.5, 0.75]).T
    frame.columns = pd.Index(["q25_ms", "median_ms", "q75_ms"])
    for reference in references:
        if reference in values:
            frame[f"to {reference}"] = values.div(values[reference], axis=0).median()
    return frame.rename_axis("contestant").reset_index()


def short_training(folder: str, device: torch.device, **options: Any) -> TrainingArguments:
    """The Trainer's arguments for a few steps that write and show nothing."""
    return TrainingArguments(
        folder,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        **options,
    )


# Output -----------------------------------------------------------------------------------------


@contextmanager
def quiet_loading() -> Any:
    """Without transformers' report of the new task head, and without its bars for the weights."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def with_earlier(path: Path, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of the results' file at ``path``, and these in place of those of the same cases."""
    earlier = json.loads(path.read_text())["runs"] if path.is_file() else []
    by_case = {run["case"]: run for run in [*earlier, *runs]}
    return list(by_case.values())


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """What a result was made with: the arguments, but for its place, versions, hardware."""
    given = {name: value for name, value in vars(args).items() if name != "out"}
    return {"arguments": given, "versions": versions(), "hardware": hardware()}


def save_json(path: Path, payload: Mapping[str, Any]) -> None:
    """Write a JSON file and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(payload))
    print(f"saved {path}")


def show(frame: pd.DataFrame, digits: int = 2) -> None:
    """Print a table."""
    text = frame.to_string(index=False, float_format=lambda x: f"{x:.{digits}f}", na_rep="")
    print(f"\n{text}\n")


def markdown(frame: pd.DataFrame, digits: int = 3) -> str:
    """A table in Markdown; numbers to the right."""
    numeric = [pd.api.types.is_numeric_dtype(frame[name]) for name in frame.columns]
    rows = [
        [f"{value:.{digits}f}" if isinstance(value, float) else str(value) for value in row]
        for row in frame.itertuples(index=False)
    ]
    rule = ["---:" if number else "---" for number in numeric]
    lines = [list(map(str, frame.columns)), rule, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

"""The checkpoints of a fit: which are whole, and of which fit they are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer_pt_utils import safe_globals

from pyrolora.data.examples import TensorExamples
from pyrolora.data.prepared import Prepared
from pyrolora.errors import CheckpointError, ConfigError
from pyrolora.guides import Guide, full_name
from pyrolora.model import JointModel

STATE_FILE = "adapters.safetensors"
FIT_FILE = "fit.json"
TRAINER_FILE = "trainer_state.json"
PICKLES = ("optimizer.pt", "scheduler.pt")
MEMBER = "member-"
SAMPLED = 1000
"""Examples of a data set of a user's own class that its digest reads; of others, all."""

_NAME = re.compile(r"checkpoint-\d+")
_SCHEDULE = (
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("lr_scheduler_kwargs", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "max_grad_norm", "per_device_train_batch_size", "world_size", "bf16", "fp16"),
    *("gradient_accumulation_steps", "seed", "data_seed", "dataloader_drop_last"),
    *("train_sampling_strategy",),
)


def checkpoints(folder: str | Path) -> list[Path]:
    """The folders of the Trainer's checkpoints, whole or not."""
    found = Path(folder).glob("checkpoint-*")
    return [path for path in found if path.is_dir() and _NAME.fullmatch(path.name)]


def checkpoint_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def member_folders(folder: str | Path) -> list[Path]:
    """The folders in which the members of an ensemble keep their checkpoints."""
    found = Path(folder).glob(f"{MEMBER}*")
    return sorted(p for p in found if p.is_dir() and p.name.removeprefix(MEMBER).isdigit())


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint, with a warning that names a newer one which is not."""
    return _warned(*newest_whole(folder))


def newest_whole(folder: str | Path) -> tuple[Path | None, str | None]:
    """The newest whole checkpoint, and what there is to say of a newer one which is not."""
    return _first_whole(sorted(checkpoints(folder), key=checkpoint_step, reverse=True))


def checkpoint_to_resume(asked: str | Path | bool, folder: str | Path) -> Path:
    """The checkpoint that was asked for: a folder, or True for the newest one of ``folder``. In the
    place of one that is not whole comes the next older one beside it, with a warning.

    Raises
    ------
    ConfigError
        When there is none.
    CheckpointError
        When there is none that is whole.
    """
    if isinstance(asked, bool):
        found = checkpoints(folder)
        if not found:
            raise ConfigError(
                f"resume_from_checkpoint=True, and there is no checkpoint in {folder}; leave it "
                "out to begin anew, or set output_dir to the folder of the fit"
            )
    else:
        path = Path(asked)
        if not path.is_dir():
            raise ConfigError(f"resume_from_checkpoint={str(asked)!r} is no folder")
        inside = sorted(checkpoints(path), key=checkpoint_step)
        if inside and not (path / TRAINER_FILE).exists():
            raise ConfigError(
                f"resume_from_checkpoint={str(asked)!r} is no checkpoint, and holds some: pass "
                f"{str(inside[-1])!r}"
            )
        found = [path]
        if _NAME.fullmatch(path.name):
            step = checkpoint_step(path)
            found += [c for c in checkpoints(path.parent) if checkpoint_step(c) < step]
    if len(found) > 1:
        found.sort(key=checkpoint_step, reverse=True)
    whole = _warned(*_first_whole(found))
    if whole is None:
        raise CheckpointError(
            f"there is no whole checkpoint to go on from: {found[0]}: {damage(found[0])}; begin "
            "anew, without resume_from_checkpoint"
        )
    return whole


def _first_whole(newest_first: list[Path]) -> tuple[Path | None, str | None]:
    for checkpoint in newest_first:
        if damage(checkpoint) is None:
            passed = newest_first[0]
            if passed == checkpoint:
                return checkpoint, None
            reason = damage(passed)
            return checkpoint, f"going on from {checkpoint}, since {passed} is not whole: {reason}"
    return None, None


def _warned(checkpoint: Path | None, note: str | None) -> Path | None:
    if note is not None:
        warnings.warn(note, stacklevel=3)
    return checkpoint


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole, or None: every part of it is there and can be read. They are
    data, and what else a pickle may hold is not run."""
    try:
        state, fit = read_json(checkpoint / TRAINER_FILE), read_json(checkpoint / FIT_FILE)
        named = _NAME.fullmatch(checkpoint.name)
        if not _is_state(state) or (named and state["global_step"] != checkpoint_step(checkpoint)):
            return f"{TRAINER_FILE} is not the Trainer's"
        if not all(isinstance(fit.get(name), dict) for name in ("fit", "averages")):
            return f"{FIT_FILE} is not pyrolora's"
        read_state(checkpoint / STATE_FILE)
        generators = sorted(p.name for p in checkpoint.glob("rng_state*.pth"))
        scaler = [p.name for p in checkpoint.glob("scaler.pt")]  # under float16 alone
        for name in (*PICKLES, *(generators or ["rng_state.pth"]), *scaler):
            read_tensors(checkpoint / name)
    except CheckpointError as error:
        return str(error)
    return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON, or a `CheckpointError`."""
    try:
        found = json.loads(_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"cannot read {path}: it holds no object")
    return found


def read_tensors(path: Path) -> Any:
    """What `torch.save` wrote, tensors, numbers and their containers alone; or a
    `CheckpointError`."""
    try:
        with safe_globals():  # NumPy's arrays, in which its generator keeps its state
            return torch.load(_file(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of a pickle that is damaged, any
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"cannot read {path}: {reason}") from error


def read_state(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file, or a `CheckpointError`."""
    try:
        return load_file(_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the saved tensors {path}: {error}") from error


def save_state(joint: JointModel, path: Path, notes: dict[str, str] | None = None) -> None:
    """Write a posterior's own tensors as safetensors, with notes in their header."""
    save_file(joint.own_state(), path, notes)


def _file(path: Path) -> Path:
    """A plain file: of a pipe or a device the end is never reached."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    return path


def _is_state(state: Mapping[str, Any]) -> bool:
    """Whether the Trainer can take it: of what it reads, each has its type."""
    kinds: dict[str, Any] = {
        "global_step": int,
        "log_history": list,
        "stateful_callbacks": dict,
        "train_batch_size": int,
        "epoch": (int, float, type(None)),
        "best_metric": (int, float, type(None)),
        "best_global_step": (int, type(None)),
        "best_model_checkpoint": (str, type(None)),
        "num_input_tokens_seen": int,
        "total_flos": (int, float),
    }
    from transformers import TrainerState

    names = {field.name for field in dataclasses.fields(TrainerState)}
    return (
        set(state) <= names
        and all(isinstance(state.get(name), kind) for name, kind in kinds.items())
        and state["global_step"] > 0
        and all(isinstance(entry, dict) for entry in state["log_history"])
    )


# Of which fit -------------------------------------------------------------------------------------


def describe_fit(
    joint: JointModel, guide: Guide, data: Prepared, args: TrainingArguments
) -> dict[str, Any]:
    """What a fit's numbers depend on, for JSON: two fits that differ in it cannot go on from one
    another's checkpoints. The weights of the network are not read: its class and size are told."""
    base = sum(parameter.numel() for parameter in joint.base.parameters())
    described = {
        "network": {"class": type(joint.base).__name__, "parameters": base},
        "guide": {"name": full_name(guide), **dataclasses.asdict(guide)},
        "adapter": dataclasses.asdict(joint.program.bank.config),
        "layers": list(joint.program.bank.specs),
        "task": joint.task.name,
        "num_examples": len(data),
        "data_digest": digest_of_data(data),
        "constants_digest": _digest_of_constants(joint),
        "training": {name: getattr(args, name) for name in _SCHEDULE},
    }
    plain: dict[str, Any] = json.loads(json.dumps(described, default=_plain))
    return plain


def check_fit(now: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise `ConfigError` unless the checkpoint is one of the fit that `describe_fit` tells."""
    check_same_fit(read_json(checkpoint / FIT_FILE)["fit"], now, checkpoint)


def check_same_fit(saved: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raise `ConfigError`, naming the differences, for two fits that are not the same."""
    changed = differences(saved, now)
    if changed:
        raise ConfigError(
            f"{where} is of another fit: {'; '.join(changed)}; resume with the same (the schedule "
            "depends on the number of steps, too), or begin anew in another output_dir"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The entries of nested mappings that differ, as text."""
    found = []
    for name in dict.fromkeys([*old, *new]):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now, f"{prefix}{name}.")
        elif before != now:
            found.append(f"{prefix}{name} was {before!r}, now {now!r}")
    return found


def digest_of_data(data: Prepared) -> str:
    """A digest of the examples and their labels: of tables and tensors all, of a data set of a
    user's own class up to `SAMPLED`, evenly spaced."""
    digest = hashlib.blake2b(digest_size=16)
    if data.labels is not None:
        _add(digest, data.labels)
    examples = data.examples
    if isinstance(examples, TensorExamples):
        for name, column in examples.columns.items():
            digest.update(name.encode())
            _add(digest, torch.as_tensor(column))
    elif isinstance(examples, datasets.Dataset):
        for table in examples.with_format("arrow").iter(10_000):
            digest.update(_bytes_of(table))
    else:
        count = min(SAMPLED, len(examples))
        for i in range(count):
            batch = data.collate([examples[i * len(examples) // count]])
            for name, value in sorted(batch.items()):
                digest.update(name.encode())
                _add(digest, torch.as_tensor(value))
    return digest.hexdigest()


def _digest_of_constants(joint: JointModel) -> str:
    """Of the posterior's own parameters that are given and stay as they are: not of scales that are
    settled."""
    program = joint.program
    settled = {f"program.{name}" for name in program.scale_parameters() if program.settles}
    digest = hashlib.blake2b(digest_size=16)
    own = joint.own_state()
    for name, parameter in joint.named_parameters():
        if name in own and name not in settled and not parameter.requires_grad:
            digest.update(name.encode())
            _add(digest, own[name])
    return digest.hexdigest()


def _bytes_of(table: pa.Table) -> bytes:
    """The content of a table, however it lies in memory."""
    sink = pa.BufferOutputStream()
    plain = table.combine_chunks().replace_schema_metadata(None)
    with pa.ipc.new_stream(sink, plain.schema) as stream:
        stream.write_table(plain)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _add(digest: Any, tensor: Tensor) -> None:
    plain = tensor.detach().cpu().contiguous()
    digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy())


def _plain(value: Any) -> Any:
    """What JSON has no word for, as text."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return str(value)

"""The identity of a fit: everything that its numbers depend on, as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from torch import Tensor
from transformers import TrainingArguments

from pyrolora.data.examples import TensorExamples
from pyrolora.data.prepared import Prepared
from pyrolora.errors import ConfigError
from pyrolora.guides import Guide, full_name
from pyrolora.inference.checkpoints import FIT_FILE, read_json
from pyrolora.model import JointModel

SAMPLED = 1000
"""Number of examples that the digest reads of a data set of a user's own class."""

_SCHEDULE = (
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("lr_scheduler_kwargs", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "max_grad_norm", "per_device_train_batch_size", "world_size", "bf16", "fp16"),
    *("gradient_accumulation_steps", "seed", "data_seed", "dataloader_drop_last"),
    *("train_sampling_strategy",),
)


def describe_fit(
    joint: JointModel, guide: Guide, data: Prepared, args: TrainingArguments
) -> dict[str, Any]:
    """Return everything that a fit's numbers depend on, for JSON.

    Two fits that differ in it cannot go on from one another's checkpoints. The network is described
    by its class and size; its weights are not read.
    """
    base = sum(parameter.numel() for parameter in joint.base.parameters())
    described = {
        "network": {"class": type(joint.base).__name__, "parameters": base},
        "guide": {"name": full_name(guide), **dataclasses.asdict(guide)},
        "adapter": dataclasses.asdict(joint.program.bank.config),
        "layers": list(joint.program.bank.specs),
        "task": joint.task.name,
        "num_examples": data.num_examples,
        "data_digest": digest_of_data(data),
        "constants_digest": _digest_of_constants(joint),
        "training": {name: getattr(args, name) for name in _SCHEDULE},
    }
    plain: dict[str, Any] = json.loads(json.dumps(described, default=_plain))
    return plain


def check_fit(now: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise `ConfigError` unless the checkpoint is one of the fit that `describe_fit` describes."""
    check_same_fit(read_json(checkpoint / FIT_FILE)["fit"], now, checkpoint)


def check_same_fit(saved: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raise `ConfigError` for two fits that are not the same, naming the differences."""
    changed = differences(saved, now)
    if changed:
        raise ConfigError(
            f"{where} is of another fit: {'; '.join(changed)}; resume with the same settings (the "
            "schedule depends on the number of steps, too), or begin anew in another output_dir"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the entries of nested mappings that differ, as text."""
    changes = []
    for name in dict.fromkeys([*old, *new]):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            changes += differences(before, now, f"{prefix}{name}.")
        elif before != now:
            changes.append(f"{prefix}{name} was {before!r}, now {now!r}")
    return changes


def digest_of_data(data: Prepared) -> str:
    """Return a digest of the examples and their labels.

    Tables and tensors are read whole; a data set of a user's own class at `SAMPLED` examples,
    evenly spaced.
    """
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


def known_digest(data: Prepared) -> str | None:
    """Return the digest of tables and tensors; a data set of a user's own class has none.

    Such a class may make its examples at random, and reading them would move its generators.
    """
    if isinstance(data.examples, TensorExamples | datasets.Dataset):
        return digest_of_data(data)
    return None


def _digest_of_constants(joint: JointModel) -> str:
    """Return a digest of the posterior's parameters that are constants of the fit.

    Scales that are settled are none.
    """
    program = joint.program
    settled = {f"program.{name}" for name in program.scale_parameters() if program.settles}
    digest = hashlib.blake2b(digest_size=16)
    state = joint.own_state()
    for name, parameter in joint.named_parameters():
        if name in state and name not in settled and not parameter.requires_grad:
            digest.update(name.encode())
            _add(digest, state[name])
    return digest.hexdigest()


def _bytes_of(table: pa.Table) -> bytes:
    """Return the content of a table, independent of its layout in memory."""
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
    """Return values that JSON cannot express as text."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return str(value)

"""Trackers get the ELBO and every KL by the Trainer's own ``report_to``, without a network."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from problems import arguments, bert, reviews, tokenizer

import pyrolora
from pyrolora import AdapterConfig, Posterior

NUMBERS = ("elbo", "log_likelihood", "loss", "kl/A", "kl/B")


def fit(folder: Path, tracker: str) -> Posterior:
    return pyrolora.fit(
        bert(),
        reviews(12),
        pyrolora.guides.MeanField(latent="AB"),
        tokenizer=tokenizer(),
        adapter=AdapterConfig(r=2),
        training=arguments(folder, max_steps=3, logging_steps=1, report_to=tracker),
    )


def compare(found: dict[str, list[float]], posterior: Posterior) -> None:
    """Every number of the history, under the Trainer's prefix."""
    for name in NUMBERS:
        logged = [entry[name] for entry in posterior.history if "elbo" in entry]
        assert found[f"train/{name}"] == pytest.approx(logged, rel=1e-5)


def columns(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    return {
        f"train/{name}": [row[f"train/{name}"] for row in rows if f"train/{name}" in row]
        for name in NUMBERS
    }


def records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format, in which an offline run is kept."""
    block, place, parts = 32768, 7, b""  # after the file's own header
    while place + 7 <= len(content):
        if block - place % block < 7:  # no header fits, and zeros fill the block
            place += block - place % block
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_tensorboard_gets_the_elbo_and_every_kl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    posterior = fit(tmp_path / "out", "tensorboard")
    found: dict[str, list[float]] = {}
    for file in tmp_path.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(file))
        events.Reload()
        found |= {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    compare(found, posterior)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_and_biases_offline_gets_the_elbo_and_every_kl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    posterior = fit(tmp_path / "out", "wandb")
    wandb.teardown()  # waits for its process, which writes the file
    (file,) = tmp_path.rglob("run-*.wandb")
    rows: list[dict[str, Any]] = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = record.history.item
        rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    compare(columns(rows), posterior)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_trackio_gets_the_elbo_and_every_kl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trackio = pytest.importorskip("trackio")

    for module in (trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path, raising=False)
    posterior = fit(tmp_path / "out", "trackio")
    (file,) = tmp_path.rglob("*.db")
    with sqlite3.connect(file) as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics")]
    compare(columns(rows), posterior)

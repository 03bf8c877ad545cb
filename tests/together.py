"""What two processes share out, verb by verb: parts of the script `processes.py`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from problems import (
    Rows,
    arguments,
    bert,
    llama,
    mlp,
    summaries,
    t5,
    tokens,
    writer_tokenizer,
)
from torch import Tensor

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import DataError, PyroLoraError
from pyrolora.guides import NUTS, Ensemble
from pyrolora.model import JointModel
from pyrolora.predictive import draw_factors, predict
from pyrolora.predictive.continuations import Writer

FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
CHAINS = NUTS(chains=3, num_samples=4, warmup_steps=8, max_tree_depth=3)


def fitted(folder: Path, guide: Any, processes: int, network: Any = None, **options: Any) -> Any:
    """Fit a small encoder to 16 texts, 8 per step, with an evaluation in between."""
    usual: dict[str, Any] = {"max_steps": 4, "logging_steps": 1, "eval_strategy": "steps"}
    usual |= {"eval_steps": 2, "per_device_train_batch_size": 8 // processes}
    return pyrolora.fit(
        bert() if network is None else network,
        tokens(16),
        guide,
        adapter=AdapterConfig(r=2),
        eval_data=tokens(10, seed=1),
        training=arguments(folder, ddp_find_unused_parameters=False, **{**usual, **options}),
    )


def numbers(posterior: Any) -> dict[str, Any]:
    """Return everything that a fit came to, but for times."""
    timed = ("runtime", "per_second")
    log = [
        {name: v for name, v in entry.items() if not name.endswith(timed)}
        for entry in posterior.history
    ]
    return {"log": log, "state": posterior.model.own_state()}


def read(posterior: Any) -> dict[str, Any]:
    """Predict and evaluate 10 texts in batches of 3, so that one process has a batch more."""
    data = tokens(10, seed=1)
    return {
        "probs": posterior.predict(data, 4, seed=0, batch_size=3).draws,
        "drawn": posterior.predict(data, draws=[1, 0], batch_size=3).draws,
        "metrics": posterior.evaluate(data, 4, seed=0, batch_size=3),
        "mean": posterior.predict(data, 0, batch_size=3).draws,
    }


def members(folder: Path, processes: int = 1) -> dict[str, Any]:
    """Fit an ensemble, whose members are each trained in one process."""
    posterior = fitted(folder / "ensemble", Ensemble(members=3), 1, save_strategy="epoch")
    return {**numbers(posterior), **read(posterior)}


def chains(folder: Path, processes: int = 1) -> dict[str, Any]:
    """Draw Markov chains, after a point estimate of all processes."""
    options: dict[str, Any] = {"adapter": AdapterConfig(r=2)}
    options["training"] = arguments(folder, max_steps=1, per_device_train_batch_size=6 // processes)
    data = torch.arange(24.0).reshape(6, 4).sin(), torch.arange(6) % 3
    posterior = pyrolora.fit(mlp(), data, CHAINS, task="classification", **options)
    return posterior.sample(draws=range(12))


def written(folder: Path, processes: int = 1) -> dict[str, Any]:
    """Have three draws continue three prompts, greedily and by sampling."""
    posterior = pyrolora.fit(
        llama(), tokens(8).remove_columns("labels"), "meanfield", adapter=AdapterConfig(r=2)
    )
    prompts = [[4, 5, 6], [7, 8], [9, 10, 11]]

    def made(**options: Any) -> dict[str, Any]:
        texts = posterior.generate(prompts, draws=[0, 1, 2], seed=1, max_new_tokens=4, **options)
        return {"ids": texts.sequences, "scores": texts.log_likelihood}

    kinds: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"do_sample": True}}
    found: dict[str, Any] = {"alone": {name: made(**options) for name, options in kinds.items()}}
    with pyrolora.all_processes():
        found["together"] = {name: made(**options) for name, options in kinds.items()}
    return found


def shared(folder: Path, processes: int) -> dict[str, Any]:
    """Predict inside and outside of a block, and without a seed."""
    posterior = fitted(folder / "shared", "montec", processes)
    found: dict[str, Any] = {"alone": read(posterior)}
    torch.manual_seed(torch.distributed.get_rank())
    with pyrolora.all_processes(), pyrolora.all_processes():
        found["together"] = read(posterior)
        found["unseeded"] = posterior.predict(tokens(5), 3, batch_size=2).draws
    if torch.distributed.get_rank() == 0:
        posterior.predict(tokens(4), 2)  # nobody waits for the other
    found["refused"] = refusals(posterior)
    return found


def refusals(posterior: Any) -> dict[str, str]:
    """Return the errors of calls that differ between the processes."""
    rank = torch.distributed.get_rank()
    prepared = posterior.predictor.prepare(tokens(4), need_labels=False)
    broken = dataclasses.replace(prepared, examples=Spoiled(prepared.examples))
    factors = draw_factors(posterior.model, 2, seed=0)
    calls: dict[str, Callable[[], Any]] = {
        "one seed": lambda: posterior.predict(tokens(4), 2, seed=rank or None),
        "draws": lambda: posterior.predict(tokens(4), 2, seed=rank, batch_size=2),
        "data": lambda: posterior.predict(tokens(4 + 4 * rank), 2, seed=0, batch_size=2),
        "one fails": lambda: predict(posterior.model, broken, factors, batch_size=2),
    }
    found = {}
    for name, call in calls.items():
        with pyrolora.all_processes():
            found[name] = error_of(call)
    found["one call"] = error_of(lambda: called_by_the_first(posterior))
    return found


def called_by_the_first(posterior: Any) -> None:
    """Have one process predict in a block that the other one leaves."""
    with pyrolora.all_processes():
        if torch.distributed.get_rank() == 0:
            posterior.predict(tokens(4), 2, seed=0)


class Spoiled(Rows):
    """Examples of which the second process cannot read the last one, which is its own to read."""

    def __getitem__(self, index: int) -> Any:
        if index == 3 and torch.distributed.get_rank() == 1:
            raise DataError("example 3 cannot be read")
        return self.rows[index]


def sharded(folder: Path, processes: int) -> dict[str, Any]:
    """Fit with FSDP2 and without, resume, and use every verb."""
    plain = fitted(folder / "plain", "montec", processes)
    saved = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(folder / "fsdp")}
    posterior = fitted(folder / "fsdp", "montec", processes, **FSDP, **saved)
    saved["resume_from_checkpoint"] = str(folder / "fsdp" / "checkpoint-2")
    resumed = fitted(folder / "fsdp", "montec", processes, **FSDP, **saved)
    held = sum(p.to_local().numel() for p in local(posterior.base))
    found = {
        "plain": {**numbers(plain), **read(plain)},
        "sharded": numbers(posterior),
        "resumed": numbers(resumed),
        "share of the weights": held / sum(p.numel() for p in local(posterior.base)),
        "outside": error_of(lambda: read(posterior)),
        "identities": [plain.identity == posterior.identity, type(posterior.base).__name__],
    }
    with pyrolora.all_processes():
        found["sharded"] |= read(posterior)
        found["merge"] = error_of(posterior.merge)
        again = fitted(folder / "again", "laplace", processes, posterior.base, **FSDP)
        found["a second fit"] = numbers(again)
    found["a second fit of the whole"] = numbers(fitted(folder / "again", "laplace", processes))
    if torch.distributed.get_rank() == 0:
        posterior.save(folder / "saved", peft=True)
    return found


def local(network: Any) -> list[Any]:
    """Return the parameters of which each process has a part."""
    return [p for p in network.parameters() if hasattr(p, "to_local")]


def guides(folder: Path, processes: int) -> dict[str, Any]:
    """Fit every guide with adapters to a whole network and to a sharded one."""
    short = {"nuts": CHAINS, "ensemble": Ensemble(members=2, side_by_side=True)}
    found = {}
    for name in sorted({*pyrolora.guides.available()} - {"full"}):
        each = []
        for more in ({}, FSDP):
            posterior = fitted(folder / name, short.get(name, name), processes, **more)
            with pyrolora.all_processes():
                each.append({**numbers(posterior), **read(posterior)})
        found[name] = as_json(each)
    return found


def networks(folder: Path, processes: int) -> dict[str, Any]:
    """Fit and use networks of several kinds, whole and sharded."""
    found = {}
    for name, use in USES.items():
        found[name] = as_json([use(folder / name, processes, more) for more in ({}, FSDP)])
    return found


def trained(folder: Path, network: Any, data: Any, guide: Any, more: Any, **options: Any) -> Any:
    """Make two steps."""
    steps: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 4}
    reader, adapter = options.pop("tokenizer", None), options.pop("adapter", {})
    training = arguments(folder, logging_strategy="no", **steps, **options, **more)
    adapter = AdapterConfig(r=2, **adapter)
    return pyrolora.fit(network, data, guide, tokenizer=reader, adapter=adapter, training=training)


def continued(folder: Path, processes: int, more: dict[str, Any]) -> dict[str, Any]:
    """Go on from a posterior, by another guide and with other data."""
    point = trained(folder, bert(), tokens(16), "map", more)
    training = arguments(folder, max_steps=2, **more)
    guide = pyrolora.guides.MeanField(scale_updates="gradient")
    spread = pyrolora.fit(point, tokens(16), guide, training=training)
    first = trained(folder, point.base, tokens(16), "meanfield", more)
    second = pyrolora.fit(first.base, tokens(16, seed=3), prior=first, training=training)
    return {"spread": spread.model.own_state(), "second": second.model.own_state()}


def decoder(folder: Path, processes: int, more: dict[str, Any]) -> dict[str, Any]:
    """Have a language model with its last layer adapted write and choose words."""
    data = tokens(8).remove_columns("labels")
    target = {"target_modules": ["q_proj", "lm_head"]}
    posterior = trained(folder, llama(), data, "meanfield", more, adapter=target)
    sampled = {"do_sample": True, "num_beams": 2, "seed": 1}
    with pyrolora.all_processes():
        texts = [
            posterior.generate([[4, 5, 6], [7, 8]], draws=[0, 1], max_new_tokens=4, **options)
            for options in ({}, sampled)
        ]
    return {"ids": [text.sequences for text in texts], "scores": texts[0].log_likelihood}


def encoder_decoder(folder: Path, processes: int, more: dict[str, Any]) -> dict[str, Any]:
    """Have an encoder-decoder write, whose encoder is called by itself."""
    words = writer_tokenizer()
    posterior = trained(folder, t5(), summaries(8), "meanfield", more, tokenizer=words)
    with pyrolora.all_processes():
        texts = posterior.generate(["a good film", "the bad book"], draws=[0, 1], max_new_tokens=3)
    return {"ids": texts.sequences, "scores": texts.log_likelihood}


def checkpointed(folder: Path, processes: int, more: dict[str, Any]) -> dict[str, Any]:
    """Train in bfloat16 with activation checkpointing, from a start by gradients."""
    begun = {"init_lora_weights": "lora-ga"}
    options: dict[str, Any] = {"gradient_checkpointing": True, "bf16": True, "adapter": begun}
    return trained(folder, bert(), tokens(16), "montec", more, **options).model.own_state()


USES: dict[str, Callable[..., dict[str, Any]]] = {
    use.__name__: use for use in (continued, decoder, encoder_decoder, checkpointed)
}


def counted(folder: Path, processes: int) -> dict[str, Any]:
    """Count the passes of predictions, and the draws that write in one pass."""
    posterior = pyrolora.fit(
        llama(), tokens(8).remove_columns("labels"), "meanfield", adapter=AdapterConfig(r=2)
    )
    network, write = JointModel.network, Writer.write
    passes: list[int] = []
    draws: list[int] = []

    def counting(self: JointModel, *args: Any) -> Tensor:
        passes.append(1)
        return network(self, *args)

    def drawing(self: Writer, prompts: Any, others: Any, factors: Any) -> Any:
        draws.append(factors.draws)
        return write(self, prompts, others, factors)

    JointModel.network, Writer.write = counting, drawing  # type: ignore[method-assign]
    try:
        found = {}
        for name, block in (("alone", nullcontext()), ("together", pyrolora.all_processes())):
            passes.clear()
            with block:
                posterior.predict(tokens(8).remove_columns("labels"), 2, seed=0, batch_size=2)
                found[name] = len(passes)
                posterior.generate([[4, 5]], draws=range(6), max_new_tokens=1)
    finally:
        JointModel.network, Writer.write = network, write  # type: ignore[method-assign]
    return {**found, "draws at once": draws}


def resumed_apart(folder: Path, processes: int) -> dict[str, str]:
    """Have each process resume from a folder of its own, in which only the first has something."""
    own = folder / str(torch.distributed.get_rank())
    saving: dict[str, Any] = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    fitted(own, "map", processes, **saving)
    again = lambda: fitted(own, "map", processes, resume_from_checkpoint="auto", **saving)  # noqa: E731
    return {"error": error_of(again)}


def waited(folder: Path, processes: int) -> dict[str, Any]:
    """Have the first process alone open a block: it ends by itself."""
    began, found = time.monotonic(), ""
    if torch.distributed.get_rank() == 0:
        found = error_of(lambda: pyrolora.all_processes(timeout=0.5).__enter__())
        folder.mkdir()
    while not folder.exists():
        time.sleep(0.05)
    return {"error": found, "seconds": time.monotonic() - began}


def inputs(data: Any) -> dict[str, Tensor]:
    """Return the columns of tokens that a network reads."""
    return {name: torch.tensor(data[name][:]) for name in data.column_names if name != "labels"}


def error_of(call: Callable[[], Any]) -> str:
    """Return the error that a call ends with, as text; nothing without one."""
    try:
        call()
    except PyroLoraError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def as_json(value: Any) -> Any:
    """Return a value with its tensors as lists."""
    if isinstance(value, dict):
        return {name: as_json(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [as_json(entry) for entry in value]
    return value.tolist() if isinstance(value, Tensor) else value


LONGER: dict[str, Callable[[Path, int], dict[str, Any]]] = {"guides": guides, "networks": networks}
PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    part.__name__: part
    for part in (members, chains, shared, written, counted, sharded, resumed_apart, waited)
}

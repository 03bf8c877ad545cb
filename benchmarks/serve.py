"""Cost of the server: several posteriors, draws, memory, loading, and clients that hang up.

On the embedded encoder, which classifies, and the embedded decoder, which writes; everything in one
run, over real connections, the clients in the process of the server: (a) posteriors in turn against
one posterior under the same load; (b) draws against the mean adapter; (c) a pass whose rows have an
adapter each, against PEFT's; (d) the memory of network and posteriors; (e) the first request of a
posterior that is not loaded; (f) many requests, of which some hang up at random, each answer
compared with `Posterior.predict` or `Posterior.generate` of that posterior alone. The fits are
short: what they learn does not matter here.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import resource
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import httpx
import pandas as pd
import torch
import transformers
import uvicorn
from common import RESULTS, markdown, positive, provenance, save_json
from serve_beside_peft import beside_peft
from tqdm import tqdm

import pyrolora
from pyrolora import AdapterConfig, zoo
from pyrolora.serving.app import create_app
from pyrolora.serving.limits import Limits
from pyrolora.serving.registry import Registry
from pyrolora.serving.service import Service

SEED = 42
WORDS = [
    *("the", "array", "returns", "a", "value", "of", "each", "class", "and", "its", "file"),
    *("when", "no", "model", "was", "given"),
]


@dataclass
class Load:
    """A number of requests, so many at a time, and what became of them."""

    requests: int
    concurrency: int
    seconds: list[float] = field(default_factory=list)
    continuations: list[int] = field(default_factory=list)
    wrong: int = 0
    failed: int = 0
    hung_up: int = 0
    wall: float = 0.0

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.seconds) / self.wall

    @property
    def median(self) -> float:
        """Median seconds of an answer."""
        return statistics.median(self.seconds)

    def row(self, name: str) -> dict[str, Any]:
        ordered = sorted(self.seconds)
        return {
            "load": name,
            "requests": self.requests,
            "answers per second": round(self.rate, 1),
            "median ms": round(1000 * self.median, 1),
            "p95 ms": round(1000 * ordered[int(0.95 * (len(ordered) - 1))], 1),
        }


def texts(count: int, seed: int = 0) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(6, 14))) for _ in range(count)]


@dataclass(frozen=True)
class Work:
    """What is asked of the posteriors on one network.

    Attributes
    ----------
    network
        The name of the embedded network.
    route
        Where it is asked for.
    options
        More parameters of a request.
    """

    network: str
    route: str
    options: dict[str, Any]

    @property
    def folder(self) -> str:
        return str(zoo.folder(self.network))

    def rows(self, count: int) -> list[dict[str, Any]]:
        """Return examples to learn from."""
        label = self.route == "/classify"
        return [
            {"text": t, **({"label": k % 4} if label else {})} for k, t in enumerate(texts(count))
        ]

    def alone(self, posterior: pyrolora.Posterior, text: str, draws: int) -> Any:
        """Return the answer of the posterior for the text alone."""
        if self.route == "/classify":
            return posterior.predict([text], draws, seed=SEED).probs[0]
        length = self.options["max_new_tokens"]
        made = posterior.generate([text], draws, seed=SEED, max_new_tokens=length, do_sample=False)
        best = int((made.log_predictive / made.num_tokens)[0].argmax())
        return made.texts[0][best], float(made.entropy[0, best].nanmean())

    def right(self, answer: Any, expected: Any) -> bool:
        """Return whether an answer is the expected one.

        Posteriors may write the same text, and are told apart by its entropy.
        """
        if self.route != "/classify":
            text, entropy = expected
            same = math.isclose(answer["uncertainty"]["entropy"], entropy, abs_tol=1e-4)
            return same and bool(answer["generated_text"] == text)
        got = [row["score"] for row in sorted(answer, key=lambda row: row["index"])]
        return torch.allclose(torch.tensor(got), expected, atol=1e-5)


def make_posteriors(work: Work, folder: Path, count: int) -> list[str]:
    """Write one short fit under ``count`` names, the tensors of each a little different.

    They are all as far from the fit, so that their draws write about as many different texts: the
    time of an answer grows with these, as all draws read them.
    """
    options: dict[str, Any] = {"epochs": 1, "adapter": AdapterConfig(r=4), "guide": "meanfield"}
    posterior = pyrolora.fit(work.folder, work.rows(32), **options)
    names = [f"posterior-{k:02}" for k in range(count)]
    generator = torch.Generator().manual_seed(0)
    fitted = {n: p.clone() for n, p in posterior.model.program.named_parameters()}
    for name in names:
        with torch.no_grad():
            for which, parameter in posterior.model.program.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(fitted[which] + 0.02 * noise.to(parameter))
        posterior.save(folder / name)
    return names


@contextmanager
def running(service: Service) -> Iterator[str]:
    """Run a server on a free port, in a thread of this process."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(service), log_level="error", backlog=2048)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


async def ask(
    client: httpx.AsyncClient, work: Work, name: str, text: str, draws: int
) -> httpx.Response:
    parameters = {"adapter_id": name, "num_samples": draws, **work.options}
    return await client.post(work.route, json={"inputs": text, "parameters": parameters})


async def drive(
    url: str,
    work: Work,
    load: Load,
    names: list[str],
    said: list[str],
    draws: int,
    *,
    expected: dict[tuple[str, str], Any] | None = None,
    hang_up: float = 0.0,
) -> Load:
    """Send the requests, posterior after posterior, with ``concurrency`` clients."""
    chosen = random.Random(1)
    order = in_turn(names, said, load.requests)
    leaves = [chosen.random() < hang_up for _ in order]
    queue = iter(enumerate(order))

    async def client_loop(client: httpx.AsyncClient) -> None:
        for k, (name, text) in queue:
            start = time.perf_counter()
            if leaves[k]:
                await give_up(url, work, name, text, draws, chosen.uniform(0, 0.1))
                load.hung_up += 1
                continue
            response = await ask(client, work, name, text, draws)
            if response.status_code != 200:
                load.failed += 1
                continue
            load.seconds.append(time.perf_counter() - start)
            answer = response.json()
            if work.route != "/classify":
                load.continuations.append(1 + len(answer["uncertainty"]["continuations"]))
            if expected is not None:
                load.wrong += not work.right(answer, expected[name, text])

    limits = httpx.Limits(max_connections=None)
    start = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await asyncio.gather(*(client_loop(client) for _ in range(load.concurrency)))
    load.wall = time.perf_counter() - start
    return load


async def give_up(url: str, work: Work, name: str, text: str, draws: int, after: float) -> None:
    """Ask, and close the connection after so many seconds."""
    async with httpx.AsyncClient(base_url=url) as client:
        try:
            await asyncio.wait_for(ask(client, work, name, text, draws), after)
        except (TimeoutError, httpx.HTTPError):
            return


def in_turn(names: list[str], said: list[str], count: int) -> list[tuple[str, str]]:
    """Return the posterior and the text of each request.

    With a multiple of ``len(names)`` texts, one posterior and all of them in turn have the same
    number of different questions to answer, as equal questions share their work.
    """
    return [(names[k % len(names)], said[k % len(said)]) for k in range(count)]


def answers(work: Work, folder: Path, asked: set[tuple[str, str]], draws: int) -> Any:
    """Return the answer for each text alone under each posterior."""
    expected = {}
    for name in tqdm(sorted({name for name, _ in asked}), desc="answers alone"):
        posterior = pyrolora.load(folder / name, work.folder)
        for text in sorted(text for other, text in asked if other == name):
            expected[name, text] = work.alone(posterior, text, draws)
        posterior.detach()
    return expected


def serving(work: Work, folder: Path, **limits: Any) -> Service:
    """Return a service of the posteriors, whose network is loaded already."""
    registry = Registry(folder, work.folder)
    service = Service(registry, Limits(queue=4096, timeout=600.0, **limits), seed=SEED)
    service.registry.lease(service.registry.names()[-1]).release()
    return service


def first_requests(
    url: str, work: Work, service: Service, names: list[str], said: list[str]
) -> list[float]:
    """Seconds that the first request of an unloaded posterior takes beyond the next one."""
    beyond = []
    with httpx.Client(base_url=url, timeout=600) as client:
        for name in names:
            times = []
            for text in said[:4]:
                parameters = {"adapter_id": name, "num_samples": 8, **work.options}
                body = {"inputs": text, "parameters": parameters}
                start = time.perf_counter()
                client.post(work.route, json=body).raise_for_status()
                times.append(time.perf_counter() - start)
            beyond.append(times[0] - statistics.median(times[1:]))
            service.registry.close()
    return beyond


def peak_mib() -> float:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(service: Service, names: list[str]) -> dict[str, float]:
    """Load all posteriors, and return the MiB of the network, and of what each of them added."""
    registry = service.registry
    bases = {id(lease.posterior.base): lease.posterior.base for lease in map(registry.lease, names)}
    tensors = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for base in bases.values()
        for tensor in (*base.parameters(), *base.buffers())
    }
    return {
        "d: MiB of the network, of all posteriors together": sum(tensors.values()) / 2**20,
        "d: MiB of tensors that a posterior adds": registry.bytes / len(names) / 2**20,
    }


def under_loads(
    work: Work, folder: Path, args: argparse.Namespace, requests: int, soak: int
) -> dict[str, Any]:
    """Run all the loads of one kind of work, and return their rows and the ratios between them."""
    names = make_posteriors(work, folder, args.posteriors)
    said = texts(args.texts, seed=7)
    expected = answers(work, folder, {*in_turn(names, said, soak)}, args.draws)
    loads: dict[str, Load] = {}

    def under(url: str, name: str, which: list[str], draws: int, **more: Any) -> Load:
        """Return the fastest run of this load so far, this one included."""
        load = Load(more.pop("requests", requests), args.concurrency)
        done = asyncio.run(drive(url, work, load, which, said, draws, **more))
        loads[name] = max(done, loads.get(name, done), key=lambda run: run.rate)
        return loads[name]

    service = serving(work, folder)
    with running(service) as url:
        beyond = first_requests(url, work, service, names[:5], said)
        sizes = memory(service, names)
        for _ in range(args.repeats):
            one = under(url, "one posterior", names[:1], args.draws)
            many = under(url, f"{len(names)} in turn", names, args.draws)
        mean = under(url, "one, the mean adapter", names[:1], 0)
        before = peak_mib()
        more = {"requests": soak, "expected": expected, "hang_up": 0.2}
        done = under(url, f"{len(names)} in turn, with hang-ups", names, args.draws, **more)
        grown = peak_mib() - before
        left = len(service.batcher)
    with running(serving(work, folder, batch_tokens=1)) as url:
        alone = under(url, "one, the mean, a pass per request", names[:1], 0)
    return {
        "loads": [load.row(f"{work.route}: {name}") for name, load in loads.items()],
        "a: answers per second of all in turn, to one": many.rate / one.rate,
        **_different(one, many),
        "b: latency of draws, to a plain pass per request": one.median / alone.median,
        "b: latency of draws, to the mean in batches": one.median / mean.median,
        **sizes,
        "e: seconds of a first request beyond the next": statistics.median(beyond),
        "f: answered": len(done.seconds),
        "f: hung up": done.hung_up,
        "f: failed": done.failed,
        "f: answered otherwise than alone": done.wrong,
        "f: MiB that the peak of memory grew": grown,
        "f: left in the queue": left,
    }


def _different(one: Load, many: Load) -> dict[str, Any]:
    """Return how many different continuations the draws wrote, and read, for an answer."""
    if not one.continuations:
        return {}
    counts = [round(statistics.mean(load.continuations), 2) for load in (one, many)]
    return {"a: different continuations per answer of one, of all in turn": counts}


def measured(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run everything, and return the rows of loads and the facts of each kind of work."""
    classes = Work("encoder", "/classify", {})
    written = Work("decoder", "/generate", {"max_new_tokens": args.new_tokens})
    facts: dict[str, Any] = {"loads": []}
    for work, requests, soak in (
        (classes, args.requests, args.soak),
        (written, args.writing_requests, args.writing_soak),
    ):
        found = under_loads(work, folder / work.network, args, requests, soak)
        facts["loads"] += found.pop("loads")
        facts |= {f"{work.route} {name}": value for name, value in found.items()}
    mixed = beside_peft(folder / "decoder", written.folder, texts(args.posteriors), args.new_tokens)
    return {**facts, **mixed}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--posteriors", type=positive, default=25)
    parser.add_argument("--draws", type=positive, default=8)
    parser.add_argument("--concurrency", type=positive, default=32)
    parser.add_argument("--requests", type=positive, default=400, help="of (a) and (b)")
    parser.add_argument(
        "--repeats", type=positive, default=3, help="runs of (a): the fastest count"
    )
    parser.add_argument("--soak", type=positive, default=1000, help="requests of (f)")
    parser.add_argument("--writing-requests", type=positive, default=100, help="of texts to write")
    parser.add_argument("--writing-soak", type=positive, default=250, help="of texts to write")
    parser.add_argument("--new-tokens", type=positive, default=20, help="of a text")
    parser.add_argument("--texts", type=positive, default=50, help="different texts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        result = measured(args, Path(folder))
    result["load of the machine, at the start and the end"] = [before[0], os.getloadavg()[0]]
    save_json(args.out / "serve-cpu.json", {**provenance(args), **result})
    loads = pd.DataFrame(result.pop("loads"))
    facts = pd.DataFrame([{"measured": k, "value": _shown(v)} for k, v in result.items()])
    text = f"# The server\n\n{markdown(loads)}\n{markdown(facts)}"
    (args.out / "serve-cpu.md").write_text(text)
    print(text)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).strip("[]")


if __name__ == "__main__":
    main()

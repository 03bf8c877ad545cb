"""Small posteriors in a directory, as a server finds them."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from problems import WORDS, bert, llama, reviews, texts, tokenizer

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.serving.app import create_app
from pyrolora.serving.limits import Limits
from pyrolora.serving.registry import Registry
from pyrolora.serving.service import Service

CLASSIFIERS = ("reviews", "other", "third")
CHAT = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}the{% endif %}"
)


@dataclass(frozen=True)
class Shop:
    """A directory of posteriors, and the folder of their network."""

    directory: Path
    base: Path


def fitted(network: Any, data: Any, words: Any, **options: Any) -> pyrolora.Posterior:
    settings = {"adapter": AdapterConfig(r=2), "epochs": 2, "learning_rate": 0.05, "batch_size": 8}
    return pyrolora.fit(network, data, tokenizer=words, **{**settings, **options})


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Three posteriors on one classifier, each with draws that differ."""
    root = tmp_path_factory.mktemp("classifiers")
    base = root / "encoder"
    bert(initializer_range=0.3).bert.save_pretrained(base)
    tokenizer().save_pretrained(base)
    for seed, name in enumerate(CLASSIFIERS):
        posterior = fitted(str(base), reviews(16, seed=seed), None, guide="meanfield", seed=seed)
        posterior.save(root / "posteriors" / name)
    return Shop(root / "posteriors", base)


@pytest.fixture(scope="session")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Two posteriors on one language model, one of them with a chat template."""
    root = tmp_path_factory.mktemp("writers")
    base = root / "decoder"
    network = llama(initializer_range=0.5)
    network.generation_config.eos_token_id = WORDS.index("[SEP]")
    network.save_pretrained(base)
    words = tokenizer()
    words.eos_token = "[SEP]"
    words.save_pretrained(base)
    for seed, name in enumerate(("plain", "chat")):
        if name == "chat":
            words.chat_template = CHAT
            words.save_pretrained(base)
        posterior = fitted(str(base), texts(16, seed=seed), None, guide="meanfield", seed=seed)
        posterior.save(root / "posteriors" / name)
    return Shop(root / "posteriors", base)


@pytest.fixture
def shop(classifiers: Shop, tmp_path: Path) -> Callable[..., Shop]:
    """Copies of the classifiers' folders, to be changed."""

    def copy(*names: str) -> Shop:
        directory = tmp_path / "posteriors"
        directory.mkdir()
        for name in names:
            shutil.copytree(classifiers.directory / name, directory / name)
        return Shop(directory, classifiers.base)

    return copy


@contextmanager
def running(app: Any) -> Iterator[str]:
    """A server of ``app`` on a free port, in a thread; gives its address."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


@dataclass(frozen=True)
class Live:
    """A server that runs, and what it serves."""

    url: str
    shop: Shop
    service: Service

    def alone(self, name: str) -> pyrolora.Posterior:
        """The posterior of that name, loaded beside the server."""
        return pyrolora.load(self.shop.directory / name, self.shop.base)


def served(shop: Shop, limits: Limits | None = None, **options: Any) -> Service:
    return Service(Registry(shop.directory, shop.base), limits, **options)


@pytest.fixture(scope="session")
def classifying(classifiers: Shop) -> Iterator[Live]:
    service = served(classifiers, default="reviews")
    with running(create_app(service)) as url:
        yield Live(url, classifiers, service)


@pytest.fixture(scope="session")
def writing(writers: Shop) -> Iterator[Live]:
    service = served(writers)
    with running(create_app(service)) as url:
        yield Live(url, writers, service)

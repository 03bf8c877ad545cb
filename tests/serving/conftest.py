"""Small posteriors in a directory, as a server finds them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from problems import WORDS, absolute, bert, llama, reviews, texts, tokenizer
from servers import Live, Shop, running, served

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.guides import MeanField
from pyrolora.serving.app import create_app

CLASSIFIERS = ("reviews", "other", "third")
CHAT = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}the{% endif %}"
)


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
    """Two posteriors on one language model, one of them with a chat template.

    Their draws differ by little: each nearly predicts the next tokens that all do.
    """
    root = tmp_path_factory.mktemp("writers")
    base = root / "decoder"
    network = llama(initializer_range=0.5)
    network.generation_config.eos_token_id = WORDS.index("[SEP]")
    network.save_pretrained(base)
    words = tokenizer()
    words.eos_token = "[SEP]"
    guide = absolute(MeanField)
    words.save_pretrained(base)
    for seed, name in enumerate(("plain", "chat")):
        if name == "chat":
            words.chat_template = CHAT
            words.save_pretrained(base)
        posterior = fitted(str(base), texts(16, seed=seed), None, guide=guide, seed=seed)
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

"""Posteriors by name: loaded once, within a budget, never from outside of the directory."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import bert, reviews, tokenizer

import pyrolora
from pyrolora.errors import ConfigError
from pyrolora.serving import networks as networks_module
from pyrolora.serving.errors import (
    BusyError,
    DamagedPosteriorError,
    OtherBaseError,
    UnknownPosteriorError,
    UnsupportedError,
)
from pyrolora.serving.registry import Registry

TEXTS = ["the film was good", "bad book"]


def probabilities(posterior: pyrolora.Posterior) -> torch.Tensor:
    return posterior.predict(TEXTS, 4, seed=1).draws


def one_size(shop: Any) -> int:
    """The bytes of one of the classifiers."""
    registry = Registry(shop.directory, shop.base)
    registry.lease("reviews").release()
    return registry.bytes


def test_names_are_the_folders_that_hold_a_posterior(shop: Any) -> None:
    made = shop("reviews", "other")
    (made.directory / "empty").mkdir()
    (made.directory / "note.txt").write_text("x")
    assert Registry(made.directory, made.base).names() == ["other", "reviews"]


def test_every_posterior_answers_as_it_does_alone(classifiers: Any) -> None:
    registry = Registry(classifiers.directory, classifiers.base)
    for name in ("reviews", "other", "reviews"):
        alone = pyrolora.load(classifiers.directory / name, classifiers.base)
        with registry.lease(name) as posterior:
            torch.testing.assert_close(probabilities(posterior), probabilities(alone))


def test_posteriors_of_one_kind_share_one_network(classifiers: Any) -> None:
    registry = Registry(classifiers.directory, classifiers.base)
    with registry.lease("reviews") as one, registry.lease("other") as two:
        assert one.base is two.base
    assert registry.loaded() == ["reviews", "other"]
    assert registry.bytes > 0


def test_other_classes_are_another_head_on_the_same_tensors(shop: Any) -> None:
    made = shop("reviews")
    data = [{"text": row["text"], "label": k % 3} for k, row in enumerate(reviews(12))]
    pyrolora.fit(str(made.base), data, epochs=1).save(made.directory / "three")
    registry = Registry(made.directory, made.base)
    with registry.lease("reviews") as two, registry.lease("three") as three:
        assert two.base is not three.base
        shared = {id(p) for p in two.base.bert.parameters()}
        assert {id(p) for p in three.base.bert.parameters()} == shared
        assert probabilities(two).shape[-1] == 2
        assert probabilities(three).shape[-1] == 3


def test_two_requests_at_once_load_it_once(
    classifiers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    original = networks_module.load

    def slow(folder: Path, network: Any) -> Any:
        calls.append(folder)
        time.sleep(0.1)
        return original(folder, network)

    monkeypatch.setattr(networks_module, "load", slow)
    registry = Registry(classifiers.directory, classifiers.base)
    got: list[Any] = []
    threads = [
        threading.Thread(target=lambda: got.append(registry.lease("reviews"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len({id(lease.posterior) for lease in got}) == 1


def test_the_least_recently_used_leaves_first(classifiers: Any) -> None:
    size = one_size(classifiers)
    registry = Registry(classifiers.directory, classifiers.base, budget=int(2.9 * size))
    for name in ("reviews", "other", "reviews", "third"):
        registry.lease(name).release()
    assert registry.loaded() == ["reviews", "third"]
    assert registry.bytes <= 2.9 * size


def test_a_posterior_in_use_stays_and_others_wait_for_it(classifiers: Any) -> None:
    size = one_size(classifiers)
    options: dict[str, Any] = {"budget": int(1.5 * size), "patience": 5.0}
    registry = Registry(classifiers.directory, classifiers.base, **options)
    held = registry.lease("reviews")
    before = probabilities(held.posterior)
    done = threading.Event()

    def other() -> None:
        registry.lease("other").release()
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert not done.wait(0.2)
    torch.testing.assert_close(probabilities(held.posterior), before)
    held.release()
    thread.join()
    assert registry.loaded() == ["other"]
    assert registry.bytes <= 1.5 * size


def test_no_room_within_the_patience_is_an_error(classifiers: Any) -> None:
    budget = int(1.5 * one_size(classifiers))
    registry = Registry(classifiers.directory, classifiers.base, budget=budget, patience=0.05)
    with registry.lease("reviews"), pytest.raises(BusyError, match="in use"):
        registry.lease("other")
    registry.lease("other").release()


def test_a_posterior_above_the_budget_is_refused(classifiers: Any) -> None:
    registry = Registry(classifiers.directory, classifiers.base, budget=10)
    with pytest.raises(UnsupportedError, match="larger budget"):
        registry.lease("reviews")
    assert registry.bytes == 0


def test_a_released_posterior_is_released_once(classifiers: Any) -> None:
    registry = Registry(classifiers.directory, classifiers.base)
    lease, beside = registry.lease("reviews"), registry.lease("reviews")
    lease.release()
    lease.release()
    registry.close()
    probabilities(beside.posterior)
    beside.release()
    assert registry.bytes == 0


def test_a_folder_that_was_saved_again_is_loaded_again(shop: Any, classifiers: Any) -> None:
    made = shop("reviews")
    registry = Registry(made.directory, made.base)
    old = registry.lease("reviews")
    before = probabilities(old.posterior)
    alone = pyrolora.load(classifiers.directory / "other", classifiers.base)
    alone.save(made.directory / "reviews")
    with registry.lease("reviews") as new:
        torch.testing.assert_close(probabilities(new), probabilities(alone))
        torch.testing.assert_close(probabilities(old.posterior), before)
    size = registry.bytes
    old.release()
    assert registry.bytes < size


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../reviews", "reviews/../reviews", "/etc", "a\\b", "x" * 300, ".hidden", "\0"],
)
def test_a_name_is_one_folder_of_the_directory(classifiers: Any, name: str) -> None:
    registry = Registry(classifiers.directory, classifiers.base)
    with pytest.raises(UnknownPosteriorError, match="there are: 'other', 'reviews', 'third'"):
        registry.lease(name)


def test_a_link_out_of_the_directory_is_no_posterior(shop: Any, classifiers: Any) -> None:
    made = shop("reviews")
    (made.directory / "link").symlink_to(classifiers.directory / "other")
    copied = made.directory / "files"
    copied.mkdir()
    for file in (classifiers.directory / "other").iterdir():
        (copied / file.name).symlink_to(file)
    registry = Registry(made.directory, made.base)
    assert registry.names() == ["reviews"]
    for name in ("link", "files"):
        with pytest.raises(UnknownPosteriorError):
            registry.lease(name)


@pytest.mark.parametrize("damage", ["cut", "json", "missing"])
def test_a_damaged_folder_is_an_error_and_the_others_are_served(shop: Any, damage: str) -> None:
    made = shop("reviews", "other")
    folder = made.directory / "reviews"
    tensors = next(folder.glob("*.safetensors"))
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-8])
    elif damage == "json":
        (folder / "posterior.json").write_text("{")
    else:
        tensors.unlink()
    registry = Registry(made.directory, made.base)
    for _ in range(2):
        with pytest.raises(DamagedPosteriorError, match="'reviews' cannot be loaded") as caught:
            registry.lease("reviews")
        assert str(made.directory) not in str(caught.value)
    with registry.lease("other") as posterior:
        probabilities(posterior)
    assert registry.loaded() == ["other"]


@pytest.mark.parametrize("loaded", [False, True])
def test_a_posterior_of_another_network_is_told_apart(
    shop: Any, tmp_path: Path, loaded: bool
) -> None:
    made = shop("reviews")
    foreign = tmp_path / "foreign"
    bert(seed=5).bert.save_pretrained(foreign)
    tokenizer().save_pretrained(foreign)
    pyrolora.fit(str(foreign), reviews(8), epochs=1).save(made.directory / "stranger")
    shutil.rmtree(foreign)
    registry = Registry(made.directory, made.base)
    if loaded:
        registry.lease("reviews").release()
    with pytest.raises(
        OtherBaseError, match="does not belong to the network of this server"
    ) as caught:
        registry.lease("stranger")
    assert "(foreign)" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    registry.lease("reviews").release()


def test_a_network_that_there_is_not_is_named_without_the_servers_paths(
    shop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "its own folder"
    here.mkdir()
    monkeypatch.chdir(here)
    registry = Registry(shop("reviews").directory, tmp_path / "no network")
    with pytest.raises(OtherBaseError, match="no network") as caught:
        registry.lease("reviews")
    assert str(tmp_path) not in str(caught.value)


def test_a_network_in_memory_will_do(shop: Any, classifiers: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    network = AutoModelForSequenceClassification.from_pretrained(classifiers.base)
    registry = Registry(shop("reviews").directory, network)
    with registry.lease("reviews") as posterior:
        assert posterior.base is network


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        Registry(tmp_path / "nothing", "x")
    with pytest.raises(ConfigError, match="above 0"):
        Registry(tmp_path, "x", budget=0)


def test_threads_that_ask_for_more_than_fits_all_get_the_right_one(classifiers: Any) -> None:
    """Leases of three posteriors in room for one, from many threads at a time."""
    names = ("reviews", "other", "third")
    expected = {
        name: probabilities(pyrolora.load(classifiers.directory / name, classifiers.base))
        for name in names
    }
    registry = Registry(
        classifiers.directory, classifiers.base, budget=int(1.5 * one_size(classifiers))
    )
    wrong: list[str] = []

    def ask(start: int) -> None:
        for k in range(4):
            name = names[(start + k) % 3]
            with registry.lease(name) as posterior:
                if not torch.allclose(probabilities(posterior), expected[name], atol=1e-5):
                    wrong.append(name)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(registry.loaded()) == 1
    assert os.listdir(classifiers.directory)


@pytest.mark.parametrize("guide", ["map", "ensemble", "full", "laplace"])
def test_posteriors_of_other_guides_are_served_too(shop: Any, guide: str) -> None:
    """Those with heads of their own per member, or with weights of their own, too."""
    made = shop("reviews")
    pyrolora.fit(str(made.base), reviews(12), guide=guide, epochs=1).save(made.directory / guide)
    alone = pyrolora.load(made.directory / guide, made.base)
    expected = alone.predict(TEXTS, 2, seed=1).draws
    registry = Registry(made.directory, made.base)
    with registry.lease("reviews") as beside, registry.lease(guide) as posterior:
        before = probabilities(beside)
        torch.testing.assert_close(posterior.predict(TEXTS, 2, seed=1).draws, expected)
        torch.testing.assert_close(probabilities(beside), before)
    size = registry.bytes
    network = sum(p.numel() * p.element_size() for p in alone.base.parameters())
    assert size >= network or guide != "full"
    registry.close()
    assert registry.bytes == 0

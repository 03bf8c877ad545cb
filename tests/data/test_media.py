"""Pictures and sounds as people have them: a batch holds the processor's own tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
from peft_trainer import Start, lora_layers
from PIL import Image
from problems import Rows, arguments
from torch import Tensor
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.data import prepare
from pyrolora.errors import CheckpointError, DataError
from pyrolora.posterior import Posterior
from pyrolora.storage import digest_of
from pyrolora.tasks import task_for

NAMES = ["cat", "cow", "dog"]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_labels": 3,
}


def vit(**changes: Any) -> ViTForImageClassification:
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {**SIZES, "image_size": 8, "patch_size": 4, **names, **still}
    return ViTForImageClassification(ViTConfig(**{**sizes, **changes})).eval()


def processor(**changes: Any) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 8, "width": 8}, **changes)


def pictures(n: int = 8, modes: tuple[str, ...] = ("RGB", "L", "RGBA", "P")) -> list[Image.Image]:
    """Pictures of several sizes and modes."""
    numbers = np.random.default_rng(0)
    made = [
        Image.fromarray(numbers.integers(0, 255, (10 + i, 20 - i, 3), dtype=np.uint8))
        for i in range(n)
    ]
    return [picture.convert(modes[i % len(modes)]) for i, picture in enumerate(made)]


def wanted(some: list[Image.Image]) -> Tensor:
    made: Tensor = processor()([p.convert("RGB") for p in some], return_tensors="pt")[
        "pixel_values"
    ]
    return made


def batch_of(data: Any, network: Any, reader: Any, **options: Any) -> dict[str, Tensor]:
    task = task_for(network, "classification")
    made = prepare(data, network, task, reader, need_labels=False, **options)
    return made.collate([made.examples[i] for i in range(len(made))])


def files(folder: Path, some: list[Image.Image]) -> list[str]:
    paths = [str(folder / f"{i}.png") for i in range(len(some))]
    for path, picture in zip(paths, some, strict=True):
        picture.save(path)
    return paths


def augmented(rows: dict[str, Any]) -> dict[str, Any]:
    """The pictures unchanged, as a transform of a user's would give them."""
    return {"image": [picture.convert("RGB") for picture in rows["image"]]}


FORMS: dict[str, Callable[[list[Any], Path], Any]] = {
    "a list": lambda some, _: some,
    "a tuple": lambda some, _: (some, [0] * len(some)),
    "dicts": lambda some, _: [{"img": picture} for picture in some],
    "a data set": lambda some, _: datasets.Dataset.from_dict({"image": some}),
    "a transform": lambda some, _: datasets.Dataset.from_dict({"image": some}).with_transform(
        augmented
    ),
    "a torch data set": lambda some, _: Rows([{"image": picture} for picture in some]),
    "a list of paths": lambda some, folder: files(folder, some),
    "paths of pathlib": lambda some, folder: [{"image": Path(p)} for p in files(folder, some)],
    "a column of paths": lambda some, folder: [{"file_name": p} for p in files(folder, some)],
    "bytes": lambda some, folder: [
        {"image": Path(path).read_bytes()} for path in files(folder, some)
    ],
    "undecoded": lambda some, folder: datasets.Dataset.from_dict(
        {"image": files(folder, some)}
    ).cast_column("image", datasets.Image(decode=False)),
    "a list of arrays": lambda some, _: [np.asarray(p.convert("RGB")) for p in some],
    "arrays": lambda some, _: [{"image": np.asarray(p.convert("RGB"))} for p in some],
    "pairs": lambda some, _: Rows([(picture, 0) for picture in some]),
    "pairs of tensors": lambda some, _: Rows(
        [(torch.tensor(np.asarray(p.convert("RGB")).transpose(2, 0, 1)), 0) for p in some]
    ),
    "a list of tensors": lambda some, _: [torch.tensor(np.asarray(p.convert("RGB"))) for p in some],
    "transparency, channels first": lambda some, _: [
        {"image": np.asarray(p.convert("RGBA")).transpose(2, 0, 1)} for p in some
    ],
    "channels first": lambda some, _: [
        {"image": np.asarray(p.convert("RGB")).transpose(2, 0, 1)} for p in some
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_pictures_become_the_processors_own_tensors(form: str, tmp_path: Path) -> None:
    some = pictures()
    batch = batch_of(FORMS[form](some, tmp_path), vit(), processor())
    assert torch.equal(batch["pixel_values"], wanted(some))


@pytest.mark.parametrize("form", ["(1, H, W)", "(H, W)", "true or false", "HSV", "RGBa", "a batch"])
def test_other_forms_of_pictures_become_rgb(form: str) -> None:
    grey = [picture.convert("L") for picture in pictures(3)]
    black = [picture.convert("1") for picture in pictures(3)]
    colours = [picture.convert("RGBA") for picture in pictures(3)]
    alike = [np.asarray(picture.convert("RGB").resize((9, 7))) for picture in pictures(3)]
    data, some = {
        "(1, H, W)": ([{"image": np.asarray(p)[None]} for p in grey], grey),
        "(H, W)": ([{"image": np.asarray(p)} for p in grey], grey),
        "true or false": ([{"image": np.asarray(p)} for p in black], black),
        "HSV": ([p.convert("HSV") for p in grey], [p.convert("HSV") for p in grey]),
        "RGBa": ([p.convert("RGBa") for p in colours], [p.convert("RGBa") for p in colours]),
        "a batch": ((np.stack(alike), [0, 1, 2]), [Image.fromarray(array) for array in alike]),
    }[form]
    assert torch.equal(batch_of(data, vit(), processor())["pixel_values"], wanted(some))


def test_a_picture_of_jpeg_is_not_compressed_again(tmp_path: Path) -> None:
    (picture,) = pictures(1)
    picture.save(tmp_path / "a.jpg", quality=30)
    opened = Image.open(tmp_path / "a.jpg")
    opened.load()
    opened.paste((0, 0, 255), (0, 0, 4, 4))  # in place: the file has other pixels
    batch = batch_of([{"image": opened}], vit(), processor())
    assert torch.equal(batch["pixel_values"], wanted([opened]))


def test_grey_pictures_stay_grey_for_a_network_of_one_channel() -> None:
    one = {"image_mean": [0.5], "image_std": [0.5]}
    batch = batch_of(pictures(4), vit(num_channels=1), processor(**one))
    grey = [picture.convert("L") for picture in pictures(4)]
    expected = processor(**one)([np.asarray(p)[..., None] for p in grey], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])


def test_map_equals_peft_and_the_trainer_with_the_processors_tensors(tmp_path: Path) -> None:
    some, labels = pictures(), [i % 3 for i in range(8)]
    start, args = Start(), arguments(tmp_path)
    posterior = pyrolora.fit(
        vit(),
        [{"image": p, "label": NAMES[y]} for p, y in zip(some, labels, strict=True)],
        "map",
        tokenizer=processor(),
        adapter=AdapterConfig(r=2, lora_alpha=4),
        training=args,
        callbacks=start,
    )
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=list(start.factors), modules_to_save=["classifier"]
    )
    model = peft.get_peft_model(vit(), config)
    layers = lora_layers(model, start.factors)
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(wanted(some), labels, strict=True)]
    Trainer(model=model, args=args, train_dataset=Rows(rows)).train()  # type: ignore[arg-type]
    matrices = posterior.bank.matrices(posterior.bank.means())
    assert {*matrices} == {*layers}
    for name, (A, B) in matrices.items():
        torch.testing.assert_close(A, layers[name].lora_A["default"].weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(B, layers[name].lora_B["default"].weight, rtol=1e-4, atol=1e-6)


# A fit -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [{"image": p, "label": NAMES[i % 3]} for i, p in enumerate(pictures())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with its processor, as a hub has them."""
    made = tmp_path_factory.mktemp("vit")
    vit().save_pretrained(made)
    processor().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def fitted(folder: Path, rows: Any, tmp_path_factory: pytest.TempPathFactory) -> Posterior:
    args = arguments(tmp_path_factory.mktemp("fit"), max_steps=2)
    return pyrolora.fit(folder, rows, "laplace", training=args)


def test_a_named_network_brings_its_processor(fitted: Posterior, rows: Any) -> None:
    assert isinstance(fitted.tokenizer, ViTImageProcessorPil)
    assert fitted.task.name == "classification"
    assert fitted.predict(rows[:2]).classes == tuple(NAMES)
    assert fitted.evaluate(rows, seed=0)["nll"] > 0


def test_pictures_without_labels_are_predicted_as_with_them(fitted: Posterior, rows: Any) -> None:
    probs = fitted.predict(rows, seed=1).probs
    assert torch.equal(fitted.predict([row["image"] for row in rows], seed=1).probs, probs)
    tensors = (wanted([row["image"] for row in rows]),)
    torch.testing.assert_close(fitted.predict(tensors, seed=1).probs, probs)


def test_a_loaded_posterior_reads_pictures(fitted: Posterior, rows: Any, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    loaded = pyrolora.load(tmp_path)
    assert torch.equal(loaded.predict(rows, seed=1).draws, fitted.predict(rows, seed=1).draws)


def test_a_report_of_pictures_is_written(fitted: Posterior, rows: Any, tmp_path: Path) -> None:
    fitted.report(tmp_path / "page.html", rows)
    assert "cow" in (tmp_path / "page.html").read_text()


HOSTILE = {
    "code": ({"auto_map": {"AutoImageProcessor": "evil.Evil"}}, "auto_map"),
    "an unknown class": ({"image_processor_type": "Evil"}, "'Evil'"),
    "a class that is none": ({"image_processor_type": "ViTModel"}, "'ViTModel'"),
    "a file elsewhere": ({"nested": {"vocab_file": "/etc/passwd"}}, "nested.vocab_file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_processors_file_chooses_no_code(case: str, fitted: Posterior, tmp_path: Path) -> None:
    changes, words = HOSTILE[case]
    fitted.save(tmp_path)
    meta = json.loads((tmp_path / "posterior.json").read_text())
    file = tmp_path / meta["tokenizer"] / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    from pyrolora.storage.tokenizer_files import digest

    meta["tokenizer_files"] = {file.name: digest(file)}
    meta["digest"] = digest_of(meta)
    (tmp_path / "posterior.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=words):
        pyrolora.load(tmp_path)


# Data that cannot be read ------------------------------------------------------------------------

(ONE,) = pictures(1)
WRONG: dict[str, tuple[Any, str]] = {
    "missing": ([{"image": ONE}, {"image": None}], "1 examples have no 'image', such as example 1"),
    "no file": ([{"image": "nowhere.png"}], "'nowhere.png', which does not exist"),
    "no picture": ([{"image": b"text"}], "cannot be read, got UnidentifiedImageError"),
    "sixteen bits": ([ONE.convert("I;16")], "mode 'I;16', more than eight bits"),
    "up to one": ([{"image": np.full((9, 9, 3), 0.5)}], "the processor divides by 255"),
    "a batch": ([{"image": np.zeros((2, 9, 9, 3))}], r"got \(2, 9, 9, 3\)"),
    "one channel of real numbers": (
        [{"image": np.full((9, 9), 80.5)}],
        r"shape \(9, 9\), and the network reads 3 channels",
    ),
    "large numbers": ([{"image": np.full((9, 9, 3), 999)}], r"whole numbers in 999\.\.999"),
    "NaN": ([{"image": np.full((9, 9, 3), np.nan)}], "not finite"),
    "missing in a torch data set": (Rows([{"image": None}]), "an example has no 'image'"),
    "a data set that does not decode": (
        datasets.Dataset.from_dict({"image": [{"bytes": b"text", "path": None}]}).cast_column(
            "image", datasets.Image()
        ),
        "cannot be read, got UnidentifiedImageError",
    ),
    "numbers": ([{"image": 3}], "holds int64, and must hold images"),
    "one": (ONE, r"write it as a list: \[picture\]"),
    "two columns": ([{"image": ONE, "mask": ONE}], r"which of the columns \['image', 'mask'\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_pictures_that_cannot_be_read(case: str) -> None:
    data, words = WRONG[case]
    with pytest.raises(DataError, match=words):
        batch_of(data, vit(), processor())


def test_pictures_without_a_processor_ask_for_it() -> None:
    with pytest.raises(DataError, match=r"tokenizer=AutoImageProcessor\.from_pretrained"):
        batch_of(pictures(2), vit(), None)
    with pytest.raises(DataError, match="makes pixel_values of it, got Wav2Vec2FeatureExtractor"):
        batch_of(pictures(2), vit(), extractor())
    with pytest.raises(DataError, match="makes input_values of it, got ViTImageProcessor"):
        batch_of(sounds(2), wav2vec2(), processor())


# Sounds ------------------------------------------------------------------------------------------


def wav2vec2() -> Wav2Vec2ForSequenceClassification:
    torch.manual_seed(0)
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    still = dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0
    )
    config = Wav2Vec2Config(
        **{**SIZES, **convolutions, **still},
        feat_extract_norm="layer",
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        layerdrop=0.0,
        final_dropout=0.0,
        apply_spec_augment=False,
    )
    return Wav2Vec2ForSequenceClassification(config).eval()


def sounds(n: int = 6, rate: int = 16000) -> list[dict[str, Any]]:
    numbers = np.random.default_rng(0)
    arrays = [numbers.standard_normal(200 + 40 * i).astype("float32") for i in range(n)]
    return [
        {"audio": {"array": array, "sampling_rate": rate}, "label": i % 3}
        for i, array in enumerate(arrays)
    ]


def extractor(**changes: Any) -> Wav2Vec2FeatureExtractor:
    return Wav2Vec2FeatureExtractor(**{"return_attention_mask": True, **changes})


def test_a_sound_is_scored_the_same_alone_and_in_a_batch(tmp_path: Path) -> None:
    data, network = sounds(), wav2vec2()
    args = arguments(tmp_path, max_steps=2)
    posterior = pyrolora.fit(network, data, "montec", tokenizer=extractor(), training=args)
    batch = batch_of(data, network, extractor())
    arrays = [row["audio"]["array"] for row in data]
    made = extractor()(arrays, sampling_rate=16000, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_values"], made["input_values"])
    assert torch.equal(batch["attention_mask"], made["attention_mask"])
    draws = posterior.predict(data, draws=[0, 1], batch_size=6).draws
    alone = [posterior.predict([row["audio"]], draws=[0, 1]).draws for row in data]
    torch.testing.assert_close(draws, torch.cat(alone, 1))
    posterior.save(tmp_path / "saved")
    loaded = pyrolora.load(tmp_path / "saved", network)
    assert torch.equal(loaded.predict(data, draws=[0, 1], batch_size=6).draws, draws)


def test_sounds_whose_padding_counts_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="depends on its neighbours"):
        batch_of(sounds(), wav2vec2(), extractor(return_attention_mask=False))


def test_pairs_of_a_sound_and_its_label() -> None:
    data = sounds()
    pairs = Rows([(row["audio"], row["label"]) for row in data])
    for name, tensor in batch_of(data, wav2vec2(), extractor()).items():
        assert torch.equal(batch_of(pairs, wav2vec2(), extractor())[name], tensor)


def test_an_extractor_of_one_length_says_what_it_cuts() -> None:
    network = ASTForAudioClassification(
        ASTConfig(
            **SIZES,
            num_mel_bins=16,
            max_length=16,
            patch_size=8,
            frequency_stride=8,
            time_stride=8,
        )
    )
    reader = ASTFeatureExtractor(num_mel_bins=16, max_length=16)
    short = [{"array": np.ones(800, dtype="float32"), "sampling_rate": 16000}]
    assert batch_of(short, network, reader)["input_values"].shape == (1, 16, 16)
    with pytest.raises(DataError, match="too short"):
        batch_of(sounds(1), network, reader)
    long = [{"array": np.ones(9000, dtype="float32"), "sampling_rate": 16000}]
    with pytest.warns(UserWarning, match=r"longer than the 0\.175 s"):
        batch_of(long, network, reader)


WRONG_SOUNDS: dict[str, tuple[Any, str]] = {
    "another rate": (
        sounds(1, rate=8000),
        "8000 samples per second, and the network was trained on 16000",
    ),
    "two channels": (
        [{"audio": {"array": np.ones((2, 300)), "sampling_rate": 16000}}],
        r"shape \(2, 300\)",
    ),
    "whole numbers": (
        [{"audio": {"array": [0, 1, 2], "sampling_rate": 16000}}],
        "divide 16-bit samples by 32768",
    ),
    "no rate": ([{"audio": [0.1, 0.2]}], "without its rate"),
    "missing": ([*sounds(1), {"audio": None, "label": 1}], "no 'audio', such as example 1"),
}


@pytest.mark.parametrize("case", WRONG_SOUNDS)
def test_sounds_that_cannot_be_read(case: str) -> None:
    data, words = WRONG_SOUNDS[case]
    with pytest.raises(DataError, match=words):
        batch_of(data, wav2vec2(), extractor())


def test_files_of_sounds_are_resampled_by_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    data = [{"file": str(tmp_path / "a.wav")}]
    with pytest.raises(DataError, match="a sound cannot be decoded"):
        batch_of(data, wav2vec2(), extractor())

    def decoded(feature: datasets.Audio, value: Any) -> dict[str, Any]:
        assert value["path"].endswith("a.wav")
        return {"array": np.ones(300), "sampling_rate": feature.sampling_rate}

    monkeypatch.setattr(datasets.Audio, "decode_example", decoded)
    assert batch_of(data, wav2vec2(), extractor())["input_values"].shape == (1, 300)

"""The page: every guide and every kind of data has one, its numbers are those of the library, and
text of the data stays text."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import pytest
import torch
from problems import (
    absolute,
    bert,
    bert_choice,
    bert_mlm,
    bert_tags,
    llama,
    mask_tokenizer,
    mlp,
    questions,
    reviews,
    tagged,
    tokenizer,
)

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.errors import ConfigError, DataError
from pyrolora.guides import MAP, NUTS, Ensemble, Flat, Guide, Laplace, MeanField, MonteCLoRA
from pyrolora.predictive import ClassPrediction, auroc
from pyrolora.report import Report, report_on
from pyrolora.report.examples import Examples
from pyrolora.report.facts import MOST_CLASSES, label_table

EVIL = """<script>alert(1)</script> "good" 'film' & <b>$x_1$</b>"""


class Page(HTMLParser):
    """Content of a page: the text of each element by its tag, and all tags with attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "wbr"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"<{tag}> is closed in the wrong place"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self._open[-1], data.strip()))

    def all(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags]

    @property
    def cells(self) -> list[str]:
        return self.all("td")

    @property
    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]

    @property
    def headings(self) -> list[str]:
        return self.all("h1", "h2", "h3")


@cache
def classifier(guide: Guide) -> Posterior:
    """Fit a plain network to 24 examples of three classes."""
    inputs = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    return pyrolora.fit(
        mlp(),
        (inputs, inputs[:, :3].argmax(-1)),
        guide,
        task="classification",
        adapter=AdapterConfig(r=2),
        epochs=3,
        batch_size=8,
        learning_rate=0.01,
    )


@cache
def reader() -> Posterior:
    """Fit an encoder to reviews, with names of classes."""
    names = {0: "<i>bad</i>", 1: 'the "good"'}
    network = bert(id2label=names, label2id={name: k for k, name in names.items()})
    return pyrolora.fit(network, reviews(24), tokenizer=tokenizer(), epochs=1, batch_size=8)


INSIDE = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
LABELS = INSIDE[:, :3].argmax(-1)
SHORT = {"num_samples": 4, "warmup_steps": 2, "max_tree_depth": 2}
GUIDES: dict[str, tuple[Guide, set[str]]] = {
    "map": (MAP(), {"Objective"}),
    "montec": (MonteCLoRA(), {"Objective", "KL by site", "Signal to noise", "Mixture weights"}),
    "flat montec": (
        Flat(inner=MonteCLoRA(), at_prediction=True),
        {"Objective", "KL by site", "Signal to noise", "Mixture weights"},
    ),
    "mean field": (MeanField(), {"Objective", "KL by site"}),
    "laplace": (Laplace(), {"Objective"}),
    "ensemble": (Ensemble(members=2), {"Objective"}),
    "nuts": (NUTS(**SHORT), {"Objective"}),
}
ALWAYS = {"Reliability", "Risk and coverage", "Uncertainty", "Adapter norms"}


@pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")
@pytest.mark.parametrize("name", GUIDES)
def test_every_guide_has_a_page(name: str) -> None:
    guide, pictures = GUIDES[name]
    posterior = classifier(guide)
    made = report_on(posterior, (INSIDE, LABELS), num_samples=4, seed=0)
    page = Page(made.html)
    assert {image["alt"].partition(":")[0] for image in page.images} == ALWAYS | pictures
    expected = posterior.evaluate((INSIDE, LABELS), 4, seed=0)
    assert made.metrics == pytest.approx(expected, nan_ok=True)
    assert f"{expected['nll']:.3f}" in page.cells
    assert all(title in page.headings for title in ("Warnings", "Metrics", "Settings"))
    assert all(one.title in page.headings and one.found in page.all("p") for one in made.findings)
    assert pyrolora.guides.full_name(guide) in page.all("dd")


def test_ranks_whose_noise_is_relative_to_them_are_not_called_useless() -> None:
    """Their ratio is that of the options, however much they do."""
    wide = MonteCLoRA(sample_scale=6, hold_back=0)
    for guide, relative in ((wide, True), (absolute(MonteCLoRA), False)):
        page = report_on(classifier(guide), INSIDE, num_samples=2, seed=0).html
        assert ("could be left out" in page) is not relative
        assert ("does not tell the worth" in page) is relative


TEXTS = ["the film was good", "a dull book", "not very fine"]
KINDS: dict[str, tuple[Callable[[], Any], Callable[[int], Any], dict[str, Any], set[str]]] = {
    "regression": (
        lambda: bert(1),
        lambda n: [{**row, "label": row["label"] - 0.25} for row in reviews(n)],
        {"tokenizer": tokenizer()},
        {"Risk and coverage", "Uncertainty"},
    ),
    "multiple choice": (bert_choice, questions, {"tokenizer": tokenizer()}, ALWAYS),
    "causal": (
        llama,
        lambda n: reviews(n).remove_columns("label"),
        {"tokenizer": tokenizer()},
        {"Risk and coverage", "Uncertainty"},
    ),
    "tags": (bert_tags, tagged, {"tokenizer": tokenizer()}, ALWAYS),
    "masked": (
        bert_mlm,
        lambda n: reviews(n).remove_columns("label"),
        {"tokenizer": mask_tokenizer()},
        {"Risk and coverage", "Uncertainty"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_has_a_page(kind: str) -> None:
    network, data, options, pictures = KINDS[kind]
    guide = MeanField(kl_weight=1.0)
    posterior = pyrolora.fit(network(), data(16), guide, epochs=1, batch_size=8, **options)
    made = report_on(posterior, data(8), num_samples=3, seed=5)
    page = Page(made.html)
    expected = posterior.evaluate(data(8), 3, seed=5)
    assert made.metrics == pytest.approx(expected, nan_ok=True)
    assert {image["alt"].partition(":")[0] for image in page.images} >= pictures
    assert {"Confident errors", "Most certain", "Least certain"} <= set(page.headings)
    first = data(8)[0]
    text = first.get("text", first.get("question")) or " ".join(first["tokens"])
    assert text in page.cells


def test_every_token_of_an_uncertain_text_is_shown_with_its_entropy() -> None:
    network, data, options, _ = KINDS["causal"]
    posterior = pyrolora.fit(network(), data(16), "map", epochs=1, **options)
    test = datasets.Dataset.from_dict({"text": ["a film", "the film was not very good"]})
    page = Page(report_on(posterior, test, num_samples=2, seed=0).html)
    prediction = posterior.predict(test, 2, seed=0)
    spans = [attributes for tag, attributes in page.tags if tag == "span"]
    ids = [tokenizer()(text)["input_ids"] for text in test["text"]]
    assert len(spans) == sum(map(len, ids))
    order = prediction.uncertainty.argsort(descending=True).tolist()
    shown = [float(a["title"].split()[0]) if "title" in a else None for a in spans]
    expected = [
        value for i in order for value in [None, *prediction.entropy[i, : len(ids[i]) - 1].tolist()]
    ]
    assert shown == [None if v is None else pytest.approx(v, abs=1e-3) for v in expected]
    words = [tokenizer().decode([number]) for i in order for number in ids[i]]
    assert page.all("span") == words


def test_texts_that_are_padded_tensors_can_be_shown() -> None:
    ids = torch.tensor([[2, 4, 6, 3], [2, 5, 3, 0]])
    data = datasets.Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": ids.ne(0).long().tolist()}
    )
    posterior = pyrolora.fit(llama(), data, "map", epochs=1)
    page = Page(report_on(posterior, data, num_samples=1, seed=0).html)
    assert page.all("span").count("4") == 1, "without a tokenizer a token has its number"


# Data -------------------------------------------------------------------------------------------


def test_other_data_are_told_apart() -> None:
    posterior = classifier(MonteCLoRA())
    outside = 5 * INSIDE[:20]
    made = report_on(posterior, (INSIDE, LABELS), outside=(outside,), num_samples=4, seed=0)
    scores = [posterior.predict((x,), 4, seed=0).uncertainty for x in (INSIDE, outside)]
    assert made.metrics["ood_auroc"] == auroc(*scores)
    assert "AUROC of other data" in Page(made.html).cells
    assert "Outside data: 20 examples." in made.html


def test_labels_of_other_data_are_not_looked_at() -> None:
    """They may be of classes that the network does not have."""
    outside = [{"text": "the book was dull", "label": "philosophy"}]
    made = report_on(reader(), reviews(6), outside=outside, num_samples=2, seed=0)
    assert 0 <= made.metrics["ood_auroc"] <= 1


def test_of_very_many_classes_the_most_frequent_are_listed() -> None:
    targets = torch.tensor([70, 70, 3])
    draws = torch.eye(80)[torch.tensor([[70, 3, 3]])]
    prediction = ClassPrediction(targets, torch.zeros(1, 3), draws)
    table = label_table(Examples(torch.ones(3, 4), mlp()), prediction)
    assert table is not None
    assert len(table) == MOST_CLASSES
    assert table["class"].tolist()[:2] == ["70", "3"]
    assert table["target"].tolist()[:3] == [2, 1, 0]
    assert table["predicted"].tolist()[:3] == [1, 2, 0]


def test_without_labels_there_are_entropies_and_no_metrics() -> None:
    made = report_on(classifier(MonteCLoRA()), (INSIDE,), num_samples=4, seed=0)
    page = Page(made.html)
    assert made.metrics == {}
    assert "Metrics" not in page.headings
    assert "Reliability table" not in page.headings
    assert "Confident errors" not in page.headings
    assert {"Uncertainty", "Least certain"} <= set(page.headings)


def test_other_data_have_an_auroc_without_labels() -> None:
    made = report_on(
        classifier(MonteCLoRA()), (INSIDE,), outside=(5 * INSIDE,), num_samples=4, seed=0
    )
    assert set(made.metrics) == {"ood_auroc"}


def test_confident_errors_come_first_the_surest_at_the_top() -> None:
    posterior = reader()
    data = reviews(40, seed=3)
    wrong = [1 - label for label in posterior.predict(data, 4, seed=0).predicted.tolist()[:10]]
    labels = wrong + posterior.predict(data, 4, seed=0).predicted.tolist()[10:]
    data = data.remove_columns("label").add_column("label", labels)
    prediction = posterior.predict(data, 4, seed=0)
    page = Page(report_on(posterior, data, num_samples=4, seed=0).html)
    headings = [h for h in page.headings if h in ("Confident errors", "Most certain")]
    assert headings == ["Confident errors", "Most certain"]
    assert "10 of 40 answers are wrong; these are the most confident of them." in page.all("p")
    surest = prediction.probs.amax(-1)[:10].argsort(descending=True)
    start = page.texts.index(("h3", "Confident errors"))
    cells = [text for tag, text in page.texts[start:] if tag == "td"]
    assert cells[0] == str(int(surest[0]))
    assert cells[1] == data["text"][int(surest[0])]
    assert cells[4] == f"{prediction.probs.amax(-1)[surest[0]]:.3f}"


def test_text_of_the_data_is_never_markup() -> None:
    """Nor are the names of classes."""
    data = datasets.Dataset.from_list([{"text": EVIL, "label": 1}, {"text": EVIL, "label": 0}])
    html = report_on(reader(), data, num_samples=2, seed=0).html
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "i", "b", "iframe"}
    assert page.cells.count(EVIL) >= 4
    assert "<i>bad</i>" in page.cells
    assert 'the "good"' in page.cells
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]


def test_tokens_are_never_markup() -> None:
    made = tokenizer()
    made.add_tokens(["<script>alert(1)</script>"])
    network = llama(vocab_size=len(made))
    data = [{"text": "good <script>alert(1)</script> film"}] * 2
    posterior = pyrolora.fit(network, data, "map", tokenizer=made, epochs=1)
    page = Page(report_on(posterior, data, num_samples=1, seed=0).html)
    assert "<script>alert(1)</script>" in page.all("span")
    assert "script" not in {tag for tag, _ in page.tags}


# The page itself ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> Report:
    return report_on(classifier(MonteCLoRA()), (INSIDE, LABELS), num_samples=4, seed=0)


def test_the_page_is_whole_and_carries_everything_in_itself(made: Report) -> None:
    page = Page(made.html)
    assert made.html.startswith('<!doctype html>\n<html lang="en">')
    tags = [tag for tag, _ in page.tags]
    assert (tags.count("title"), tags.count("h1"), tags.count("main")) == (1, 1, 1)
    sources = [v for _, attributes in page.tags for k, v in attributes.items() if k == "src"]
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    links = [v for _, attributes in page.tags for k, v in attributes.items() if k == "href"]
    assert all(link == "data:," or link.startswith("#") for link in links)
    assert {link[1:] for link in links if link.startswith("#")} == {
        attributes["id"] for _, attributes in page.tags if "id" in attributes
    }
    assert not re.search(r"https?:|url\(|@import|<script", made.html)
    assert all(image["alt"] for image in page.images)


def test_the_pictures_load_nothing(made: Report) -> None:
    for image in Page(made.html).images:
        svg = base64.b64decode(image["src"].partition(",")[2]).decode()
        assert svg.rstrip().endswith("</svg>")
        assert not re.search(r'href="(?!#|data:)', svg)
        assert "<script" not in svg


def test_the_page_says_what_made_it(made: Report) -> None:
    page = Page(made.html)
    facts = dict(zip(page.all("dt"), page.all("dd"), strict=True))
    posterior = classifier(MonteCLoRA())
    assert facts["network"] == "Sequential"
    assert facts["rank"] == "2"
    assert facts["adapted layers"] == "2"
    assert facts["entries of the adapters"] == str(2 * (4 + 16) + 2 * (16 + 3))
    assert facts["training examples"] == "24"
    assert facts["examples"] == "30"
    assert facts["sample scale".replace(" ", "_")] == f"{posterior.options.sample_scale:g}"
    assert facts["learning rate"] == "0.01"
    assert facts["torch"] == version("torch")
    assert "noise" in facts["latent sites"]
    assert any("4 draws, seed 0" in text for text in page.all("p"))


def test_a_page_without_a_seed_states_the_one_that_it_drew() -> None:
    html = report_on(classifier(MAP()), (INSIDE,), num_samples=1).html
    assert re.search(r"seed \d+;", html)


# The file -----------------------------------------------------------------------------------------


def test_the_method_writes_the_same_page_whatever_the_users_style(
    tmp_path: Path, made: Report
) -> None:
    file = tmp_path / "report.html"
    posterior = classifier(MonteCLoRA())
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "black"}):
        written = posterior.report(str(file), (INSIDE, LABELS), num_samples=4, seed=0)
    assert written == file
    assert file.read_text(encoding="utf-8") == made.html
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"], "no scratch file is left"


def test_an_older_page_stays_whole_when_a_write_fails(
    tmp_path: Path, made: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "report.html"
    file.write_text("the older one")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(content[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        made.write(file)
    assert file.read_text() == "the older one"


@pytest.mark.parametrize("where", [".", "missing/report.html"])
def test_a_place_that_cannot_be_written_is_refused_before_any_prediction(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior = classifier(MonteCLoRA())
    monkeypatch.setattr(Posterior, "predict", lambda *_, **__: pytest.fail("it predicts"))
    expected = {".": "is a folder; name a file", "missing/report.html": "there is no folder"}[where]
    with pytest.raises(ConfigError, match=expected):
        posterior.report(tmp_path / where, (INSIDE, LABELS))


def test_data_that_cannot_be_read_are_refused_as_everywhere(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the data is empty"):
        classifier(MonteCLoRA()).report(tmp_path / "x.html", [])
    assert not list(tmp_path.iterdir())

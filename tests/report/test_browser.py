"""The page in a real browser, headless, on a screen as narrow as a telephone's."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
from browsing import REQUIRED, browser
from problems import bert, reviews, tokenizer

import pyrolora
from pyrolora.report import Report, report_on

WIDTH = 390
EVIL = """<script>document.title = "taken"</script><img src=x onerror=alert(1)> "good" & 'bad'"""
# The page stands as it is, in a frame of the narrow width: a window of the browser's own cannot be
# that narrow. The script outside of the frame looks at it and writes down what it finds.
HARNESS = """<!doctype html><meta charset="utf-8"><body style="margin: 0">
<iframe style="width: {width}px; height: 844px; border: 0" srcdoc="{page}"></iframe>
<pre id="found"></pre>
<script>
addEventListener("load", () => {{
  const view = document.querySelector("iframe").contentWindow, page = view.document;
  const texts = (selector) => [...page.querySelectorAll(selector)].map((e) => e.textContent);
  const box = (e) => e.getBoundingClientRect();
  const sideways = (e) => box(e).right > view.innerWidth + 1 && !e.closest(".scroll");
  const all = [...page.body.querySelectorAll("*")];
  document.getElementById("found").textContent = JSON.stringify({{
    width: view.innerWidth,
    scrollWidth: page.documentElement.scrollWidth,
    sideways: all.filter(sideways).map((e) => e.outerHTML.slice(0, 80)),
    title: page.title,
    headings: texts("h1, h2, h3"),
    cells: texts("td"),
    warnings: [...page.querySelectorAll("[data-finding]")].map((e) => e.dataset.finding),
    images: [...page.images].map((i) => [i.complete, i.naturalWidth, box(i).width]),
    scripts: page.scripts.length,
    requests: view.performance.getEntriesByType("resource").map((r) => r.name),
    font: parseFloat(view.getComputedStyle(page.querySelector("td")).fontSize),
  }});
}});
</script>
"""


@dataclass(frozen=True)
class Visit:
    """The elements that a browser found on a page, and its console."""

    found: dict[str, Any]
    console: list[str]


def visit(page: str, folder: Path, width: int = WIDTH) -> Visit:
    """Open a page in a frame of that width."""
    file = folder / "harness.html"
    file.write_text(HARNESS.format(width=width, page=html.escape(page)), encoding="utf-8")
    command = [
        *(browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--hide-scrollbars", "--enable-logging=stderr", f"--window-size={max(width, 500)},844"),
        *(f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"),
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, f"the page was not read: {done.stdout[:500]}\n{done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Visit(json.loads(html.unescape(found[1])), console)


@pytest.fixture(scope="module")
def report() -> Report:
    """Report on a briefly fitted encoder; one text, and the names of classes, hold markup."""
    names = {0: "bad", 1: EVIL}
    network = bert(id2label=names, label2id={name: k for k, name in names.items()})
    posterior = pyrolora.fit(network, reviews(24), tokenizer=tokenizer(), epochs=3, batch_size=8)
    long = {"text": "x" * 300 + " " + "very" * 300, "label": 0}
    data = datasets.Dataset.from_list([*reviews(3, seed=1), {"text": EVIL, "label": 1}, long])
    return report_on(posterior, data, outside=["the book"], num_samples=4, seed=0)


@pytest.fixture(scope="module")
def narrow(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Visit:
    return visit(report.html, tmp_path_factory.mktemp("narrow"))


def test_the_page_is_rendered(narrow: Visit, report: Report) -> None:
    found = narrow.found
    assert found["title"] == "Posterior report: montec on BertForSequenceClassification"
    assert {"Warnings", "Metrics", "Examples", "Settings", "Reliability"} <= set(found["headings"])
    assert found["warnings"] == [one.name for one in report.findings]
    assert "few_examples" in found["warnings"]
    for value in report.metrics.values():
        assert (f"{value:.3f}" if value == value else "–") in found["cells"]


def test_every_picture_is_drawn(narrow: Visit) -> None:
    assert len(narrow.found["images"]) == 8
    for complete, natural, shown in narrow.found["images"]:
        assert complete
        assert natural > 200
        assert 200 < shown <= WIDTH


def test_a_narrow_screen_is_enough(narrow: Visit) -> None:
    """Nothing sticks out but tables in a frame of their own, and the letters are not tiny."""
    found = narrow.found
    assert found["width"] == WIDTH
    assert found["scrollWidth"] <= WIDTH
    assert found["sideways"] == []
    assert found["font"] >= 13


def test_nothing_is_loaded_and_nothing_complains(narrow: Visit) -> None:
    assert narrow.console == []
    assert [name for name in narrow.found["requests"] if not name.startswith("data:")] == []


def test_text_of_the_data_is_text(narrow: Visit) -> None:
    assert narrow.found["scripts"] == 0
    assert narrow.found["cells"].count(EVIL) >= 2
    assert narrow.found["title"] != "taken"


def test_a_wide_screen_has_the_same_page(report: Report, tmp_path: Path, narrow: Visit) -> None:
    wide = visit(report.html, tmp_path, width=1280)
    assert wide.console == []
    assert wide.found["scrollWidth"] <= 1280
    assert wide.found["cells"] == narrow.found["cells"]


def test_what_the_other_tests_look_for_would_be_seen(report: Report, tmp_path: Path) -> None:
    """A script, a picture from elsewhere, something too wide: on the console and in the measures;
    the page's own policy lets neither run nor load."""
    broken = report.html.replace(
        "<main>",
        '<main><script>document.title = "taken"</script><img src="http://127.0.0.1:9/x.png">'
        '<div style="width: 900px">wide</div>',
    )
    seen = visit(broken, tmp_path)
    assert len(seen.console) >= 2
    assert seen.found["title"] != "taken"
    assert seen.found["scrollWidth"] > WIDTH
    assert any("wide" in element for element in seen.found["sideways"])
    assert seen.found["scripts"] == 1
    assert any(natural == 0 for _, natural, _ in seen.found["images"])


def test_a_missing_browser_is_told_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        browser()
    monkeypatch.setenv(REQUIRED, "required")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        browser()

"""The page at ``/`` in a real browser."""

from __future__ import annotations

import asyncio
import html
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from browsing import browser
from problems import bert, reviews, tokenizer
from servers import Shop, get, post, running, served
from starlette.responses import HTMLResponse

import pyrolora
from pyrolora.predictive import following as following_module
from pyrolora.serving.app import create_app
from pyrolora.serving.page import PAGE

WIDTH = 390
EVIL = """<script>document.title = "taken"</script><img src=x onerror=alert(1)> "good" & 'bad'"""

# A page of the same origin holds the served one in a frame of the narrow width, types, asks and
# writes down what it sees. The frame is the page without its policy; that is tested by itself.
DRIVER = """<!doctype html><meta charset="utf-8"><body style="margin: 0">
<iframe src="/framed" style="width: {width}px; height: 844px; border: 0"></iframe>
<pre id="found"></pre>
<script>
addEventListener("load", async () => {{
  const view = document.querySelector("iframe").contentWindow, page = view.document;
  const $ = (id) => page.getElementById(id);
  const texts = (selector) => [...page.querySelectorAll(selector)].map((e) => e.textContent);
  const ready = async () => {{
    for (let k = 0; k < 2400 && ($("ask").disabled || !$("name").options.length); k++) {{
      await fetch("/pause");  // the browser's own clock does not wait for streams
    }}
  }};
  const found = {{}};
  try {{
    await ready();
    found.names = [...$("name").options].map((option) => option.value);
    $("name").value = {name};
    $("name").dispatchEvent(new view.Event("change"));
    $("text").value = {text};
    for (const [id, value] of Object.entries({fields})) $(id).value = value;
    const grown = [];
    new view.MutationObserver(() => {{
      const length = texts(".token").length;
      if (length && length !== grown.at(-1)) grown.push(length);
    }}).observe($("answer"), {{ childList: true, subtree: true }});
    $("ask").click();
    await ready();
    found.grown = grown;
    const all = [...page.body.querySelectorAll("*")];
    Object.assign(found, {{
      title: page.title,
      error: texts("#error").join(""),
      classes: texts(".class"),
      tokens: texts(".token"),
      shades: [...page.querySelectorAll(".token")].map((e) => e.style.backgroundColor),
      others: texts(".other"),
      answer: texts("#answer").join(""),
      writing: [...page.querySelectorAll(".write")].map((e) => e.offsetHeight > 0),
      images: page.images.length,
      scripts: page.scripts.length,
      width: view.innerWidth,
      scrollWidth: page.documentElement.scrollWidth,
      sideways: all.filter((e) => e.getBoundingClientRect().right > view.innerWidth + 1)
        .map((e) => e.outerHTML.slice(0, 80)),
      font: parseFloat(view.getComputedStyle($("text")).fontSize),
      requests: view.performance.getEntriesByType("resource").map((r) => r.name),
    }});
  }} catch (error) {{ found.error = String(error); }}
  document.getElementById("found").textContent = JSON.stringify(found);
}});
</script>
"""


def visit(url: str, folder: Path) -> tuple[str, list[str]]:
    """The document at ``url`` when all has come to rest, and the browser's complaints."""
    command = [
        *(browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--hide-scrollbars", "--enable-logging=stderr", "--window-size=500,844"),
        *(f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"),
        url,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def driven(url: str, folder: Path) -> tuple[dict[str, Any], list[str]]:
    dom, console = visit(url, folder)
    found = re.search(r'<pre id="found">(.+?)</pre>', dom, re.DOTALL)
    assert found is not None, dom[-2000:]
    return json.loads(html.unescape(found[1])), console


def with_driver(app: Any, name: str, text: str, **fields: str) -> Any:
    said = {"name": name, "text": text, "fields": {"seed": "3", **fields}}
    driver = DRIVER.format(width=WIDTH, **{key: json.dumps(value) for key, value in said.items()})

    @app.get("/framed")
    def framed() -> HTMLResponse:
        return HTMLResponse(PAGE)

    @app.get("/pause")
    async def pause() -> None:
        await asyncio.sleep(0.05)

    @app.get("/driver")
    def page() -> HTMLResponse:
        return HTMLResponse(driver)

    return app


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """A classifier whose class has markup for its name."""
    root = tmp_path_factory.mktemp("evil")
    names = {0: "bad", 1: EVIL}
    network = bert(id2label=names, label2id={name: k for k, name in names.items()})
    posterior = pyrolora.fit(network, reviews(16), tokenizer=tokenizer(), epochs=1)
    posterior.save(root / "posteriors" / "evil & sons")
    return Shop(root / "posteriors", network)


def test_classes_are_shown_and_markup_is_text(evil: Shop, tmp_path: Path) -> None:
    app = with_driver(create_app(served(evil)), "evil & sons", "the film <b>was</b> good")
    with running(app) as url:
        body = {"inputs": "the film <b>was</b> good", "parameters": {"seed": 3}}
        rows = post(f"{url}/classify", json=body).json()
        found, console = driven(f"{url}/driver", tmp_path)
    assert found["error"] == ""
    assert console == []
    assert found["names"] == ["evil & sons"]
    assert found["title"] == "pyrolora: ask a posterior"
    assert found["images"] == 0
    assert found["scripts"] == 1
    for shown, row in zip(found["classes"], rows, strict=True):
        assert shown.startswith(f"{row['entity']}: {100 * row['score']:.1f} %")
        assert f"{100 * row['uncertainty']['high']:.1f} %" in shown
    assert EVIL in "".join(found["classes"])
    about = rows[0]["uncertainty"]
    assert f"{about['entropy']:.3f} in all" in found["answer"]
    assert f"between draws {about['epistemic']:.3f}" in found["answer"]
    assert found["writing"] == [False, False]
    assert found["width"] == WIDTH
    assert found["scrollWidth"] <= WIDTH
    assert found["sideways"] == []
    assert found["font"] >= 16
    assert all(name.startswith(url) for name in found["requests"])


def test_tokens_are_shaded_and_other_draws_stand_beside(writers: Any, tmp_path: Path) -> None:
    app = with_driver(create_app(served(writers)), "plain", "the film was")
    with running(app) as url:
        body = {
            "model": "plain",
            "prompt": "the film was",
            "max_tokens": 20,
            "temperature": 0,
            "seed": 3,
        }
        limits = post(f"{url}/v1/completions", json={**body, "max_tokens": 30})
        assert limits.status_code == 413
        found, _ = driven(f"{url}/driver", tmp_path)
        assert "shorten it or lower the number of new tokens" in found["error"]
        assert found["writing"] == [True, True]
    app = with_driver(create_app(served(writers)), "plain", "the film was", tokens="6")
    with running(app) as url:
        answer = post(f"{url}/v1/completions", json={**body, "max_tokens": 6}).json()
        found, console = driven(f"{url}/driver", tmp_path)
    assert (found["error"], console) == ("", [])
    about = answer["choices"][0]["uncertainty"]
    assert found["tokens"] == [token["text"] for token in about["tokens"]]
    assert all(shade.startswith("rgba(194, 65, 12") for shade in found["shades"])
    assert len(found["others"]) == len(about["continuations"]) > 0
    for shown, other in zip(found["others"], about["continuations"], strict=True):
        assert shown.startswith(other["text"])
    assert found["scrollWidth"] <= WIDTH
    assert found["sideways"] == []


def test_one_draw_is_named_by_its_number_and_streams(
    writers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = following_module.Following
    step = following.__call__

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)  # so that the browser can draw what it has
        return step(*args, **kwargs)

    monkeypatch.setattr(following, "__call__", slowly)
    app = create_app(served(writers))
    app = with_driver(app, "plain", "the film was", tokens="6", seed="", draws="4")
    with running(app) as url:
        found, console = driven(f"{url}/driver", tmp_path)
    assert (found["error"], console) == ("", [])
    alone = pyrolora.load(writers.directory / "plain", writers.base).generate(
        ["the film was"], draws=[4], max_new_tokens=6
    )
    assert alone.texts is not None
    assert "".join(found["tokens"]) == alone.texts[0][0]
    assert "Draws by number: 4" in found["answer"]
    assert found["grown"][0] < len(found["tokens"])
    assert found["grown"] == sorted(found["grown"])


def test_what_is_no_number_of_a_draw_is_said_before_it_is_sent(
    classifying: Any, tmp_path: Path
) -> None:
    app = with_driver(create_app(served(classifying.shop)), "reviews", "good", draws="first")
    with running(app) as url:
        found, _ = driven(f"{url}/driver", tmp_path)
    assert "whole numbers" in found["error"]
    assert found["classes"] == []


def test_the_policy_lets_the_page_run_and_nothing_else(classifying: Any, tmp_path: Path) -> None:
    dom, console = visit(f"{classifying.url}/", tmp_path)
    assert re.findall(r'<option value="(\w+)">', dom) == ["other", "reviews", "third"]
    assert console == []
    policy = get(f"{classifying.url}/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


def test_the_page_needs_nothing_from_elsewhere() -> None:
    assert re.findall(r"(?:src|href)=", PAGE) == []
    assert "innerHTML" not in PAGE
    assert "://" not in PAGE
    assert PAGE.count("<script>") == PAGE.count("<style>") == 1

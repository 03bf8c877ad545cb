"""The site is whole: its pages, their links, the API, and the pages of other libraries."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import runpy
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import ROOT

import pyrolora
from pyrolora import arviz, diagnostics, distributions, errors, guides, plots, predictive, tasks

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
REFERENCES = yaml.safe_load((ROOT / "docs/site/references.yml").read_text(encoding="utf-8"))
GENERATED = "docs/api/commands.md"
NOWHERE = "http://127.0.0.1:9"
LIBRARIES = "arviz|datasets|matplotlib|numpy|pandas|peft|pyro|torch|transformers"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
NAVIGATION = runpy.run_path(str(ROOT / "docs/site/navigation.py"))
PUBLIC = (pyrolora, arviz, diagnostics, distributions, guides, plots, predictive, tasks)


def public_names() -> list[str]:
    """Every name that a public module offers, and every error."""
    names = [f"{module.__name__}.{name}" for module in PUBLIC for name in module.__all__]
    kinds = [name for name, kind in vars(errors).items() if name.endswith("Error")]
    found = [*names, *(f"pyrolora.errors.{name}" for name in kinds)]
    return [name for name in found if not inspect.ismodule(pkgutil.resolve_name(name))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site and the repository's viewers make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


def test_the_navigation_has_every_page_and_every_notebook() -> None:
    pages = NAVIGATION["leaves"](NAVIGATION["expanded"](CONFIG["nav"]))
    assert len(pages) == len(set(pages))
    assert pages.index("docs/start.md") == 1  # on one's own adapter first
    there = [*PAGES, *(ROOT / "notebooks").glob("*.ipynb")]
    there = [path for path in there if path.parent != ROOT / "benchmarks/results"]
    missing = {path.relative_to(ROOT).as_posix() for path in there} - set(pages)
    assert not missing, f"name these in the nav of mkdocs.yml: {sorted(missing)}"
    assert [p for p in pages if p != GENERATED and not (ROOT / p).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if target == ROOT / GENERATED:
            continue
        assert target.is_file(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


def test_the_api_documents_every_public_name() -> None:
    found = [
        name
        for page in (ROOT / "docs/api").glob("*.md")
        for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(found) == len(set(found))
    shown = {id(pkgutil.resolve_name(name)) for name in found}
    missing = [n for n in public_names() if id(pkgutil.resolve_name(n)) not in shown]
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    rest = set(re.findall(r"^<!-- the rest of (\S+) -->$", pages, re.MULTILINE))
    assert {name for name in missing if name.rpartition(".")[0] not in rest} == set()


@pytest.mark.parametrize("name", REFERENCES)
def test_a_name_of_another_library_exists_and_has_a_page(name: str) -> None:
    library, *parts = name.split(".")
    found: Any = importlib.import_module(library)
    for i, part in enumerate(parts):
        if not hasattr(found, part):
            importlib.import_module(".".join([library, *parts[: i + 1]]))
        found = getattr(found, part)
    assert re.fullmatch(r"https://[\w.-]+/[\w./-]+(#[\w.-]+)?", REFERENCES[name])


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    offline = {"NO_MKDOCS_2_WARNING": "1", "https_proxy": NOWHERE, "http_proxy": NOWHERE}
    environment = {**os.environ, **offline}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert {"index.html", "start.html", "api/commands.html", "notebooks/01_quickstart.html"} <= {
        path.relative_to(tmp_path).as_posix() for path in pages
    }
    for path, html in pages.items():
        loaded = re.findall(r'<(?:script|img|iframe)\b[^>]*\bsrc="(https?:[^"]*)"', html)
        loaded += re.findall(r'<link\b[^>]*rel="stylesheet"[^>]*href="(https?:[^"]*)"', html)
        assert not loaded, (path, loaded)
        left = re.findall(rf'<span title="((?:{LIBRARIES})\.[\w.]*)"', html)
        assert not left, f"{path.name}: give these a page in docs/site/references.yml: {left}"
        local = re.findall(r'(?:href|src)="((?!https?:|data:|mailto:|#|javascript:)[^"#]+)', html)
        for link in local if path.name != "404.html" else []:  # whose links are the root's
            assert (path.parent / link).exists(), (path, link)
    assert 'docs.pytorch.org/docs/stable/tensors.html#torch.Tensor"' in html_of(pages, "api/guides")
    assert set(public_names()) <= documented(tmp_path / "objects.inv")


def html_of(pages: dict[Path, str], name: str) -> str:
    """The page of that name."""
    (found,) = [html for path, html in pages.items() if path.as_posix().endswith(f"{name}.html")]
    return found


def documented(inventory: Path) -> set[str]:
    """The names in an inventory of Sphinx, which other sites take to link to this one."""
    head, _, packed = inventory.read_bytes().partition(b"compressed using zlib.\n")
    assert head.startswith(b"# Sphinx inventory")
    return {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}

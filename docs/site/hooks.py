"""What the site adds to mkdocs: the repository's own paths, the commands, and links elsewhere.

Pages lie where the repository has them (`README.md`, `docs/tasks.md`, `notebooks/...`), and mkdocs
looks links up by these paths: one link holds in the repository and on the site, where mkdocs
checks it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections import Counter
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import typer
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from navigation import ROOT, expanded
from typer.cli import get_docs_for_click
from typer.main import get_command

PAGES = ("*.md", "docs/**/*.md", "notebooks/*.ipynb", "benchmarks/**/*.md", "models/*/README.md")
COMMANDS = "docs/api/commands.md"
ASSETS = ("docs/*.png", "docs/site/*.css")
OBJECT = re.compile(r"^::: (\S+)", re.MULTILINE)
REST = re.compile(r"<!-- the rest of (\S+) -->")
CODE = re.compile(
    r"<(a|autoref|pre|h\d)\b.*?</\1>|<code>([A-Za-z_][\w.]*)(\(\))?</code>", re.DOTALL
)
SHORT = {"az": "arviz", "nn": "torch.nn"}  # as the texts write them
LINK = re.compile(r"\]\(([^)\s:#]+)(?:#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> None:
    """Put files in the place of the navigation's patterns."""
    config.nav = expanded(config.nav)


@event_priority(100)  # before notebooks are recognised
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take the files from the repository, with whatever a page links to."""
    paths = {path for pattern in (*PAGES, *ASSETS) for path in ROOT.glob(pattern)}
    linked = {found for page in paths if page.suffix == ".md" for found in links(page)}
    placed = [place(path, config) for path in sorted(paths | linked)]
    generated = File.generated(config, COMMANDS, content=commands())
    generated.dest_uri = "api/commands.html"
    theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*theme, *placed, generated])


def links(page: Path) -> set[Path]:
    """Return the files of the repository that a page of Markdown links to."""
    found = {(page.parent / link).resolve() for link in LINK.findall(page.read_text("utf-8"))}
    return {path for path in found if path.is_file() and path.is_relative_to(ROOT)}


def place(path: Path, config: MkDocsConfig) -> File:
    """Return a file under its path in the repository, and its place on the site."""
    source = path.relative_to(ROOT).as_posix()
    file = File(source, str(ROOT), config.site_dir, config.use_directory_urls)
    if path.suffix == ".md":
        name = "index" if path.stem in ("README", "index") else path.stem.lower()
        target = path.relative_to(ROOT).with_name(f"{name}.html").as_posix()
    else:
        target = file.dest_uri
    file.dest_uri = target.removeprefix("docs/")
    return file


def commands() -> str:
    """Return the page of all commands and their options, as the command line itself has them."""
    from pyrolora.cli import app

    group = get_command(app)
    context = typer.Context(group, info_name="pyrolora")
    with redirect_stdout(StringIO()):  # asked for, the help names what the registries hold
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            command.get_help(typer.Context(command, info_name=name, parent=context))
    text = str(get_docs_for_click(obj=group, ctx=context, name="pyrolora"))
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", text)  # the list of contents has them
    # After "\b" the help keeps its lines.
    return re.sub(r"\x08\n(.*?)\n\n", "```text\n\\1\n```\n\n", text, flags=re.DOTALL)


@cache
def references() -> dict[str, str]:
    """Return the pages of other libraries' names."""
    return dict(yaml.safe_load((ROOT / "docs/site/references.yml").read_text("utf-8")))


def on_env(env: Any, config: MkDocsConfig, files: Files) -> None:
    """Let names of other libraries lead to their pages."""
    for name, page in references().items():
        config.plugins["autorefs"].register_url(name, page)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Document the names of a module that no page of the API has a place for."""

    def rest(match: re.Match[str]) -> str:
        module = importlib.import_module(match.group(1))
        shown = {id(pkgutil.resolve_name(name)) for name in objects()}
        left = [name for name in module.__all__ if id(getattr(module, name)) not in shown]
        left = [name for name in left if not inspect.ismodule(getattr(module, name))]
        return "\n\n".join(f"::: {match.group(1)}.{name}" for name in left)

    return REST.sub(rest, markdown)


@cache
def objects() -> list[str]:
    """Return the objects that pages of the API name."""
    pages = (ROOT / "docs/api").glob("*.md")
    return [name for page in pages for name in OBJECT.findall(page.read_text("utf-8"))]


@cache
def documented() -> dict[str, str]:
    """Return the public objects by their short names, where these are unique."""
    shorts = Counter(name.rsplit(".", 1)[-1] for name in objects())
    return {short: name for name in objects() if shorts[short := name.rsplit(".", 1)[-1]] == 1}


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make references of names in code: `Posterior.predict`, `torch.nn.Module`."""
    if page.file.src_uri.endswith(".ipynb"):
        return re.sub(r'href="\.\./docs/(\w+)\.md', r'href="../\1.html', html)
    if page.file.src_uri == COMMANDS:
        return html

    def link(match: re.Match[str]) -> str:
        code, name = match.group(0), match.group(2)
        target = name and identifier(name)
        return f'<autoref identifier="{target}" optional>{code}</autoref>' if target else code

    return CODE.sub(link, html)


def identifier(name: str) -> str | None:
    """Return what a name in a text may refer to: ours, or another library's."""
    first, _, rest = name.partition(".")
    if first in SHORT:
        return f"{SHORT[first]}.{rest}"
    if name.startswith("pyrolora.") or name in references():
        return name
    if first in documented() and first[0].isupper():
        return f"{documented()[first]}.{rest}".rstrip(".")
    return None

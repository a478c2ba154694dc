"""mkdocs.yml: the site builds strictly without a network, loads nothing from elsewhere, has all."""

from __future__ import annotations

import html.parser
import re
import socket
from pathlib import Path
from typing import Any

import docs_site
import pytest

import megalr
from megalr import optim, transformers

mkdocs_build = pytest.importorskip("mkdocs.commands.build")
mkdocs_config = pytest.importorskip("mkdocs.config")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).parents[2]
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""Attributes by tag with which a page loads something, unlike the ``href`` of a link."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; every connection is refused while it is built."""

    def refuse(*_: Any) -> None:
        raise OSError("no network in this test")

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.chdir(ROOT)
        config = mkdocs_config.load_config("mkdocs.yml", site_dir=str(folder), strict=True)
        config.plugins.on_startup(command="build", dirty=False)
        mkdocs_build.build(config)  # raises where something is warned of
    return folder


class Loaded(html.parser.HTMLParser):
    """Addresses that a page loads, and the text of its styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") in ("canonical", "next", "prev"):
            return
        if address := values.get(LOADS.get(tag, "")):
            self.found.append(address)


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = [path for path in site.rglob("*.html") if path.name != "404.html"]
    assert len(pages) >= 50
    for path in pages:
        for address in Loaded(path.read_text(encoding="utf-8")).found:
            assert not re.match(r"(https?:)?//", address), (path, address)
            place = path.parent / address.partition("?")[0].partition("#")[0]
            assert address.startswith("data:") or place.exists(), (path, address)
    for path in site.rglob("*.css"):
        style = path.read_text(encoding="utf-8")
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style), path


def test_every_page_of_the_repository_is_there(site: Path) -> None:
    for place in docs_site.site_paths().values():
        page = Path(place).with_name(Path(place).name.replace("README.md", "index.md"))
        assert (site / page.with_suffix(".html" if page.suffix == ".md" else page.suffix)).exists()


def test_the_api_has_every_public_name_with_its_docstring(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    names = [f"megalr.{name}" for name in megalr.__all__ if name not in ("__version__", "optim")]
    names += [f"megalr.optim.{name}" for name in optim.__all__]
    names += [f"megalr.transformers.{name}" for name in transformers.__all__]
    parts = {part.split('"')[0]: part for part in text.split(' id="')}
    assert set(names) <= set(parts)
    for name in names:
        module, _, last = name.rpartition(".")
        there = {"megalr": megalr, "megalr.optim": optim}.get(module, transformers)
        first = getattr(there, last).__doc__.split()[:3]
        shown = re.sub(r"<[^>]*>", "", parts[name])
        assert all(word.strip("`") in shown for word in first), name
    assert not re.search(r":(func|class|meth):", text)


def test_links_lead_to_pages_and_other_files_become_text() -> None:
    class Page:
        class file:
            src_uri = "dev/contributing.md"

    text = (
        "[a](docs/config.md#x) [b](README.md) [`tools/x.py`](tools/x.py) [c](tools/x.py)\n"
        "```\n[d](docs/config.md)\n```\n[e](https://x.org/a.md) [f](#here)\n"
    )
    assert docs_site.on_page_markdown(text, Page(), None, None) == (  # type: ignore[arg-type]
        "[a](../config.md#x) [b](../index.md) `tools/x.py` c\n"
        "```\n[d](docs/config.md)\n```\n[e](https://x.org/a.md) [f](#here)\n"
    )

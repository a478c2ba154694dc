"""Hooks of mkdocs.yml: pages that stand outside of docs/, links between them, the API.

``mkdocs build`` (``make docs``) calls the functions below. Pages stay as they are for readers of
the repository: README.md becomes the first page, and links to source files, which the site does
not have, become their names.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):(?=<code>)")
PUBLIC = {
    "megalr": "megalr/__init__.py",
    "megalr.optim": "megalr/optim/__init__.py",
    "megalr.transformers": "megalr/transformers.py",
}
"""Modules whose ``__all__`` is public (docs/library.md), and their files."""


def site_paths() -> dict[str, str]:
    """Path in the repository of every page, picture and example, and its path in the site."""
    paths = {"README.md": "index.md", "CONTRIBUTING.md": "dev/contributing.md"}
    for pattern in ("docs/**/*.*", "benchmarks/**/*.md", "benchmarks/**/*.svg", "examples/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            paths[name] = name.removeprefix("docs/") + (".md" if path.suffix == ".py" else "")
    return paths


def on_config(config: MkDocsConfig) -> None:
    """A folder in ``nav`` stands for its pages."""
    pages = [place for place in site_paths().values() if place.endswith(".md")]
    config.nav = _unfolded(config.nav, pages)


def _unfolded(entry: Any, pages: list[str]) -> Any:
    if isinstance(entry, list):
        return [_unfolded(inner, pages) for inner in entry]
    if isinstance(entry, dict):
        return {title: _unfolded(inner, pages) for title, inner in entry.items()}
    if entry.endswith("/"):
        return [page for page in pages if page.startswith(entry)]
    return entry


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add everything that is not in docs/ already."""
    from mkdocs.structure.files import File

    for name, place in site_paths().items():
        if name.startswith("docs/"):
            continue
        if name.endswith(".py"):
            text = (ROOT / name).read_text(encoding="utf-8")
            page = f"# {Path(name).name}\n\n```python\n{text}```\n"
            files.append(File.generated(config, place, content=page))
        else:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, "api.md", content=api_page()))
    return files


def api_page() -> str:
    """A heading for each public module and a directive for each of its names."""
    lines = [
        "# API",
        "",
        "All public names; what they are for is in [megalr as a library](library.md).",
    ]
    for module, file in PUBLIC.items():
        names = [name for name in public_names(ROOT / file) if f"{module}.{name}" not in PUBLIC]
        lines += ["", f"## {module}", ""]
        lines += [f"::: {module}.{name}\n" for name in names if not name.startswith("__")]
    return "\n".join(lines)


def public_names(path: Path) -> list[str]:
    """``__all__`` of a file, read without importing it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise ValueError(f"{path} has no __all__")


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files, **_: Any
) -> str:
    """Let links point to the site's pages; those to other files of the repository become text."""
    paths = site_paths()
    sources = {place: name for name, place in paths.items()}
    source = sources.get(page.file.src_uri)
    if source == "README.md":
        page.meta["hide"] = ["navigation"]  # the bar above has it all
    if source is None or source.endswith(".py"):
        return markdown
    here = posixpath.dirname(page.file.src_uri)

    def target(link: re.Match[str]) -> str:
        mark, text, name, anchor = link.groups()
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), name))
        if there in paths:
            return f"{mark}[{text}]({posixpath.relpath(paths[there], here or '.')}{anchor or ''})"
        return text if "`" in text else f"`{text}`" if text == name else text

    return outside_fences(markdown, lambda text: LINK.sub(target, text))


def outside_fences(markdown: str, change: Any) -> str:
    """``change`` applied to the text between code blocks."""
    done, end = [], 0
    for block in FENCE.finditer(markdown):
        done += [change(markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*done, change(markdown[end:])])


def on_page_content(html: str, **_: Any) -> str:
    """Names of docstrings without Sphinx' roles, which Markdown does not know."""
    return ROLE.sub("", html)

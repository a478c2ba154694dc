"""docs/config.md lists today's keys."""

from __future__ import annotations

from pathlib import Path

from config_tables import key_pages, renewed

from megalr.config.problems import known_keys
from megalr.config.schema import RunConfig

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def test_page_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert renewed(page) == page, "run: python tools/config_tables.py docs/config.md"


def test_every_key_has_a_row_with_a_meaning() -> None:
    rows = {}
    for line in key_pages().splitlines():
        cells = [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
        if cells[0].startswith("`"):
            rows[cells[0].strip("`")] = cells
    for key in known_keys(RunConfig):
        assert len(rows[key]) == 5, rows[key]
        assert rows[key][3] or key.endswith(".name"), key

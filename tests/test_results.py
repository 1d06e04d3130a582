"""Promise: the page of results is what the JSON files beside it say, and nothing else goes into it."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
SCRIPTS = [ROOT / folder for folder in ("bench", "examples", "research", "tools")]


@pytest.fixture
def results_page(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    before, path = set(sys.modules), list(sys.path)
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import results_page

    yield results_page
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent in SCRIPTS:
            del sys.modules[name]


def test_the_page_is_made_of_the_json_alone(results_page: ModuleType, tmp_path: Path) -> None:
    for path in RESULTS.glob("*.json*"):
        shutil.copy(path, tmp_path)
    assert results_page.main(["--folder", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text == (RESULTS / "README.md").read_text(), "make results"
    for name in re.findall(r"\]\(([^)]+)\)", text):
        assert (tmp_path / name).exists(), name
        assert (RESULTS / name).exists(), name


def test_the_tables_of_the_pages_are_those_of_the_json(results_page: ModuleType) -> None:
    found = []
    for name in results_page.PAGES:
        page = (ROOT / name).read_text()
        found += re.findall(r"<!-- results: (\w+) -->", page)
        assert results_page.with_tables(page, RESULTS) == page, "make results"
    assert sorted(found) == sorted(results_page.TABLES)


def test_what_is_not_measured_is_said_to_be_missing(results_page: ModuleType, tmp_path: Path) -> None:
    text = results_page.page(tmp_path)
    assert text.count("Not measured yet.") == len(results_page.SECTIONS)
    for section in results_page.SECTIONS:
        assert f"## {section.title}\n\n`{section.command}`" in text

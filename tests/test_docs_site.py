"""The built pages fetch nothing from elsewhere when they are viewed, and the examples are on them."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
from pathlib import Path
from types import ModuleType

import pytest
from sources import ROOT


@pytest.fixture
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_site", ROOT / "docs" / "check_site.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://elsewhere.example/x.js"></script>',
        '<link rel="stylesheet" href="//elsewhere.example/x.css">',
        '<img src="http://elsewhere.example/x.png">',
        "<style>@import 'https://elsewhere.example/x.css';</style>",
        '<p style="background: url(https://elsewhere.example/x.png)">',
        '<pre class="mermaid">graph</pre>',
    ],
)
def test_what_a_page_fetches_is_found(check: ModuleType, page: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page)
    (found,) = check.fetches(tmp_path)
    assert "page.html" in found and ("elsewhere.example" in found or "mermaid" in found)


def test_a_style_sheet_is_read_too(check: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "fonts.css").write_text("@font-face { src: url(https://elsewhere.example/font.woff2) }")
    assert len(check.fetches(tmp_path)) == 1


def test_links_and_what_lies_beside_are_no_fetch(check: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        '<a href="https://elsewhere.example">there</a> <img src="x.png"> <script src="../x.js"></script>'
        '<link rel="canonical" href="https://elsewhere.example/page.html">'
    )
    assert check.fetches(tmp_path) == []


def test_examples_are_taken_in_by_lines_that_a_formatter_leaves() -> None:
    """In one line, --8<-- "path" is an expression of Python: formatted as one, it takes nothing in."""
    block = re.compile(r'^```\w+ title="(examples/[^"]+)"\n(.*?)^```', re.MULTILINE | re.DOTALL)
    shown = [found for page in (ROOT / "docs").rglob("*.md") for found in block.findall(page.read_text())]
    examples = {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.*")} - {"examples/demo_ct.py"}
    assert {path for path, _ in shown} == examples
    assert all(content == f"--8<--\n{path}\n--8<--\n" for path, content in shown)


def test_docstrings_have_no_tags_outside_code() -> None:
    """The pages of the API are Markdown, which takes "<name>" for HTML and shows nothing of it."""
    package = ROOT / "medkd_fast"
    for path in itertools.chain(*(package.glob(f"{place}*.py") for place in ("", "integrations/", "losses/", "ops/"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = re.sub(r"`[^`]*`", "", ast.get_docstring(node) or "")
                assert not re.search(r"<\w+>", text), f"{path.name}: {getattr(node, 'name', 'module')}"

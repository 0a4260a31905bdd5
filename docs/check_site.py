"""Fails where a built page would fetch something from another place when it is viewed. `make docs` runs it.

Links that a reader may follow are no fetch. In the theme's script the address of a diagram library may stand: it is loaded only
for pages with diagrams of that kind, of which there must be none.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

FETCHING = {
    "link": "href",
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
}
ELSEWHERE = re.compile(r"\s*(https?:)?//", re.IGNORECASE)
IN_STYLES = re.compile(r"""(?:url\(\s*|@import\s+)["']?(?:https?:)?//[^)"'\s]+""", re.IGNORECASE)


class Page(HTMLParser):
    """Collects what a page fetches from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        address = values.get(FETCHING.get(tag, ""), None) or ""
        if ELSEWHERE.match(address) and values.get("rel") != "canonical":
            self.found.append(f"<{tag}> {address}")
        if "mermaid" in (values.get("class") or "").split():
            self.found.append("a mermaid diagram, whose library is not here")


def fetches(site: Path) -> list[str]:
    found = []
    for path in sorted(site.rglob("*")):
        if path.suffix == ".html":
            page = Page()
            page.feed(path.read_text())
            found += [f"{path}: {what}" for what in page.found]
            found += [f"{path}: {what}" for what in IN_STYLES.findall(path.read_text())]
        elif path.suffix in (".css", ".svg"):
            found += [f"{path}: {what}" for what in IN_STYLES.findall(path.read_text())]
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    pages = len(list(folder.rglob("*.html")))
    found = fetches(folder)
    print("\n".join(found) or f"{pages} pages, all from one place")
    sys.exit(bool(found) or pages == 0)

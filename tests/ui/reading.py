"""What stands on a page, as a test looks for it."""

from html.parser import HTMLParser


class Text(HTMLParser):
    """The visible text, the addresses that links lead to, and the elements by name."""

    def __init__(self, page: str):
        super().__init__()
        self.parts: list[str] = []
        self.links: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._hidden = 0
        self.feed(page)

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self.elements.append((tag, known))
        self._hidden += tag in ("script", "style")
        if tag == "a":
            self.links.append(known.get("href", ""))

    def handle_endtag(self, tag):
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self._hidden:
            self.parts.append(data)


def rows(page: str) -> list[str]:
    """The heading of each row of the first table with class `list`, by its text."""
    found = []
    for row in page.partition('<table class="list')[2].partition("</table>")[0].split("<tr>")[2:]:
        found.append(Text(row.partition("</th>")[0]).said)
    return found

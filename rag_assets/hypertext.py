"""HTML as text: what a reader sees, without scripts, without attributes, and without text made invisible."""

import re
from collections import Counter
from dataclasses import dataclass
from html.parser import HTMLParser

_UNSEEN = frozenset({"script", "style", "template", "noscript", "svg", "iframe", "object"})
_VOID = frozenset({"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr"})
_SIBLINGS = {"li": "ul ol", "dt": "dl", "dd": "dl", "tr": "table", "td": "tr table", "th": "tr table", "option": "select"}
_BLOCK = re.compile(
    r"address|article|aside|blockquote|body|d[dlt]|div|fieldset|figcaption|figure|footer|form|h[1-6]|header|hr|li|main|nav|note|ol|p|pre"
    r"|section|table|tbody|tfoot|thead|title|tr|ul"
)
_HEADING = re.compile(r"h[1-6]")
_WHITE = r"(?:white|#fff(?:fff)?|rgba?\(\s*255\s*,\s*255\s*,\s*255\b[^)]*\))"
HIDING_STYLE = re.compile(
    r"(?:^|;|\s)(?:display\s*:\s*none|visibility\s*:\s*hidden|opacity\s*:\s*0(?:\.0*)?\s*(?:;|!|$)"
    r"|(?:font-size|max-height|max-width|height|width)\s*:\s*0(?:\.0*)?(?:px|em|rem|pt|%)?\s*(?:;|!|$))",
    re.IGNORECASE,
)
"""An inline style under which nothing is seen."""
_WHITE_TEXT = re.compile(rf"(?:^|;)\s*color\s*:\s*{_WHITE}\s*(?:;|!|$)", re.IGNORECASE)
_OTHER_GROUND = re.compile(rf"background(?:-color)?\s*:\s*(?!\s|{_WHITE})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Page:
    """`title` is the first heading, else <title>, else empty; `hidden` is true when text that nobody would see was left out of `text`."""

    title: str
    text: str
    hidden: bool


def read_page(page: str, *, marked: bool = True) -> Page:
    """Title and visible text of an HTML page or fragment. `marked`: as Markdown, with # before headings and fences around <pre>.

    Hidden means the attribute `hidden`, aria-hidden="true", or an inline style that shows nothing: display:none, visibility:hidden, opacity
    or a size of 0, white text without another background. Style sheets are not applied.
    """
    reader = _Reader(marked=marked)
    reader.feed(page)
    reader.close()
    return Page(" ".join((reader.heading or reader.page_title).split()), reader.text(), reader.left_out)


class _Reader(HTMLParser):
    """Collects visible text: a blank line between blocks, "- " before list items, <pre> as it stands."""

    def __init__(self, *, marked: bool) -> None:
        super().__init__(convert_charrefs=True)
        self.marked = marked
        self.blocks: list[str] = [""]
        self.page_title = ""
        self.heading = ""
        self.left_out = False
        self._open: list[tuple[str, bool, bool]] = []
        self._count: Counter[str] = Counter()
        self._within = ""

    @property
    def _unseen(self) -> bool:
        return bool(self._open) and self._open[-1][1]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._close_implied(tag)
        if tag not in _VOID:
            made_hidden = _hides(dict(attrs)) or (bool(self._open) and self._open[-1][2])
            self._open.append((tag, self._unseen or made_hidden or tag in _UNSEEN, made_hidden))
            self._count[tag] += 1
        if self._unseen:
            return
        if _BLOCK.fullmatch(tag):
            # <li><p>text</p></li> stays one item: the paragraph continues the open "- ".
            if self.blocks[-1].strip() != "-":
                self.blocks.append("- " if tag == "li" else "")
            if self.marked and _HEADING.fullmatch(tag):
                self.blocks[-1] += "#" * int(tag[1]) + " "
            elif self.marked and tag == "pre":
                self.blocks[-1] += "```\n"
            if tag == "title" or (_HEADING.fullmatch(tag) and not self.heading.strip()):
                self._within = tag
        elif tag == "br":
            self.blocks[-1] += "\n" if self._count["pre"] else " "
        elif tag in ("td", "th"):
            self.blocks[-1] += " "

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def _close_implied(self, tag: str) -> None:
        """What a start tag closes by itself: a paragraph before a block, a list item or cell before the next one."""
        if self._open and self._open[-1][0] == "p" and _BLOCK.fullmatch(tag):
            self.handle_endtag("p")
        if tag in _SIBLINGS and self._count[tag]:
            for name, _, _ in reversed(self._open):
                if name == tag:
                    self.handle_endtag(tag)
                if name == tag or name in _SIBLINGS[tag].split():
                    break

    def handle_endtag(self, tag: str) -> None:
        unseen = self._unseen
        if self._count[tag]:
            while True:
                name, _, _ = self._open.pop()
                self._count[name] -= 1
                if name == tag:
                    break
        if unseen:
            return
        if tag == self._within:
            self._within = ""
        if _BLOCK.fullmatch(tag):
            if self.marked and tag == "pre":
                self.blocks[-1] += "\n```"
            self.blocks.append("")

    def handle_data(self, data: str) -> None:
        if self._unseen:
            self.left_out = self.left_out or (self._open[-1][2] and any(character.isalnum() for character in data))
            return
        if self._within == "title":
            self.page_title += data
            return
        if self._within:
            self.heading += data
        shown = data if self._count["pre"] else re.sub(r"\s+", " ", data)
        # a paragraph that begins with # is no heading
        self.blocks[-1] += "\\" + shown.lstrip() if self.marked and not self.blocks[-1] and re.match(r"\s*#{1,6}\s", shown) else shown

    def text(self) -> str:
        blocks = [block.strip("\n").rstrip() if "\n" in block else re.sub(r"(?<=\S)  +", " ", block).strip() for block in self.blocks]
        joined: list[str] = []
        for block in (block for block in blocks if block.strip("#- ") or (block and not self.marked and block != "-")):
            joined += ["\n" if block.startswith("- ") else "\n\n", block]
        return "".join(joined).strip()


def _hides(attributes: dict[str, str | None]) -> bool:
    style = attributes.get("style") or ""
    return (
        "hidden" in attributes
        or (attributes.get("aria-hidden") or "").lower() == "true"
        or bool(HIDING_STYLE.search(style))
        or bool(_WHITE_TEXT.search(style) and not _OTHER_GROUND.search(style))
    )

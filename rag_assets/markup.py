"""How documents are written: titles and headings of Markdown and reStructuredText, and HTML as text."""

import itertools
import re
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from markdown_it.token import Token

Markup = Literal["markdown", "rst", ""]
_LONGEST_HEADING = 2000  # characters

_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^(?:---|\.\.\.)[ \t]*$", re.DOTALL | re.MULTILINE)
_RST_MARKS = "=-`:.'\"~^_*+#<>"


def headings(text: str, markup: str) -> list[tuple[int, int, str]]:
    """(character offset, level 1-6, title) of each heading of a text, in order; none unless `markup` is "markdown" or "rst"."""
    if markup == "markdown":
        return markdown_headings(text)
    return rst_headings(text) if markup == "rst" else []


def markdown_headings(text: str) -> list[tuple[int, int, str]]:
    """(character offset, level 1-6, title) of each heading of a Markdown text, in order. Code blocks and front matter hold none."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark")
    parser.core.ruler.disable("inline")  # the words of paragraphs are not asked for, and cost most of the time
    masked = _FRONT_MATTER.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    starts = [0, *(match.end() for match in re.finditer(r"\r\n|\n|\r", text))]
    references: dict[str, Any] = {}
    found = []
    for token, inline in itertools.pairwise(parser.parse(masked, references)):
        if token.type == "heading_open" and token.map:
            words = "".join(child.content or " " for child in _words(inline.content[:_LONGEST_HEADING], references))
            found.append((starts[token.map[0]], int(token.tag[1]), " ".join(words.split())))
    return found


def _words(line: str, references: dict[str, Any]) -> "list[Token]":
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark").parseInline(line, references)[0].children or []


def rst_headings(text: str) -> list[tuple[int, int, str]]:
    """(character offset, level 1-6, title) of each underlined title, in order. Levels go by first use of an underline, as in docutils."""
    found: list[tuple[int, int, str]] = []
    styles: list[str] = []
    start, title, title_start, over, over_start = 0, "", 0, "", 0
    for line in text.splitlines(keepends=True):
        words = line.strip()
        if _is_rule(words) and title and not _is_rule(title) and len(words) >= len(title):
            overlined = over[:1] == words[0]
            style = words[0] * (1 + overlined)
            styles += [] if style in styles else [style]
            found.append((over_start if overlined else title_start, min(styles.index(style) + 1, 6), title))
        over, over_start = (title, title_start) if _is_rule(title) else ("", 0)
        title, title_start = words, start
        start += len(line)
    return found


def _is_rule(words: str) -> bool:
    return len(words) > 1 and words[0] in _RST_MARKS and words == words[0] * len(words)


def title_of(text: str, markup: str) -> str:
    """The title a text gives itself: `title:` of Markdown front matter, else its first heading; "" when it has none."""
    front = _FRONT_MATTER.match(text) if markup == "markdown" else None
    named = re.search(r"^title:[ \t]*(.+?)[ \t]*$", front[1], re.MULTILINE) if front else None
    return named[1].strip("'\"") if named else next((title for _, _, title in headings(text, markup) if title), "")

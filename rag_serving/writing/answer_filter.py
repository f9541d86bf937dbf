"""Guard on what a language model writes, while it writes.

It lets through no address that the passages do not vouch for, no image, no HTML, no control characters, and never the canary of the prompt.
What comes out piece by piece is what the whole text would have given.

An address stays when its host is one of `answer_hosts`, or when it is the address of a passage's document, or stands in a passage with the
same host as that document; so no address can carry what was asked to a host that a document chose (EchoLeak, CVE-2025-32711).
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from rag_serving.guards import HIDDEN, JOINER_LAST, Event
from rag_serving.retrieval import Hit
from rag_serving.settings import GuardAction, Guards
from rag_serving.writing.canary_watch import CanaryWatch

IMAGE_REMOVED = "(image removed)"
LINK_REMOVED = "(link removed)"
MOST_HELD = 4096  # characters that wait for the end of what they begin

_END = "[^\\s<>\"'`)\\]}|]"  # what an address goes on with
_COLON = r"(?:\\?:|&(?:colon|#0{0,5}58|#x0{0,4}3a);)"  # as links in Markdown may have it
_LABEL, _TARGET = r"\[[^\[\]]{0,500}\]", r"\([^)\[]{0,2000}\)"  # no nesting, so that no text takes long to read
_HTML = (
    "a|abbr|applet|area|audio|b|base|bdo|big|blink|body|br|button|canvas|center|code|col|dd|details|dialog|div|dl|dt|em|embed|fieldset|font|"
    "footer|form|frame|frameset|h[1-6]|head|header|hr|html|i|iframe|img|image|input|isindex|kbd|keygen|label|legend|li|link|main|map|marquee|"
    "math|menu|meta|nav|noscript|object|ol|option|p|param|picture|plaintext|pre|q|s|script|section|select|slot|small|source|span|strike|"
    "strong|style|sub|summary|sup|svg|table|tbody|td|template|textarea|tfoot|th|thead|title|tr|track|tt|u|ul|video|wbr|xmp"
)
_MARKED = re.compile(
    rf"(?P<image>!{_LABEL}(?:{_TARGET}|{_LABEL})?|!(?=\[))"
    rf"|(?P<link>{_LABEL}{_TARGET})"
    rf"|(?P<address>(?:https?|ftps?|wss?|file){_COLON}{_END}+|\b(?:javascript|vbscript|blob|mailto){_COLON}{_END}+|\bdata:[\w.+-]+/[\w.+-]+[;,]{_END}*"
    rf"|(?<![\w:\\/])[\\/]{{2}}[\w-]+\.{_END}+|\bwww\.{_END}+"
    rf"|(?<![\w@/.-])(?:[a-z0-9-]{{1,63}}\.){{1,10}}[a-z]{{2,24}}(?::\d{{1,5}})?(?:/[^\s<>\"'`)\]}}|?]*)?\?[^\s<>\"'`)\]}}|=]*={_END}*)"
    rf"|(?P<markup><(?=(?P<ahead>[!?]|/?(?:{_HTML})\b|/?[a-z](?:[^\s<>/:]|:(?!//))*[\s/])))",
    re.IGNORECASE,
)
_BEGUN = re.compile(
    rf"!?\[[^\[\]]{{0,500}}\Z|!?{_LABEL}(?:\([^)\[]{{0,2000}})?\Z|!{_LABEL}\[[^\[\]]{{0,500}}\Z|</?[a-z](?:[^\s<>/:]|:(?!//))*\Z",
    re.IGNORECASE,
)
_WORD = re.compile(r"[!-~]\S*")
_UNSEEN = re.compile(
    r"(?P<control>\x1b(?:\[[0-?]{0,64}[ -/]{0,8}[@-~]|\][^\x07\x1b]{0,512}(?:\x07|\x1b\\)|[@-Z\\^_])?"
    rf"|\x9b[0-?]{{0,64}}[ -/]{{0,8}}[@-~]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff])|{HIDDEN}"
)
_UNSEEN_BEGUN = re.compile(
    rf"\x1b(?:\[[0-?]{{0,64}}[ -/]{{0,8}}|\][^\x07\x1b]{{0,512}}\x1b?)?\Z|\x9b[0-?]{{0,64}}[ -/]{{0,8}}\Z|{JOINER_LAST}"
)
_CITED = re.compile(r"!(?:\[\d+\])+")
_MAY_PRECEDE = re.compile(r"(?:^|[\s(\[\"'*_])\Z")  # what the text of a removed link may stand right after
_DESTINATION = re.compile(r"\s*<?([^\s<>]*)>?(?:\s+(?:\"[^\"]*\"|'[^']*'))?\s*")


@dataclass(frozen=True, slots=True)
class Filtered:
    """An answer as it may be shown. `blocked` when it may not be: then `text` is what had come before."""

    text: str
    events: tuple[Event, ...]
    blocked: bool


def filter_answer(text: str, rules: Guards, *, hits: Iterable[Hit], canary: str = "") -> Filtered:
    """A whole answer through an `AnswerFilter`."""
    through = AnswerFilter(rules, hits=hits, canary=canary)
    shown = through.feed(text) + through.close()
    return Filtered(shown, through.events, through.blocked)


class AnswerFilter:
    """Takes an answer in pieces and gives what may be shown of it; a word waits until it is whole, and a link until it is closed.

    `blocked`: the answer must be dropped, since it holds the canary or what a rule blocks; nothing more comes out. `full`: it is as long as
    answers may be; the rest is not wanted.
    """

    def __init__(self, rules: Guards, *, hits: Iterable[Hit], canary: str = "") -> None:
        self._rules = rules
        self._vouched = _Vouched(rules.answer_hosts, [(hit.uri, hit.text) for hit in hits])
        self._written, self._shown = CanaryWatch(canary), CanaryWatch(canary)
        self._raw, self._text = _Waiting(), _Waiting()
        self._length = 0
        self._counts = Counter[tuple[str, GuardAction]]()
        self.blocked = False
        self.full = False

    @property
    def events(self) -> tuple[Event, ...]:
        return tuple(Event("output", rule, action, count) for (rule, action), count in sorted(self._counts.items()))

    def feed(self, piece: str) -> str:
        """What may be shown now that `piece` has come."""
        return self._take(piece, last=False)

    def close(self) -> str:
        """The rest, once nothing more comes."""
        return self._take("", last=True)

    def _take(self, piece: str, *, last: bool) -> str:
        if self.blocked or self.full:
            return ""
        self._written.feed(piece)
        shown = self._shown.feed(self._linked(self._plain(piece, last=last), last=last))
        if last:
            shown += self._shown.close()
        if self._written.seen or self._shown.seen:
            self._note("canary", "block")
        if self.blocked:
            return ""
        room = self._rules.answer_length - self._length
        if len(shown) > room:
            self._note("length", "strip")
            self.full = True
        self._length += len(shown)
        return shown[: max(room, 0)]

    def _plain(self, piece: str, *, last: bool) -> str:
        """Without carriage returns, control, invisible and bidirectional characters."""
        raw, at = self._raw.add(piece.replace("\r", ""))
        begun = None if last or len(raw) - at > MOST_HELD else _UNSEEN_BEGUN.search(raw, at)
        end = begun.start() if begun else len(raw)
        self._raw.done(end)
        action = self._rules.answer_characters
        if action == "allow":
            return raw[at:end]
        out = []
        for found in _UNSEEN.finditer(raw, at, end):
            self._note(str(found.lastgroup), action)
            if action == "strip":
                out.append(raw[at : found.start()])
                at = found.end()
        return "".join([*out, raw[at:end]])

    def _linked(self, piece: str, *, last: bool) -> str:
        """With images, addresses and HTML dealt with."""
        text, at = self._text.add(piece)
        last = last or len(text) - at > MOST_HELD
        if not last and _WORD.fullmatch(text, at):
            return ""
        out = []
        while at < len(text):
            found = _MARKED.search(text, at)
            begun = None if last else _BEGUN.search(text, at)
            if found and (last or max(found.end(), found.end("ahead")) < len(text)) and (begun is None or found.start() < begun.start()):
                shown, end = self._judged(found)
                out.append(text[at : found.start()])
                if found["link"] and "](" not in shown and "] (" not in shown:  # its label is read again, with what now follows
                    before = text[: found.start()]
                    out.append("" if _MAY_PRECEDE.search(before) else " ")
                    text, at = self._text.become(before, shown + text[end:])
                else:
                    out.append(shown)
                    at = end
                continue
            end = len(text) if last else min([_last_word(text, at), *(each.start() for each in (begun, found) if each)])
            out.append(text[at:end])
            at = end
            break
        self._text.done(at)
        return "".join(out)

    def _judged(self, found: re.Match[str]) -> tuple[str, int]:
        """What stands for a match, and where reading goes on."""
        whole = found[0]
        if found["image"]:
            if _CITED.fullmatch(whole):  # an exclamation before a citation
                return f"! {whole[1:]}", found.end()
            return self._ruled("image", self._rules.answer_images, whole, IMAGE_REMOVED if len(whole) > 1 else ""), found.end()
        if found["markup"]:
            return self._ruled("markup", self._rules.answer_markup, whole, "< "), found.end()
        if found["link"]:
            return self._link(whole), found.end()
        address = whole.rstrip(".,;:!?*_~")
        return self._address(address), found.start() + len(address)

    def _link(self, whole: str) -> str:
        label, _, target = whole[1:-1].partition("](")
        destination = _DESTINATION.fullmatch(target)
        if destination is None:  # words in brackets after a citation, say
            return f"[{self._inner(label)}] ({self._inner(target)})"
        if self._vouched.knows(destination[1]):
            return f"[{self._inner(label)}]({destination[1]})"
        if self._rules.answer_links != "strip":
            return self._ruled("link", self._rules.answer_links, f"[{self._inner(label)}]({target})", "")
        return self._ruled("link", "strip", whole, f"[{label}]" if label.isdecimal() else label)

    def _inner(self, text: str) -> str:
        """The same rules on a text within a link; it is shorter, so this ends."""
        out, at = [], 0
        while found := _MARKED.search(text, at):
            shown, end = self._judged(found)
            out += [text[at : found.start()], shown]
            at = end
        return "".join([*out, text[at:]])

    def _address(self, address: str) -> str:
        return address if self._vouched.knows(address) else self._ruled("link", self._rules.answer_links, address, LINK_REMOVED)

    def _ruled(self, rule: str, action: GuardAction, given: str, instead: str) -> str:
        if action == "allow":
            return given
        self._note(rule, action)
        return instead if action == "strip" else given

    def _note(self, rule: str, action: GuardAction, count: int = 1) -> None:
        self._counts[rule, action] += count
        self.blocked = self.blocked or action == "block"


def _last_word(text: str, at: int) -> int:
    """Where the word begins that the text ends in, past its letters of other scripts, with which no address begins; its end after a space."""
    if text[-1:].isspace():
        return len(text)
    word = _WORD.search(text, len(text) - len(text[at:].rsplit(maxsplit=1)[-1]))
    return word.start() if word else len(text)


class _Waiting:
    """Text that is not through yet, with the one character before it, on which its reading may depend."""

    def __init__(self) -> None:
        self._text, self._at = "", 0

    def add(self, piece: str) -> tuple[str, int]:
        """The text with its context, and where what waits begins."""
        self._text += piece
        return self._text, self._at

    def become(self, before: str, after: str) -> tuple[str, int]:
        """The same after what waits has changed: `before` is dealt with, `after` waits."""
        self._text, self._at = before + after, len(before)
        return self._text, self._at

    def done(self, at: int) -> None:
        """Everything before `at` is through."""
        keep = max(at - 1, 0)
        self._text, self._at = self._text[keep:], at - keep


class _Vouched:
    """Which addresses an answer may hold."""

    def __init__(self, hosts: Sequence[str], sources: Sequence[tuple[str, str]]) -> None:
        self._hosts = frozenset(host.casefold() for host in hosts)
        self._sources = sources

    def knows(self, address: str) -> bool:
        host = _host(address)
        if not host:
            return False
        return host in self._hosts or any(
            address == uri or (host == _host(uri) and _stands_in(address, text)) for uri, text in self._sources
        )


def _host(address: str) -> str:
    """Host and port of a plain http address, else nothing."""
    try:
        parts = urlsplit(address)
        if parts.scheme not in {"http", "https"} or "@" in parts.netloc or "\\" in address:
            return ""
        return parts.netloc.casefold()
    except ValueError:
        return ""


def _stands_in(address: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(address)}(?!{_END}*[\w/=&%])", text) is not None

"""Which files are documents, by suffix, and what each holds."""

from collections.abc import Mapping
from typing import Literal

Format = Literal["markdown", "text", "rst", "html", "table", "json", "code", "office", "pdf"]

_SUFFIXES: Mapping[Format, str] = {
    "markdown": ".md .markdown",
    "text": ".txt .text .log",
    "rst": ".rst",
    "html": ".html .htm .xhtml",
    "table": ".csv .tsv",
    "json": ".json",
    "code": (
        ".py .js .mjs .jsx .ts .tsx .java .kt .scala .go .rs .c .h .cc .cpp .hpp .cs .rb .php .swift .r .jl .lua .pl .sh .bash .ps1 .sql"
        " .proto .tf .yaml .yml .toml .ini .cfg"
    ),
    "office": ".docx .pptx .xlsx",
    "pdf": ".pdf",
}
FORMATS: Mapping[str, Format] = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
"""Suffix, in lower case -> what such a file holds."""

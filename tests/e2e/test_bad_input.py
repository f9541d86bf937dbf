"""What a user gets wrong: one line that says what to do, an exit code, and nothing half-written."""

import json
import socket
from pathlib import Path

import pytest


def refused(done, *, says: str) -> None:
    assert done.returncode not in {0, 2}, done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ragline: ")]
    assert says in line
    assert "Traceback" not in done.stderr


def beir(folder: Path, *, documents: int, judged: str) -> Path:
    (folder / "qrels").mkdir(parents=True)
    rows = [
        json.dumps({"_id": f"d{i}", "title": f"Title {i}", "text": f"This is the text of document number {i}."}) for i in range(documents)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(rows), encoding="utf-8")
    queries = [json.dumps({"_id": query_id, "text": f"which document {query_id}"}) for query_id in ("q1", "q2")]
    (folder / "queries.jsonl").write_text("\n".join(queries), encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\nq1\t{judged}\t1\nq2\td0\t1\n", encoding="utf-8")
    return folder


def test_a_missing_folder_is_named(ragline, tmp_path):
    """A corpus folder that does not exist is named, and no store is begun."""
    refused(ragline(tmp_path / "home", "run", "--source", f"folder:{tmp_path / 'nowhere'}"), says="nowhere")
    assert not (tmp_path / "home" / "store" / "snapshots").exists()


def test_an_empty_corpus_is_refused(ragline, tmp_path):
    """A folder without documents is refused before anything is embedded."""
    (tmp_path / "empty").mkdir()
    refused(ragline(tmp_path / "home", "run", "--source", f"folder:{tmp_path / 'empty'}"), says="empty")
    assert not (tmp_path / "home" / "store" / "embeddings").exists()


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_an_unreadable_file_is_named(ragline, tmp_path):
    """A file that is not text does not end the run: it is counted at the end of it, and listed by name and reason."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "good.md").write_text("# Good\n\nA readable document.", encoding="utf-8")
    (tmp_path / "docs" / "bad.md").write_bytes(b"\x7fELF\0\1\2 broken \x80")
    done = ragline(tmp_path / "home", "run", "--models", "wordllama-256", "--source", f"folder:{tmp_path / 'docs'}")
    assert done.returncode == 0, done.stderr
    assert "1 items quarantined" in done.stdout
    listed = json.loads(ragline(tmp_path / "home", "quarantine", "--json").stdout)
    assert [(row["item"], row["reason"]) for row in listed["items"]] == [("bad.md", "binary")]


def test_judgments_of_unknown_documents_are_refused(ragline, tmp_path):
    """An eval set that names a document the corpus lacks is an error that names it, and compares nothing."""
    folder = beir(tmp_path / "set", documents=3, judged="d99")
    refused(ragline(tmp_path / "home", "compare", str(folder)), says="d99")


def test_an_unknown_key_names_the_nearest(ragline, tmp_path):
    """A typo in ragline.toml is refused with the nearest valid key, with the exit code for configuration."""
    config = tmp_path / "ragline.toml"
    config.write_text("[gate]\nmrr_flor = 0.5\n", encoding="utf-8")
    done = ragline(tmp_path / "home", "status", RAGLINE_CONFIG=str(config))
    refused(done, says="mrr_floor")
    assert done.returncode == 78


def test_a_taken_port_is_named(ragline, tmp_path):
    """`ragline up`, `serve` and `embedder` name the port that is taken and the variable that changes it, and start nothing."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        free = {f"RAGLINE_{name}_PORT": "0" for name in ("DAGSTER", "MLFLOW", "EMBEDDER")}
        refused(ragline(tmp_path / "home", "up", RAGLINE_SERVING_PORT=str(port), **free), says="RAGLINE_SERVING_PORT")
        refused(ragline(tmp_path / "home", "serve", RAGLINE_SERVING_PORT=str(port)), says="RAGLINE_SERVING_PORT")
        refused(ragline(tmp_path / "home", "embedder", RAGLINE_EMBEDDER_PORT=str(port)), says="RAGLINE_EMBEDDER_PORT")


@pytest.mark.parametrize(
    ("command", "variable"),
    [
        (["run", "--models", "wordllama-256"], "RAGLINE_HOME"),
        (["track"], "RAGLINE_HOME"),
        (["models", "pull", "wordllama-256"], "RAGLINE_MODELS_DIR"),
        (["keys", "create", "me"], "RAGLINE_STORE"),
    ],
)
def test_a_place_that_cannot_be_written_is_named(ragline, tmp_path, command, variable):
    """A state folder that cannot be made is named in one line, with the variable that sets another; reading commands do not need it."""
    (tmp_path / "file").touch()
    home = tmp_path / "file" / "home"
    refused(ragline(home, *command, RAGLINE_MODELS_DIR=str(home / "models")), says=variable)
    assert ragline(home, "status").returncode == 0


def test_an_unreachable_postgres_is_one_line(ragline, tmp_path):
    """A Postgres that does not answer is named without its password."""
    url = "postgresql://me:secret-word@127.0.0.1:9/dagster"
    done = ragline(tmp_path / "home", "run", "--models", "wordllama-256", RAGLINE_POSTGRES_URL=url)
    refused(done, says="127.0.0.1:9")
    assert "secret-word" not in done.stderr


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        (["search", "anything"], "Make the first release with `ragline run`."),
        (["rollback"], "Look at `ragline releases`."),
        (["promote", "no-such-snapshot-000000000000"], "Run `ragline status` to see the snapshots."),
    ],
)
def test_commands_before_the_first_release_say_so(ragline, tmp_path, command, remedy):
    """Commands that need a release or a snapshot say what to run first."""
    refused(ragline(tmp_path / "home", *command), says=remedy)

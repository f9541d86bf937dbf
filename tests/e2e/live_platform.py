"""A real Dagster webserver and daemon over a folder with ragline.toml, and the few GraphQL requests that the UI's buttons make."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from socket import create_server
from typing import Any

import httpx2

LOCATION = {"repositoryLocationName": "ragline", "repositoryName": "__repository__"}
LAUNCH = """mutation($p: ExecutionParams!) { launchRun(executionParams: $p) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
RUN = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
FAILURES = """query($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {
  ... on ExecutionStepFailureEvent { error { message errorChain { error { message } } } } } } } }"""
SHOWN = """query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode { assetMaterializations(limit: 1) {
  metadataEntries { label ... on TextMetadataEntry { text } ... on MarkdownMetadataEntry { mdStr } ... on IntMetadataEntry { intValue } } } } } }"""


def until(found: Callable[[], Any], *, seconds: float, what: str) -> Any:
    """The first true value of `found`; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s"
        time.sleep(0.5)
    return value


class Dagster:
    """The UI's side of a running platform."""

    def __init__(self, client: httpx2.Client) -> None:
        self._client = client

    def answers(self) -> bool:
        try:
            return self._client.get("/server_info").is_success
        except httpx2.TransportError:
            return False

    def ask(self, query: str, **variables: Any) -> Any:
        reply = self._client.post("/graphql", json={"query": query, "variables": variables}).json()
        assert "errors" not in reply, reply
        (answer,) = reply["data"].values()
        return answer

    def run(self, job: str, *, model: str | None = None, seconds: float = 400) -> str:
        """Launch a job as the UI does and wait for its end; the failed steps' messages, empty when it succeeded."""
        tags = [{"key": "dagster/partition", "value": model}] if model else []
        parameters = {"selector": {**LOCATION, "jobName": job}, "runConfigData": {}, "executionMetadata": {"tags": tags}}
        launched = self.ask(LAUNCH, p=parameters)
        assert launched["__typename"] == "LaunchRunSuccess", launched
        run_id = launched["run"]["runId"]
        ended = {"SUCCESS", "FAILURE", "CANCELED"}
        until(lambda: self.ask(RUN, id=run_id)["status"] in ended, seconds=seconds, what=f"the end of {job}")
        errors = [event["error"] for event in self.ask(FAILURES, id=run_id)["events"] if event.get("error")]
        return " ".join(each["message"] + " ".join(link["error"]["message"] for link in each["errorChain"]) for each in errors)

    def shown(self, asset: str) -> dict[str, Any]:
        """What the asset's page says of its newest materialization."""
        events = self.ask(SHOWN, key={"path": [asset]})["assetMaterializations"]
        entries = events[0]["metadataEntries"] if events else []
        return {
            each["label"]: next(each[name] for name in ("text", "mdStr", "intValue") if name in each) for each in entries if len(each) > 1
        }


@contextmanager
def platform(folder: Path, environ: Mapping[str, str]) -> Iterator[Dagster]:
    """The webserver and the daemon of `folder`, stopped at the end."""
    with closing(create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    programs = Path(sys.executable).parent
    commands = (
        [programs / "dagster-webserver", "--host", "127.0.0.1", "--port", str(port), "--workspace", "workspace.yaml"],
        [programs / "dagster-daemon", "run", "--workspace", "workspace.yaml"],
    )
    with (folder / "platform.log").open("wb") as log:
        processes = [subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log) for command in commands]
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
            dagster = Dagster(client)
            until(dagster.answers, seconds=240, what="dagster-webserver")
            yield dagster
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=60)

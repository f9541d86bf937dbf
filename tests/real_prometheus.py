"""A real Prometheus that scrapes services on this machine, loads the generated rules and evaluates the panels of the generated dashboard."""

import json
import runpy
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import yaml
from mlflow_server import free_port

PROMETHEUS = shutil.which("prometheus") or ""
GENERATE = runpy.run_path(str(Path(__file__).parents[1] / "deploy" / "generate.py"))
_PATIENCE = 60.0


class Watch:
    """A running Prometheus. What it shows is asked of its HTTP API; `panels` are (title, expression) of the generated dashboard."""

    def __init__(self, client: httpx2.Client) -> None:
        self._client = client
        board = json.loads(GENERATE["generated"]()[GENERATE["DASHBOARD"]])
        rows = [panel for panel in board["panels"] if panel["type"] != "row"]
        self.panels = [(panel["title"], target["expr"]) for panel in rows for target in panel["targets"]]

    def series(self, expr: str) -> list[dict[str, Any]]:
        """The series of an expression now, each with `metric` (its labels) and `value`."""
        reply = self._client.get("/api/v1/query", params={"query": expr})
        assert reply.status_code == 200, (expr, reply.text)
        return [{**each, "value": float(each["value"][1])} for each in reply.json()["data"]["result"]]

    def values(self, expr: str) -> list[float]:
        return [each["value"] for each in self.series(expr)]

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._client.get("/api/v1/rules").json()["data"]["groups"] for rule in group["rules"]]

    def firing(self) -> set[str]:
        """The names of the alerts that fire."""
        return {each["metric"]["alertname"] for each in self.series('ALERTS{alertstate="firing"}')}

    def on_panels(self, metric: str) -> dict[str, list[dict[str, Any]]]:
        """What the dashboard shows of a metric: by the title of each panel that asks for it, the series of its expression."""
        return {title: self.series(expr) for title, expr in self.panels if metric in expr}

    def until(self, holds: Any, *, seconds: float = _PATIENCE) -> None:
        """Ask until `holds()`, while a starting Prometheus refuses as well."""
        deadline = time.monotonic() + seconds
        while True:
            with suppress(httpx2.TransportError):
                if holds():
                    return
            assert time.monotonic() < deadline, "it did not come to be"
            time.sleep(0.1)


@contextmanager
def watching(folder: Path, urls: Sequence[str], *, faster: float = 1, interval: str = "500ms") -> Iterator[Watch]:
    """A Prometheus over the services at `urls` with its data in `folder`; ranges and `for` of the rules are `faster` times shorter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rules.yml").write_text(GENERATE["rules"](faster=faster), encoding="utf-8")
    scrape = {"job_name": "ragline", "static_configs": [{"targets": [url.removeprefix("http://") for url in urls]}]}
    timing = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": "200ms"}
    described = {"global": timing, "rule_files": ["rules.yml"], "scrape_configs": [scrape]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(described), encoding="utf-8")
    port = free_port()
    flags = [
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([PROMETHEUS, *flags], stdout=log, stderr=log)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as client:
            watch = Watch(client)
            watch.until(lambda: client.get("/-/ready").status_code == 200)
            watch.until(lambda: min(watch.values("up"), default=0) == 1)
            yield watch
    finally:
        process.terminate()
        process.wait(timeout=20)

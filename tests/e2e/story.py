"""The story of a silently swapped embedding model, acted out: run in a folder with ragline.toml and a corpus, it prints one JSON line a scene.

The definitions, the Dagster instance on Postgres, the jobs and the sensors are the real ones; sensors are ticked, and what they report is
stored, as the daemon does. Only time is compressed.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dagster as dg

from rag_assets.postgres import export, postgres
from rag_assets.workbench import Workbench
from rag_serving.errors import RaglineError
from rag_serving.promotion import promote
from rag_serving.releases import Ledger
from rag_serving.settings import load_settings

CONFIG = Path("ragline.toml")
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


class Stage:
    """One code location on one instance, with the settings that ragline.toml has at each moment."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        from rag_assets.definitions import defs

        self.instance, self.definitions = instance, defs()
        self.cursors: dict[str, str | None] = {}

    @property
    def bench(self) -> Workbench:
        return Workbench(load_settings())

    def run(self, job: str, *, model: str | None = None) -> str:
        """Execute a job; the message of the first failed step, empty when the run succeeded."""
        done = self.definitions.resolve_job_def(job).execute_in_process(
            run_config=QUIET, instance=self.instance, partition_key=model, resources={"bench": self.bench}, raise_on_error=False
        )
        failures = [event.step_failure_data.error for event in done.all_events if event.is_step_failure]
        return " ".join(str((failure.cause or failure).message) for failure in failures if failure).strip()

    def tick(self) -> dict[str, str]:
        """Tick every sensor once; what each says."""
        said = {}
        for name in ("drift_holds", "missed_week", "releases"):
            sensor = self.definitions.get_repository_def().get_sensor_def(name)
            with dg.build_sensor_context(
                instance=self.instance, cursor=self.cursors.get(name), sensor_name=name, resources={"bench": self.bench}
            ) as context:
                result = sensor.evaluate_tick(context)
            for event in result.asset_events:
                self.instance.report_runless_asset_event(event)
            self.cursors[name] = result.cursor
            said[name] = result.skip_message or ""
        return said

    def shown(self) -> dict[str, Any]:
        """What the UI has of release_ledger: its newest materialization, and whether its check passed."""
        event = self.instance.get_latest_materialization_event(dg.AssetKey("release_ledger"))
        metadata = {name: value.value for name, value in event.asset_materialization.metadata.items()}
        key = dg.AssetCheckKey(dg.AssetKey("release_ledger"), "no_hold")
        record = self.instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
        return {**metadata, "no_hold": str(record.status.value)}


def ragline(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "rag_assets", *arguments], capture_output=True, text=True, check=False)
    return {"code": done.returncode, "said": done.stderr.strip(), "facts": json.loads(done.stdout) if done.stdout.startswith("{") else None}


def swap(before: str, after: str) -> None:
    """Change the row of ragline.toml, as somebody does who expects nobody to notice."""
    text = CONFIG.read_text(encoding="utf-8")
    CONFIG.write_text(re.sub(re.escape(before), after, text, count=1), encoding="utf-8")


def scene(name: str, **facts: Any) -> None:
    print(json.dumps({"scene": name, "seconds": round(time.perf_counter() - STARTED, 1), **facts}), flush=True)


def play(stage: Stage) -> None:
    store = stage.bench.store
    built = stage.run("build_and_evaluate", model="encoder")
    promoted = stage.run("promote")
    champion = Ledger(store).state().champion
    scene("released", built=built, promoted=promoted, champion=champion and champion.snapshot_id, said=stage.tick(), shown=stage.shown())

    stage.run("weekly_drift")
    scene("a quiet week", said=stage.tick(), holds=len(Ledger(store).state().holds))

    swap("max_tokens = 256  # encoder", "max_tokens = 10  # encoder")
    rebuilt = stage.run("build_and_evaluate", model="encoder")
    better_built = stage.run("build_and_evaluate", model="better")
    week = stage.run("weekly_drift")
    said = stage.tick()
    scene("swapped", rebuilt=rebuilt, better_built=better_built, week=week, said=said, shown=stage.shown())
    holds = len(Ledger(store).state().holds)
    stage.cursors.clear()
    stage.tick()
    scene("ticked again", before=holds, holds=len(Ledger(store).state().holds))

    entries = Ledger(store).last_number()
    by_job = stage.run("promote")
    by_command = ragline("promote", "better", "--json")
    better = next(name for name in store.names("snapshots") if name.startswith("better-"))
    try:
        promote(store, better, gate=stage.bench.settings.gate, actor="tester", reason="please", override=True)
        by_api = ""
    except RaglineError as error:
        by_api = str(error)
    scene("refused", by_job=by_job, by_command=by_command, by_api=by_api, new_entries=Ledger(store).last_number() - entries)

    swap("max_tokens = 10  # encoder", "max_tokens = 256  # encoder")
    week = stage.run("weekly_drift")
    lifted = ragline("lift", "--reason", "the row of encoder is restored", "--json")
    scene("fixed", week=week, lifted=lifted, said=stage.tick(), holds=len(Ledger(store).state().holds))

    promoted = stage.run("promote")
    live = Ledger(store).state().champion
    scene("promoted", failure=promoted, champion=live and live.snapshot_id, said=stage.tick(), shown=stage.shown())
    drilled = stage.run("drill")
    record = stage.instance.get_latest_materialization_event(dg.AssetKey("rollback_drill"))
    drill = {name: value.value for name, value in record.asset_materialization.metadata.items()} if record else {}
    back = ragline("rollback", "--reason", "the end of the story", "--json")
    live = Ledger(store).state().champion
    scene(
        "rolled back", drilled=drilled, drill=drill, back=back, champion=live and live.snapshot_id, said=stage.tick(), shown=stage.shown()
    )


STARTED = time.perf_counter()
if __name__ == "__main__":
    with postgres(load_settings()) as databases:
        os.environ.update(export(databases))
        with dg.DagsterInstance.get() as opened:
            play(Stage(opened))

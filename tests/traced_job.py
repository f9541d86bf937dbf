"""Small jobs of traced assets, at module level so that the processes of their steps can load them."""

import dagster as dg

from rag_assets.defs.traced import asset, default
from rag_serving.errors import SnapshotError
from rag_serving.signals import contract, work

SECRET = "wombat-4711-secret"


@work.worked(contract.VERIFY, lambda found: {contract.SNAPSHOT_ID: found})
def look(snapshot_id: str) -> str:
    return snapshot_id


@asset()
def first() -> dg.MaterializeResult:
    return dg.MaterializeResult()


@asset(deps=[first])
def second() -> dg.MaterializeResult:
    return dg.MaterializeResult(metadata={"looked_at": look("all-minilm-1")})


@asset(deps=[first])
def fails() -> dg.MaterializeResult:
    raise SnapshotError(f"{SECRET} is damaged.", fix="Restore it.")


@asset(check_specs=[dg.AssetCheckSpec("sound", asset="telling")])
def telling():
    sound = dg.AssetCheckResult(check_name="sound", passed=True)
    return dg.MaterializeResult(
        value=7, metadata={"rows": 3}, data_version=dg.DataVersion("v1"), tags={"made": "here"}, check_results=[sound]
    )


definitions = dg.Definitions(
    assets=[first, second, fails],
    jobs=[
        dg.define_asset_job("pair", selection=["first", "second"]),
        dg.define_asset_job("pair_and_failure", selection=["first", "second", "fails"]),
    ],
    executor=default,
)


def pair() -> dg.JobDefinition:
    """Two steps, each in a process of its own."""
    return definitions.resolve_job_def("pair")


pair_and_failure = definitions.resolve_job_def("pair_and_failure")

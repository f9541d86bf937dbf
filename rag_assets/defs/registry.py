"""The release as MLflow's model registry shows it."""

import dagster as dg

from rag_assets.defs.traced import asset, op
from rag_assets.mirror import mirror
from rag_assets.workbench import Workbench


@asset(group_name="release", kinds={"mlflow"}, deps=["production_release"])
def model_registry(bench: dg.ResourceParam[Workbench]) -> dg.MaterializeResult:
    """Evaluations, versions and the aliases champion and challenger in MLflow, brought up to the ledger. They decide nothing."""
    shown = mirror(bench)
    if shown is None:
        return dg.MaterializeResult(metadata={"mlflow": "not reached; brought up to date at the next run"})
    aliases = {f"alias_{alias}": f"{shown.name} version {version}" for alias, version in shown.aliases.items()}
    return dg.MaterializeResult(metadata={"runs_logged": shown.logged, "versions": len(shown.versions), **aliases})


@op(ins={"changed": dg.In(dg.Nothing)})
def mirror_release(bench: dg.ResourceParam[Workbench]) -> None:
    """Bring MLflow's aliases up to the ledger after a change of the release."""
    mirror(bench)

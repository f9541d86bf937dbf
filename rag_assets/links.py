"""Addresses that a person opens: a Dagster run, an MLflow run, a registered model version."""

import re

from rag_serving.settings import Settings


def dagster_run_url(settings: Settings, run_id: str) -> str:
    """The run in the Dagster UI of this platform."""
    return f"{_address(settings, settings.places.dagster_port)}/runs/{run_id}"


def mlflow_run_url(settings: Settings, experiment_id: str, run_id: str) -> str:
    """The run in the MLflow UI: the server of RAGLINE_MLFLOW_URL, else this platform's."""
    return f"{_mlflow(settings)}/#/experiments/{experiment_id}/runs/{run_id}"


def mlflow_version_url(settings: Settings, name: str, version: str) -> str:
    """The registered model version in the MLflow UI."""
    return f"{_mlflow(settings)}/#/models/{name}/versions/{version}"


def without_login(text: str) -> str:
    """Text whose addresses name no user and no password."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)


def _mlflow(settings: Settings) -> str:
    return without_login(settings.places.mlflow_url or _address(settings, settings.places.mlflow_port)).rstrip("/")


def _address(settings: Settings, port: int) -> str:
    host = settings.places.host
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"  # noqa: S104 - compared, not bound

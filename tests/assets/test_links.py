"""Addresses that people are shown."""

from rag_assets.links import mlflow_run_url, mlflow_version_url, without_login
from rag_serving.settings import Places, Settings


def test_addresses_carry_no_login(tmp_path):
    """A tracking server's user and password are in its address for programs, and in no link."""
    settings = Settings(root=tmp_path, places=Places(mlflow_url="https://ana:S3CRET@mlflow.example/base/"))
    assert mlflow_run_url(settings, "1", "abc") == "https://mlflow.example/base/#/experiments/1/runs/abc"
    assert "S3CRET" not in mlflow_version_url(settings, "retriever", "2")
    said = "request to http://:S3CRET@host:5000/api?to=a@b failed"
    assert without_login(said) == "request to http://host:5000/api?to=a@b failed"

"""Snapshots in MLflow's registry: a logged model and a version each, and aliases that mirror the release ledger and decide nothing."""

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rag_serving.releases import State
from rag_serving.settings import Settings
from rag_serving.snapshots import Manifest

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION, CHALLENGER = "champion", "challenger"
_MANIFEST = "ragline.manifest_sha256"
_EXTERNAL = "mlflow.model.isExternal"  # MLflow's mark of a model whose files are kept elsewhere
_VERSIONS = "mlflow.modelVersions"  # how MLflow's pages lead from a logged model to its versions


def registered_name(settings: Settings) -> str:
    """The registered model of this corpus, such as `retriever-sample`: its versions are the snapshots of the corpus."""
    return f"retriever-{re.sub(r'[^a-z0-9]+', '-', settings.corpus.source.lower()).strip('-')}"[:200]


class Registry:
    """The registered model of one corpus. Methods may be repeated: what is there already stays. They raise what MLflow raises."""

    def __init__(self, client: "MlflowClient", name: str) -> None:
        self._client = client
        self.name = name
        if not client.search_registered_models(filter_string=f"name = '{name}'"):
            client.create_registered_model(name, description="Index snapshots. The aliases mirror the release ledger and decide nothing.")
        self.versions = self._versions()

    def logged_model(self, manifest: Manifest, experiment_id: str, parameters: Mapping[str, str]) -> str:
        """Id of the logged model of a snapshot in an experiment: embedding model and index, without files, for metrics to refer to."""
        found = self._client.search_logged_models([experiment_id], filter_string=f"tags.`{_MANIFEST}` = '{manifest.sha256}'")
        for model in found:
            if model.status == "READY":
                return str(model.model_id)
        made = self._client.create_logged_model(
            experiment_id,
            name=manifest.snapshot_id,
            tags={**_tags(manifest), _EXTERNAL: "true"},
            params=dict(parameters),
            model_type="retriever",
        )
        return str(self._client.finalize_logged_model(made.model_id, "READY").model_id)

    def register(self, manifest: Manifest, model_id: str, run_id: str) -> str:
        """Number of the version that is this snapshot."""
        if manifest.sha256 not in self.versions:
            made = self._client.create_model_version(
                self.name,
                source=self._client.get_logged_model(model_id).artifact_location,
                run_id=run_id,
                tags={**_tags(manifest), "ragline.model_id": model_id},
                description=f"Snapshot {manifest.snapshot_id}: {manifest.rows:,} chunks of {manifest.documents:,} documents.",
                await_creation_for=0,
                model_id=model_id,
            )
            self._client.set_logged_model_tags(model_id, {_VERSIONS: json.dumps([{"name": self.name, "version": str(made.version)}])})
            self.versions[manifest.sha256] = str(made.version)
        return self.versions[manifest.sha256]

    def mirror(self, state: State) -> dict[str, str]:
        """Set the aliases to what the ledger says and return them with their versions.

        `champion` is the live snapshot, `challenger` the one in a canary. An alias whose snapshot has no version here is taken away: a stale
        one would lie.
        """
        named = {CHAMPION: state.champion, CHALLENGER: state.canary}
        wanted = {
            alias: self.versions[release.manifest_sha256]
            for alias, release in named.items()
            if release and release.manifest_sha256 in self.versions
        }
        present = {alias: str(version) for alias, version in self._client.get_registered_model(self.name).aliases.items()}
        for alias in named:
            if alias in wanted and present.get(alias) != wanted[alias]:
                self._client.set_registered_model_alias(self.name, alias, wanted[alias])
            elif alias in present and alias not in wanted:
                self._client.delete_registered_model_alias(self.name, alias)
        return wanted

    def _versions(self) -> dict[str, str]:
        """Manifest hash -> version number; of two versions of one snapshot the first."""
        found: dict[str, str] = {}
        token: str | None = None
        while True:
            page = self._client.search_model_versions(f"name = '{self.name}'", page_token=token)
            for version in sorted(page, key=lambda version: int(version.version)):
                found.setdefault(version.tags.get(_MANIFEST, ""), str(version.version))
            token = page.token
            if not token:
                return found


def _tags(manifest: Manifest) -> dict[str, str]:
    return {"ragline.snapshot_id": manifest.snapshot_id, _MANIFEST: manifest.sha256, "ragline.fingerprint": manifest.fingerprint}

"""The Dagster code location: everything under `defs/`, loaded once, each run a trace."""

from pathlib import Path

import dagster as dg

from rag_assets.defs import traced


@dg.definitions
def defs() -> dg.Definitions:
    loaded = dg.load_from_defs_folder(path_within_project=Path(__file__).parent / "defs")
    return dg.Definitions.merge(loaded, dg.Definitions(executor=traced.default))

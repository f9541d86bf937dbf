"""What assets are given: one workbench over the settings of this code location."""

import dagster as dg

from rag_assets.workbench import Workbench
from rag_serving.settings import load_settings

SETTINGS = load_settings()
MODELS = dg.StaticPartitionsDefinition([spec.name for spec in SETTINGS.models])


@dg.definitions
def resources() -> dg.Definitions:
    return dg.Definitions(resources={"bench": Workbench(SETTINGS)})

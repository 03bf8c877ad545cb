"""Pipelines of transformers' whose passes are those of a posterior's draws."""

from pyrolora.pipelines.build import PIPELINES, pipeline
from pyrolora.pipelines.names import pipeline_name

__all__ = ["PIPELINES", "pipeline", "pipeline_name"]

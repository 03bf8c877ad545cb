"""Pipelines of transformers' with the uncertainty of a posterior."""

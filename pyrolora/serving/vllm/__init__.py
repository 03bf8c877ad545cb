"""Posteriors on vLLM: draws exported as adapters, and a gateway that asks all of them."""

TOP_LOGPROBS = 20
"""The tokens per place that vLLM gives log-probabilities of, unless it is started otherwise."""

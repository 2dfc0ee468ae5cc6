"""Measuring a model against its original: outputs, perplexity."""

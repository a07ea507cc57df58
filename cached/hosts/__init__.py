"""Composition roots: which adapters run together, and where."""

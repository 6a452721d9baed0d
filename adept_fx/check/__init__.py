"""Checks that a model is rewritten correctly: what `adept-fx check` runs."""

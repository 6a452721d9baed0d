"""Runs exit-aware graphs: the decoder's forward, layouts of live tokens, plans, statistics."""

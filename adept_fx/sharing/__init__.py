"""Exits as files: saved beside their base or without it, loaded again, and on the Hub."""

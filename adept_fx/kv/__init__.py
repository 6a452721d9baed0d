"""Where keys and values of skipped layers come from."""

from adept_fx.kv.base import KVPolicy, Synthesize, build_policy

__all__ = ["KVPolicy", "Synthesize", "build_policy"]

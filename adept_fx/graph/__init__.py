"""The compiler's own parts: pass base, runner, verifier, node meta, symbols, dumps."""

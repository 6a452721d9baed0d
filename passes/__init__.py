"""The graph passes of ADEPT-FX, one per file, imported as `adept_fx.passes`.

This folder is reached through the symbolic link `adept_fx/passes`. Imported from the
repository root as a top-level `passes`, every class in it would exist twice, so that is
refused.
"""

if __name__ != "adept_fx.passes":
    raise ImportError(f"import this package as 'adept_fx.passes', not as {__name__!r}")

"""`adept_fx.fit`: trains what decides about exits, and what makes them good."""

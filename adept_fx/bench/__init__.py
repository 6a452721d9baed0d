"""`adept-fx bench`: what early exits gain or cost on this machine, against the plain model."""

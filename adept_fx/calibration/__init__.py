"""`adept_fx.calibrate`: thresholds that keep a promise about quality."""

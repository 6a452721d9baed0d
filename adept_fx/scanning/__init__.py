"""`adept_fx.scan`: is early exit worth it for a model, before anything is trained?"""

"""The lowered form of an exit-aware graph: what `torch.compile` is given, and when it is called."""

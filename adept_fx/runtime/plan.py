"""Which plan a stage runs by: a choice of cost that never changes a result.

Measured on two cores of an x86-64 server CPU (torch 2.13, bf16 and fp32, layers of 512 to 2048
wide): see ``profitable``.
"""

PLANS = ("auto", "dense", "compact")

# Below this many tokens a layer's time is that of reading its weights: leaving some out of it
# saves nothing, leaving all out saves everything.
_WEIGHT_BOUND_TOKENS = 16
# Gather, scatter and padding of attention cost about what this share of a stage's tokens costs.
_OVERHEAD_SHARE = 0.15


def profitable(live: int, total: int) -> bool:
    """Whether packing ``live`` of ``total`` tokens beats running all of them.

    Args:
        live: Tokens that go on; 0 always pays.
        total: Tokens of the call, padding included.
    """
    if live == 0:
        return True
    cost = max(live, _WEIGHT_BOUND_TOKENS) + _OVERHEAD_SHARE * max(total, _WEIGHT_BOUND_TOKENS)
    return cost < max(total, _WEIGHT_BOUND_TOKENS)

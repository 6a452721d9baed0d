"""Which plan a stage runs by: a choice of cost that never changes a result.

Compiled models go by what their layers cost on the machine (:mod:`adept_fx.runtime.costs`), others
by the rule here. Its numbers were measured with ``examples/plan_costs.py`` (two cores of an AMD
EPYC, torch 2.13, eager, bf16, Llama of 193M parameters and 16 layers, exit at 8). Time of the
compacted plan as a share of the dense plan's, by tokens in the call and share of them that left:

======================  ======  ======  ======
tokens                     1/4     1/2     3/4
======================  ======  ======  ======
16 (decode, 16 rows)      0.88    0.91    0.86
32 (decode, 32 rows)      0.90    0.88    0.85
32 (prefill, 1 row)       1.08    0.96    0.86
128 (prefill, 1 row)      0.99    0.86    0.75
512 (prefill, 1 row)      0.93    0.80    0.69
256 (prefill, 8 rows)     0.95    0.89    0.75
======================  ======  ======  ======

At 8 rows of one token, earlier runs gave 0.90 to 1.02 without order: the rule leaves them dense.
"""

import torch

PLANS = ("auto", "dense", "compact")

# Up to this many tokens a layer's time is that of reading its weights: leaving some out of it
# saves nothing, leaving all out saves everything.
_WEIGHT_BOUND_TOKENS = 8
# Gather, scatter and the padding of attention: a share of the call's tokens, and a fixed part.
_OVERHEAD_SHARE = 0.15
_OVERHEAD_TOKENS = 4


def bucket(count: int, device: torch.device) -> int:
    """How many tokens a compiled stage is given for ``count`` live ones.

    Sizes of 1 would be compiled apart. CUDA graphs are recorded per size: powers of two keep them
    few.
    """
    if count == 0:
        return 0
    smallest = max(count, 2)
    return smallest if device.type == "cpu" else 1 << (smallest - 1).bit_length()


def profitable(live: int, total: int) -> bool:
    """Whether packing ``live`` of ``total`` tokens beats running all of them.

    Args:
        live: Tokens that go on; 0 always pays.
        total: Tokens of the call, padding included.
    """
    if live == 0:
        return True
    overhead = _OVERHEAD_SHARE * total + _OVERHEAD_TOKENS
    return max(live, _WEIGHT_BOUND_TOKENS) + overhead < max(total, _WEIGHT_BOUND_TOKENS)

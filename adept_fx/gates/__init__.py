"""Gates: what decides whether a token leaves at an exit point."""

from __future__ import annotations

from adept_fx.gates.attention_mlp import AttentionMLP
from adept_fx.gates.base import Gate, GateInputs
from adept_fx.gates.cosine import Cosine
from adept_fx.gates.draft import DraftTokens
from adept_fx.gates.entropy import Entropy
from adept_fx.gates.fixed_depth import FixedDepth
from adept_fx.gates.linear import Linear
from adept_fx.gates.max_prob import MaxProb
from adept_fx.gates.mlp import MLP
from adept_fx.gates.replay import Replay
from adept_fx.gates.schedule import Schedule
from adept_fx.gates.top_gap import TopGap

__all__ = [
    "MLP",
    "AttentionMLP",
    "Cosine",
    "DraftTokens",
    "Entropy",
    "FixedDepth",
    "Gate",
    "GateInputs",
    "Linear",
    "MaxProb",
    "Replay",
    "Schedule",
    "TopGap",
]

"""A model of 8 billion parameters transforms in little memory, without any weight."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from transformers import LlamaConfig, LlamaForCausalLM
import adept_fx
config = LlamaConfig(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    intermediate_size=14336, vocab_size=128256,
)
with torch.device("meta"):
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
ee = adept_fx.transform(model, adept_fx.ExitConfig(exits=(8, 16, 24), gate="mlp"))
print(peak() - before, len(ee.adept.graph.code.strip().splitlines()))
"""


@pytest.mark.slow
def test_eight_billion_parameters_on_the_meta_device() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    megabytes, lines = done.stdout.split()
    assert float(megabytes) < 1024
    assert int(lines) < 60  # the printed graph is about a page

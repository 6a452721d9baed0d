"""Settings of the whole test run."""

import torch

# Tiny models gain nothing from threads, and lose much where cores are shared.
torch.set_num_threads(1)

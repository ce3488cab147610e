"""Small matrices: one thread is fastest, and the machine is shared."""

import torch

torch.set_num_threads(1)

"""Shared test environment; with tests/__init__.py it also makes ``tests.nano`` importable."""

import os

# Tests never touch the network: a missing file must fail at once instead of waiting for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Processes that tests start add up in the same order as this one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

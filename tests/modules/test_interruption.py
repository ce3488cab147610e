"""Signals of a terminal, which go to every process of a run."""

import signal
from types import SimpleNamespace

import pytest
from lightning.pytorch.trainer.states import TrainerFn

from sst_lightning.modules.interruption import StopOnSignal


def fitting(launcher=None):
    strategy = SimpleNamespace(launcher=launcher)
    return SimpleNamespace(strategy=strategy, state=SimpleNamespace(fn=TrainerFn.FITTING))


def test_what_the_first_process_tells_the_others_is_no_second_ctrl_c():
    told = []
    first, other = StopOnSignal(), StopOnSignal()
    first._receive(fitting(SimpleNamespace(kill=told.append)), signal.SIGINT, None)
    assert len(told) == 1
    for number in (signal.SIGINT, *told):
        other._receive(fitting(), number, None)
    with pytest.raises(KeyboardInterrupt):
        other._receive(fitting(), signal.SIGINT, None)

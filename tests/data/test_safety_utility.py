"""Utility and safety data, together."""

import pytest

from sst_lightning.algebra.errors import DataError
from sst_lightning.data import Alpaca, SafetyUtilityData, Security


@pytest.mark.parametrize("name", ["attack", "harmless"])
def test_a_utility_set_cannot_have_the_name_of_a_safety_task(name):
    """Its scores would be taken for those of the safety task."""
    with pytest.raises(DataError, match=f"'{name}' is that of a safety task"):
        SafetyUtilityData(utility={name: Alpaca()}, safety=Security())


def test_without_utility_data_there_is_nothing_to_protect():
    with pytest.raises(DataError, match=r"data\.utility is empty"):
        SafetyUtilityData(utility={}, safety=Security())

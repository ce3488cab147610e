"""All DataModules in one place, for ``class_path`` and imports."""

from sst_lightning.data.alpaca import Alpaca
from sst_lightning.data.base import TextDataModule
from sst_lightning.data.repliqa import RepliQA
from sst_lightning.data.security import Security

__all__ = ["Alpaca", "RepliQA", "Security", "TextDataModule"]

"""What a LightningModule needs for Fishers to be taken of it."""

from typing import Any, Protocol, runtime_checkable

from torch import nn

from sst_lightning.algebra.core import CoreSpace
from sst_lightning.modules.core_hooks import GradientCapture, Receiver


@runtime_checkable
class FisherModule(Protocol):
    """What a LightningModule offers so that ``FisherCollector`` can work on it."""

    model: nn.Module | None

    def core_space(self) -> CoreSpace:
        """Return the core space that gradients are taken in."""
        ...

    def move_to_point(self, point: str) -> None:
        """Put the adapters' weights at the named point (or check that they are there)."""
        ...

    def gradient_capture(self, space: CoreSpace, receive: Receiver) -> GradientCapture:
        """Return what hands the core gradients of each module to ``receive``."""
        ...

    def fisher_metadata(self, point: str) -> dict[str, Any]:
        """Return base_model, base_fingerprint, adapter_fingerprints, the point's full name and the
        hash of its weights, point_fingerprint.
        """
        ...

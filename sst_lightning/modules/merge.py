"""LightningModule that holds a base model and adapters in their common core space."""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sst_lightning.algebra.adapter import LoraAdapter, check_compatible
from sst_lightning.algebra.core import Cores, CoreSpace, add, fingerprint_cores
from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.modules.backbone import (
    Attention,
    Dtype,
    Quantization,
    Storage,
    identity,
)
from sst_lightning.modules.base_check import check_base_name, check_shapes
from sst_lightning.modules.core_hooks import CoreInjector, InjectedCapture, Receiver
from sst_lightning.modules.evaluation import EvaluationModule
from sst_lightning.modules.heap import release_free_memory


class MergeModule(EvaluationModule):
    """The base model with utility adapters and a safety adapter, at a point in core space.

    The adapters are read, checked and encoded before the base model is loaded. The base weights
    never change: the module moves between points (base, utility merge, safety adapter, any merge)
    by swapping the cores that forward hooks add (docs/mathematics.md section 2).

    Args:
        utility: folders of the utility adapters.
        safety: folder of the safety adapter.
        utility_weights: weight of each utility adapter in the utility merge (default: 1 each).
        base: alias, hub id or folder of the base model.
        dtype: dtype of the base weights.
        attention: attention implementation.
        quantization: ``nf4`` for 4-bit base weights.
        max_new_tokens: length of generated answers.
        served_on: storages of the base that ``merge`` and ``compare`` measure all models on: first
            the one they will be served on, which has the report's figures, then others, which have
            their differences to it. When not given, the one that ``dtype`` and ``quantization`` name.
            Fishers are taken on that one in any case, and merges verified and budgets kept. Only one
            base is in memory at a time.

    Raises:
        AdapterError: an adapter cannot be read, or the adapters do not fit each other or the base.
        SSTMergeError: no utility adapter, weights that do not fit, or a storage twice.
    """

    def __init__(
        self,
        utility: list[str],
        safety: str,
        utility_weights: list[float] | None = None,
        base: str = "smollm2-135m",
        dtype: Dtype = "bfloat16",
        attention: Attention = "auto",
        quantization: Quantization | None = None,
        max_new_tokens: int = 24,
        served_on: list[Storage] | None = None,
    ) -> None:
        super().__init__(base, dtype, attention, quantization, max_new_tokens)
        self.own_storage = self.storage
        self._dtype_beside_nf4 = dtype
        self.served_on: list[Storage] = [self.own_storage] if served_on is None else list(served_on)
        if not self.served_on or len(set(self.served_on)) < len(self.served_on):
            raise SSTMergeError(
                f"model.served_on is {self.served_on}: give each storage once, first the one that "
                "the merge will be served on, such as [bfloat16, nf4]"
            )
        if not utility:
            raise SSTMergeError("model.utility is empty: give at least one utility adapter folder")
        weights = (
            [1.0] * len(utility) if utility_weights is None else list(map(float, utility_weights))
        )
        if len(weights) != len(utility):
            raise SSTMergeError(
                f"model.utility_weights has {len(weights)} values for {len(utility)} utility adapters"
            )
        self.utility_weights = weights
        self.utility_adapters = [LoraAdapter.load(Path(path)) for path in utility]
        self.safety_adapter = LoraAdapter.load(Path(safety))
        check_compatible(self.adapters)
        for adapter in self.adapters:
            check_base_name(adapter, base)
        self.space = CoreSpace.from_adapters(self.adapters)
        cores = [self.space.encode(adapter) for adapter in self.utility_adapters]
        self.utility_core = add(list(zip(weights, cores, strict=True)))
        self.safety_core = self.space.encode(self.safety_adapter)
        self.merge_core: Cores | None = None
        self._injector: CoreInjector | None = None

    @property
    def storage(self) -> Storage:
        """How the weights of the base's linear layers are stored now."""
        return self.quantization or self.dtype_name

    def change_base(self, storage: Storage) -> None:
        """Take the same base in another storage; the one that is loaded is freed before.

        Args:
            storage: with ``nf4`` what is not quantised has the module's own ``dtype``.
        """
        if storage == self.storage:
            return
        if self._injector is not None:
            self._injector.remove()
        self._injector = self._base_fingerprint = self.model = None
        # The last test pass: its caches of prompts hold the model.
        self.suites = self.output_store = None
        gc.collect()
        release_free_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if storage == "nf4":
            self.quantization, self.dtype_name = "nf4", self._dtype_beside_nf4
        else:
            self.quantization, self.dtype_name = None, storage
        self.configure_model()

    @property
    def has_utility_merge(self) -> bool:
        """Whether the utility core is not simply that of the one utility adapter."""
        return self.utility_weights != [1.0]

    def utility_merge(self) -> LoraAdapter:
        """Return what every merge starts from at α = 0: the weighted sum of the utility adapters."""
        if not self.has_utility_merge:
            return self.utility_adapters[0]
        return self.space.decode(self.utility_core, base_model=self.safety_adapter.base_model)[0]

    @property
    def adapters(self) -> list[LoraAdapter]:
        """All adapters of the merge, utility first."""
        return [*self.utility_adapters, self.safety_adapter]

    def configure_model(self) -> None:
        """Load the base model once and hook the target modules.

        Raises:
            AdapterError: a target module is missing in the base model or has another shape.
        """
        super().configure_model()
        if self._injector is None:
            assert self.model is not None
            for adapter in self.adapters:
                check_shapes(adapter, self.model)
            self._injector = CoreInjector(self.model, self.space)
            self.move_to_point("utility")

    def core_space(self) -> CoreSpace:
        """Return the core space of the adapters."""
        return self.space

    def cores_at(self, point: str) -> Cores | None:
        """Return the cores of a named point; ``None`` is the bare base model.

        Raises:
            SSTMergeError: the point is unknown, or ``merge`` before a merge was made.
        """
        if point == "merge":
            if self.merge_core is None:
                raise SSTMergeError("point 'merge' asked for before a merge was made")
            return self.merge_core
        points = {"base": None, "utility": self.utility_core, "safety": self.safety_core}
        if point not in points:
            raise SSTMergeError(f"unknown point '{point}': use base, utility, safety or merge")
        return points[point]

    def move_to_point(self, point: str) -> None:
        """Make the named point the weights of all following forward passes."""
        self.use_cores(self.cores_at(point))

    def use_cores(self, cores: Mapping[str, Tensor] | None) -> None:
        """Make ``cores`` the weights of all following forward passes."""
        if self._injector is None:
            raise SSTMergeError("the base model is not loaded yet: call configure_model() first")
        self._injector.set(cores)

    def use_adapter(self, adapter: LoraAdapter | None) -> None:
        """Make ``adapter`` the weights of all following forward passes; ``None``: the bare base."""
        if self._injector is None:
            raise SSTMergeError("the base model is not loaded yet: call configure_model() first")
        self._injector.set_adapter(adapter)

    def gradient_capture(self, space: CoreSpace, receive: Receiver) -> InjectedCapture:
        """Return the capture of core gradients, for ``FisherCollector``."""
        if self._injector is None:
            raise SSTMergeError("the base model is not loaded yet: call configure_model() first")
        return InjectedCapture(self._injector, receive)

    def point_label(self, point: str) -> str:
        """Name a point so that Fishers of differently weighted utility merges are told apart."""
        return f"{point} {self.utility_weights}" if point == "utility" else point

    def fisher_metadata(self, point: str) -> dict[str, Any]:
        """Identify the base model, the adapters and the point a Fisher is taken with."""
        return {
            "base_model": identity(self.base),
            "base_fingerprint": self.base_fingerprint(),
            "adapter_fingerprints": [adapter.fingerprint for adapter in self.adapters],
            "point": self.point_label(point),
            "point_fingerprint": fingerprint_cores(self.cores_at(point)),
        }

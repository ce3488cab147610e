"""Hooks that place a merge in core space into a frozen model, and read core gradients out of it.

Both work on the *module names of the base model*, whether the model is a plain transformers model
or one wrapped by PEFT, and whatever the base weights' storage (fp32, bf16, NF4): only a target
module's input and output are touched (docs/mathematics.md section 3).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sst_lightning.algebra.adapter import LoraAdapter
from sst_lightning.algebra.core import CoreSpace
from sst_lightning.algebra.errors import AdapterError

PEFT_PREFIX = "base_model.model."

Observer = Callable[[str, Tensor, Tensor], None]
Receiver = Callable[[str, Tensor, Tensor], None]
"""Takes a module's name, P (B, T, q) and R (B, T, p): see :class:`CoreGradientCapture`."""


def target_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Find the modules called ``names`` (base-model names) in ``model``.

    Raises:
        AdapterError: the model has no module of that name.
    """
    found = {name.removeprefix(PEFT_PREFIX): module for name, module in model.named_modules()}
    names = list(names)
    missing = [name for name in names if name not in found]
    if missing:
        raise AdapterError(
            f"the base model has no module '{missing[0]}' ({len(missing)} of {len(names)} target "
            "modules are missing): the adapters were trained on another architecture"
        )
    return {name: found[name] for name in names}


class CoreInjector:
    """Adds ΔW to every target module of a frozen model, given as a core or as factors.

    A candidate merge is then a set of small matrices: :meth:`set` and :meth:`set_adapter` swap one
    for another without touching the base weights, and rounding is that of a LoRA served unmerged:
    the low-rank path runs in fp32 and its sum is rounded to the module's output dtype, as in PEFT.

    With y = (x Q_in) Mᵀ a module's output is W x + y Q_outᵀ, so the gradient of the loss with respect
    to y is δ Q_out: adding a core takes both projections that :class:`InjectedCapture` needs.

    Args:
        model: model whose modules are hooked.
        space: the orthonormal bases of each target module.
    """

    def __init__(self, model: nn.Module, space: CoreSpace) -> None:
        self.space = space
        self._modules = target_modules(model, space.bases)
        self._bases: dict[str, tuple[Tensor, Tensor]] = {}
        self._cores: dict[str, Tensor] = {}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._observer: Observer | None = None
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(self._hook(name)) for name, module in self._modules.items()
        ]

    def set(self, cores: Mapping[str, Tensor] | None) -> None:
        """Make Q_out M Q_inᵀ the current ΔW, M (p, q) by module; ``None`` is the bare base model.

        Raises:
            AdapterError: ``cores`` does not cover exactly the modules of the space.
        """
        self._factors, self._cores = {}, {}
        if cores is None:
            return
        if set(cores) != set(self.space.bases):
            raise AdapterError("a merge must give one core for each module of its core space")
        for name, core in cores.items():
            if bool(core.any()):  # ΔW = 0: skip the products per token
                self._cores[name] = core.float().to(self._device(name))
                self._basis(name)

    def set_adapter(self, adapter: LoraAdapter | None) -> None:
        """Make s B A of ``adapter`` the current ΔW; ``None`` is the bare base model.

        Raises:
            AdapterError: the adapter has a module that is not hooked.
        """
        self._factors, self._cores = {}, {}
        if adapter is None:
            return
        for name, factors in adapter.factors.items():
            if name not in self._modules:
                raise AdapterError(f"module '{name}' is not one of the merge's target modules")
            if bool(factors.B.any()):
                left = factors.scaling * factors.B.double().T
                self._factors[name] = self._placed(name, factors.A.T, left)

    def observe(self, observer: Observer | None) -> None:
        """Let ``observer`` see the projections of the forward passes that follow.

        Args:
            observer: called with module name, x Q_in (B, T, q) and y (B, T, p), both fp32; ``None``
                for nothing. ΔW must have been given as cores.
        """
        self._observer = observer

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _device(self, name: str) -> torch.device:
        return next(self._modules[name].parameters()).device

    def _placed(self, name: str, *parts: Tensor) -> tuple[Tensor, Tensor]:
        """Return fp32 copies of a pair of matrices where the module computes."""
        first, second = (part.float().contiguous().to(self._device(name)) for part in parts)
        return first, second

    def _basis(self, name: str) -> tuple[Tensor, Tensor]:
        """Return Q_in and Q_outᵀ, placed at first use."""
        if name not in self._bases:
            basis = self.space.bases[name]
            self._bases[name] = self._placed(name, basis.q_in, basis.q_out.T)
        return self._bases[name]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add_core(
            module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
        ) -> Tensor | None:
            factors, core = self._factors.get(name), self._cores.get(name)
            if factors is not None:
                right, left = factors
                return (output + (inputs[0].to(right.dtype) @ right) @ left).to(output.dtype)
            if core is None and self._observer is None:
                return None
            q_in, q_out = self._basis(name)
            projected = inputs[0].to(q_in.dtype) @ q_in
            if core is None:  # the gradient with respect to y does not depend on y
                core = projected.new_zeros(q_out.shape[0], q_in.shape[1])
            added = projected @ core.T
            if self._observer is not None:
                self._observer(name, projected, added)
            return (output + added @ q_out).to(output.dtype)

        return add_core


class GradientCapture(Protocol):
    """Hands the projected inputs and output gradients of each target module to a receiver."""

    def start(self, attention_mask: Tensor) -> None:
        """Capture the forward passes that follow; ``attention_mask`` is (B, T), 0 on padding."""
        ...

    def stop(self) -> None:
        """Ignore forward passes until the next :meth:`start`."""
        ...

    def remove(self) -> None:
        """Take the hooks out of the model."""
        ...


class InjectedCapture:
    """:class:`CoreGradientCapture` for a model with a :class:`CoreInjector`, at hardly any cost.

    The injector's products, forward and backward, are the projections.

    Args:
        injector: its current ΔW must be one of cores.
        receive: see :class:`CoreGradientCapture`.
    """

    def __init__(self, injector: CoreInjector, receive: Receiver) -> None:
        self._injector = injector
        self._receive = receive
        self._mask: Tensor | None = None

    def start(self, attention_mask: Tensor) -> None:
        """Capture the forward passes that follow; ``attention_mask`` is (B, T), 0 on padding."""
        self._mask = padding_mask(attention_mask)
        self._injector.observe(self._observe)

    def stop(self) -> None:
        """Ignore forward passes until the next :meth:`start`."""
        self._injector.observe(None)

    def remove(self) -> None:
        """Leave the injector as it was."""
        self.stop()

    def _observe(self, name: str, projected: Tensor, added: Tensor) -> None:
        if not added.requires_grad:
            return
        mask, inputs = self._mask, masked(projected.detach(), self._mask)

        def receive(gradient: Tensor) -> None:
            self._receive(name, inputs, masked(gradient, mask))

        added.register_hook(receive)


class CoreGradientCapture:
    """Hands the projected inputs and output gradients of each target module to ``receive``.

    For a batch of B sequences of T tokens, once per module and backward pass,
    ``receive(name, P, R)`` gets P = x Q_in (B, T, q) and R = δ Q_out (B, T, p) in fp32, where x is
    the module's input and δ the gradient of the loss with respect to its output. The gradient of
    sequence n with respect to the core M is then g_n = Σ_t R_ntᵀ P_nt. Prompt tokens count (they
    carry gradient through attention); rows of padding tokens are zero.

    Args:
        model: model whose modules are hooked; register the :class:`CoreInjector` first.
        space: the orthonormal bases of each target module.
        receive: called during the backward pass.
    """

    def __init__(self, model: nn.Module, space: CoreSpace, receive: Receiver) -> None:
        self._receive = receive
        self._active = False
        self._mask: Tensor | None = None
        self._bases: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        for name, module in target_modules(model, space.bases).items():
            basis = space.bases[name]
            device = next(module.parameters()).device
            self._bases[name] = (basis.q_in.float().to(device), basis.q_out.float().to(device))
            self._handles.append(module.register_forward_hook(self._hook(name)))

    def start(self, attention_mask: Tensor) -> None:
        """Capture the forward passes that follow; ``attention_mask`` is (B, T), 0 on padding."""
        self._active, self._mask = True, padding_mask(attention_mask)

    def stop(self) -> None:
        """Ignore forward passes until the next :meth:`start`."""
        self._active = False

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def capture(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not self._active or not output.requires_grad:
                return
            mask, (q_in, q_out) = self._mask, self._bases[name]
            projected = masked(inputs[0].detach().float() @ q_in, mask)

            def receive(gradient: Tensor) -> None:
                self._receive(name, projected, masked(gradient.float() @ q_out, mask))

            output.register_hook(receive)

        return capture


class EmbeddingLeaf:
    """Makes the embedding output the leaf that a backward pass through a frozen model ends in.

    In a model whose weights are all frozen nothing asks for a gradient and δ does not exist.
    ``torch.autograd.grad(loss, leaf.output)`` runs the backward pass through every target module,
    computes no parameter gradient and leaves every ``.grad`` alone.

    Args:
        model: transformers or PEFT model; its input embeddings are hooked.
    """

    def __init__(self, model: nn.Module) -> None:
        self.output: Tensor | None = None
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        self._handle: RemovableHandle = embeddings.register_forward_hook(self._hook)

    def remove(self) -> None:
        """Take the hook out of the model."""
        self._handle.remove()
        self.output = None

    def _hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        if not output.requires_grad:
            output.requires_grad_(True)
        self.output = output


def padding_mask(attention_mask: Tensor) -> Tensor | None:
    """Return what rows of a batch are multiplied by, (B, T, 1) fp32; ``None`` without padding."""
    return None if bool(attention_mask.all()) else attention_mask.unsqueeze(-1).float()


def masked(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``rows`` (B, T, n), zero on padding."""
    return rows if mask is None else rows * mask

"""Hooks that place a merge in core space into a frozen model, and read core gradients out of it.

Both work on the *module names of the base model*, whether the model is a plain transformers model
or one wrapped by PEFT, and whatever the base weights' storage (fp32, bf16, NF4): only a target
module's input and output are touched (docs/mathematics.md section 3).
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sst_lightning.algebra.adapter import LoraAdapter
from sst_lightning.algebra.core import CoreSpace
from sst_lightning.algebra.errors import AdapterError

PEFT_PREFIX = "base_model.model."


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

    Args:
        model: model whose modules are hooked.
        space: the orthonormal bases of each target module.
    """

    def __init__(self, model: nn.Module, space: CoreSpace) -> None:
        self.space = space
        self._modules = target_modules(model, space.bases)
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(self._hook(name)) for name, module in self._modules.items()
        ]

    def set(self, cores: Mapping[str, Tensor] | None) -> None:
        """Make Q_out M Q_inᵀ the current ΔW, M (p, q) by module; ``None`` is the bare base model.

        Raises:
            AdapterError: ``cores`` does not cover exactly the modules of the space.
        """
        self._factors = {}
        if cores is None:
            return
        if set(cores) != set(self.space.bases):
            raise AdapterError("a merge must give one core for each module of its core space")
        for name, core in cores.items():
            if not bool(core.any()):
                continue  # ΔW = 0: skip two products per token
            basis = self.space.bases[name]
            left = basis.q_out.double() @ core.double().to(basis.q_out.device)
            self._place(name, basis.q_in, left.T)

    def set_adapter(self, adapter: LoraAdapter | None) -> None:
        """Make s B A of ``adapter`` the current ΔW; ``None`` is the bare base model.

        Raises:
            AdapterError: the adapter has a module that is not hooked.
        """
        self._factors = {}
        if adapter is None:
            return
        for name, factors in adapter.factors.items():
            if name not in self._modules:
                raise AdapterError(f"module '{name}' is not one of the merge's target modules")
            if bool(factors.B.any()):
                self._place(name, factors.A.T, factors.scaling * factors.B.double().T)

    def _place(self, name: str, right: Tensor, left: Tensor) -> None:
        """Keep fp32 copies of ΔWᵀ = right · left where the module computes."""
        device = next(self._modules[name].parameters()).device
        parts = (part.float().contiguous().to(device) for part in (right, left))
        self._factors[name] = next(parts), next(parts)

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add_core(
            module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
        ) -> Tensor | None:
            factors = self._factors.get(name)
            if factors is None:
                return None
            right, left = factors
            return (output + (inputs[0].to(right.dtype) @ right) @ left).to(output.dtype)

        return add_core


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

    def __init__(
        self, model: nn.Module, space: CoreSpace, receive: Callable[[str, Tensor, Tensor], None]
    ) -> None:
        self._receive = receive
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
        self._mask = attention_mask.unsqueeze(-1).float()

    def stop(self) -> None:
        """Ignore forward passes until the next :meth:`start`."""
        self._mask = None

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def capture(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            mask = self._mask
            if mask is None or not output.requires_grad:
                return
            q_in, q_out = self._bases[name]
            projected = (inputs[0].detach().float() @ q_in) * mask

            def receive(gradient: Tensor) -> None:
                self._receive(name, projected, (gradient.float() @ q_out) * mask)

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

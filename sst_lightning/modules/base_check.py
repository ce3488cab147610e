"""Whether an adapter belongs to a base model: by name before loading, by shape after."""

from pathlib import Path

from torch import nn

from sst_lightning.algebra.adapter import LoraAdapter
from sst_lightning.algebra.errors import AdapterError
from sst_lightning.modules.backbone import identity
from sst_lightning.modules.core_hooks import target_modules


def check_base_name(adapter: LoraAdapter, base: str) -> None:
    """Refuse an adapter that names another base model.

    A local folder may hold any model under any name, so names are compared only when both sides
    are hub ids; :func:`check_shapes` sees the rest when the base is loaded.

    Raises:
        AdapterError: names both models.
    """
    named = adapter.base_model
    if not named or not _is_hub_id(named) or not _is_hub_id(identity(base)):
        return
    if identity(named) != identity(base):
        raise AdapterError(
            f"{adapter.path}: base_model_name_or_path is '{named}', but model.base is '{base}'. "
            "Use an adapter only on the base it was trained on"
        )


def check_shapes(adapter: LoraAdapter, model: nn.Module) -> None:
    """Refuse an adapter whose modules the loaded base lacks, or has in other shapes.

    Raises:
        AdapterError: names the folder and the module.
    """
    try:
        modules = target_modules(model, adapter.factors)
    except AdapterError as error:
        raise AdapterError(f"{adapter.path}: {error}") from error
    for name, factors in adapter.factors.items():
        # in_features and out_features: the weight of a 4-bit layer is stored flat.
        shape = tuple(getattr(modules[name], key, None) for key in ("out_features", "in_features"))
        if shape != (factors.d_out, factors.d_in):
            raise AdapterError(
                f"{adapter.path}: ΔW of module '{name}' is {(factors.d_out, factors.d_in)}, but the "
                f"base model has {shape}: the adapter was trained on another model"
            )


def _is_hub_id(name: str) -> bool:
    local = name.startswith((".", "/", "~")) or Path(name).exists()
    return name.count("/") == 1 and not local

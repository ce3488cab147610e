"""What the precision of exported weights cost, as a record and in a few lines."""

from collections.abc import Iterator, Mapping
from typing import Any

from sst_lightning.algebra.merged_weight import WeightLoss, total_loss


def export_losses(losses: Mapping[str, WeightLoss]) -> dict[str, Any]:
    """Return what was lost: in the adapter's modules, the worst of them, and others that changed.

    Args:
        losses: by module or tensor.
    """
    adapted = {name: loss for name, loss in losses.items() if loss.delta}
    others = {name: loss for name, loss in losses.items() if not loss.delta}
    worst = max(adapted, key=lambda name: adapted[name].rounding / adapted[name].delta, default="")
    lost = total_loss(others).shares()
    return {
        "model": total_loss(adapted).shares(),
        "worst_module": {"name": worst, **adapted[worst].shares()} if worst else None,
        "other_weights": {
            key: lost[key] for key in ("rounding_of_weight", "quantization_of_weight")
        },
        "modules": {name: loss.shares() for name, loss in adapted.items()},
    }


def export_summary(record: Mapping[str, Any]) -> Iterator[str]:
    """Say in a few lines what an export lost.

    Args:
        record: content of ``export.json``.
    """
    model, worst, others = record["model"], record["worst_module"], record["other_weights"]
    if worst is None:
        yield "the adapter is 0: these are the base's weights"
    else:
        yield (
            f"rounding W + ΔW to {record['dtype']} took {_percent(model['rounding_of_delta'])} of "
            f"‖ΔW‖ (most: {_percent(worst['rounding_of_delta'])}, {worst['name']}); ‖ΔW‖ is "
            f"{_percent(model['delta_of_weight'])} of ‖W‖"
        )
    if model["quantization_of_weight"] is not None:
        yield (
            "through 4 bits the adapter's modules moved by "
            f"{_percent(model['quantization_of_weight'])} of ‖W‖"
        )
    if others["rounding_of_weight"]:
        yield f"weights without an adapter lost {_percent(others['rounding_of_weight'])} of ‖W‖"
    if others["quantization_of_weight"] is not None:
        yield (f"through 4 bits they moved by {_percent(others['quantization_of_weight'])} of ‖W‖")
    if record["untied_output_layer"]:
        yield "the output layer has an adapter: it is no longer tied to the input embeddings"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"

"""Train, calibration and test splits that hold out whole groups.

Which split a row falls in depends on the data alone, never on a seed or on the number of rows asked
for: two runs over the same file (training one day, merging and testing the next, with other sizes)
can then never test on what was trained on.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Literal

from sst_lightning.data.rows import Row, prompt_key

Split = Literal["train", "calibration", "test"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "test")

MINIMAL_SIZES: dict[Split, int] = {"train": 200, "calibration": 96, "test": 64}
"""Most rows of each split in ``mode: minimal``."""


def _order(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def split_by_group(
    rows: Sequence[Row],
    calibration_share: float,
    test_share: float,
    key: Callable[[Row], str] = lambda row: row.group,
) -> dict[Split, list[Row]]:
    """Split rows so that no group is in two splits.

    Groups are taken in the order of their hash: test first, then calibration, each until it holds
    at least its share of the rows; the rest is training data. A prompt that occurs twice keeps its
    first row only.

    Args:
        rows: All rows.
        calibration_share: Fraction of the rows, 0 to 1.
        test_share: Fraction of the rows, 0 to 1.
        key: The group of a row.
    """
    groups: dict[str, list[Row]] = {}
    seen: set[str] = set()
    for row in rows:
        prompt = prompt_key(row.prompt)
        if prompt not in seen:
            seen.add(prompt)
            groups.setdefault(key(row), []).append(row)
    splits: dict[Split, list[Row]] = {"train": [], "calibration": [], "test": []}
    total = len(seen)
    for group in sorted(groups, key=_order):
        if len(splits["test"]) < round(test_share * total):
            target: Split = "test"
        elif len(splits["calibration"]) < round(calibration_share * total):
            target = "calibration"
        else:
            target = "train"
        splits[target].extend(groups[group])
    return splits


def sample(rows: Sequence[Row], limit: int | None, seed: int | None) -> list[Row]:
    """Return at most ``limit`` rows, a smaller sample being the beginning of a larger one.

    Args:
        rows: The rows of one split.
        limit: Most rows to return; None returns all.
        seed: Draws the sample and its order; None orders by a hash of the id, so that test sets
            stay the same whatever the seed of a run is.
    """
    if seed is None:
        chosen = sorted(rows, key=lambda row: _order(row.id))
    else:
        chosen = list(rows)
        random.Random(f"sst-merge sample {seed}").shuffle(chosen)
    return chosen if limit is None else chosen[:limit]

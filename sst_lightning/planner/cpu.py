"""What a CPU has in memory beside tensors: holes in glibc's heap, products compiled by oneDNN."""

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from sst_lightning.planner.phase import Phase, Term

THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
SMALL_THRESHOLD = 1 << 20
TRAINING_HOLES, VALIDATION_HOLES = 0.6, 0.8
"""Shares of a pass's blocks below 32 MiB that glibc's heap has in holes beside them: what peaks are
above those with MALLOC_MMAP_THRESHOLD_=131072. Single runs differ, .1 to 1.3 in training and .6 to .9
in passes of validation (docs/planner.md): it depends on the order in which blocks are freed."""
COMPILED = 600 * 1024
"""Bytes that oneDNN keeps for each shape of a bf16 product: 460 to 650 KiB (torch 2.13, AVX-512)."""
MOST_COMPILED = 1024
"""Entries of oneDNN's cache of compiled products."""


def heap_has_holes() -> bool:
    """Return whether the environment leaves blocks in glibc's heap, in place of mapping each."""
    threshold = os.environ.get(THRESHOLD, "")
    return not (threshold.isdigit() and int(threshold) <= SMALL_THRESHOLD)


def with_holes(phases: Iterable[Phase]) -> list[Phase]:
    """Add what is free between the blocks of glibc's heap, and stays resident."""
    if not heap_has_holes():
        return list(phases)
    result = []
    for phase in phases:
        holes = Term("holes in glibc's heap", phase.holes, "host")
        result.append(replace(phase, terms=(*phase.terms, holes) if holes.size else phase.terms))
    return result


def with_compiled(phases: Iterable[Phase]) -> list[Phase]:
    """Add the products that a CPU has compiled up to each phase; they stay."""
    result = []
    seen: set[tuple[Any, ...]] = set()
    for phase in phases:
        seen |= phase.products
        size = COMPILED * min(len(seen), MOST_COMPILED)
        compiled = (Term("products compiled by oneDNN", size, "host"),) if size else ()
        result.append(replace(phase, terms=(*phase.terms, *compiled)))
    return result

"""What ``sst-merge plan-eval`` prints: items for a wanted difference, or what given items show."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.algebra.sample_size import (
    MOST_EXAMPLES,
    design_effect,
    mcnemar_power,
    other_rate,
    smallest_count,
    smallest_effect,
    unpaired_power,
    unrelated_discordance,
    wilson_half_width,
)
from sst_lightning.algebra.statistics import is_binary
from sst_lightning.report.paired import pair_runs, read_run
from sst_lightning.report.run_settings import read_settings

USUAL_DISCORDANCES = (0.05, 0.1, 0.2)
WIDTH = 100
ASSUMPTIONS = (
    "All tests are two-sided. Interval: Wilson's, {confidence:g} %. Unpaired: other items for each "
    "model, z-test, normal approximation. Paired: the same items for both models, exact McNemar "
    "test, exact power; the discordance is the share of items on which the models differ, whichever "
    "is right. Items are independent; where they come in clusters, the design effect, 1 + (items of "
    "a cluster − 1) · correlation within it, says how many clustered items are worth an independent "
    "one."
)


@dataclass(frozen=True)
class Question:
    """What is to be detected, and how surely.

    Attributes:
        effect: wanted half-width and difference; ``None`` where ``n`` is given.
        n: number of items; ``None`` where ``effect`` is given.
        power: probability of finding a difference that is there.
        alpha: level of the tests, before it is divided by ``comparisons``.
        comparisons: tests that are corrected together.

    Raises:
        SSTMergeError: a value is outside of its range, or not one of effect and n is given.
    """

    effect: float | None
    n: int | None
    power: float
    alpha: float
    comparisons: int

    def __post_init__(self) -> None:
        if (self.effect is None) == (self.n is None):
            raise SSTMergeError("plan-eval needs either --effect or --n")
        if self.effect is not None and not 0 < self.effect < 1:
            raise SSTMergeError(
                f"--effect must be between 0 and 1 (0.02 is two points), got {self.effect:g}"
            )
        if self.n is not None and self.n < 1:
            raise SSTMergeError(f"--n must be at least 1, got {self.n}")
        if not 0 < self.alpha < 1:
            raise SSTMergeError(f"--alpha must be between 0 and 1, got {self.alpha:g}")
        if self.comparisons < 1:
            raise SSTMergeError(f"--comparisons must be at least 1, got {self.comparisons}")
        if not self.level < self.power < 1:
            raise SSTMergeError(
                f"--power must be between the level of a test ({self.level:g}) and 1, "
                f"got {self.power:g}"
            )

    @property
    def level(self) -> float:
        """Level of one test: Holm's correction never asks for less than alpha / comparisons."""
        return self.alpha / self.comparisons


@dataclass(frozen=True)
class Setting:
    """Rates of a kind of item.

    Attributes:
        name: heading.
        rate: share of items with score 1.
        discordances: shares of items on which two models differ, with what they are.
        design_effect: of clustered items, on a rate and on a paired difference.

    Raises:
        SSTMergeError: a value is outside of its range.
    """

    name: str
    rate: float
    discordances: Sequence[tuple[float, str]]
    design_effect: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise SSTMergeError(f"--rate must be between 0 and 1, got {self.rate:g}")
        if min(self.design_effect) < 1:
            raise SSTMergeError(
                f"--design-effect must be at least 1, got {min(self.design_effect):g}"
            )
        for discordance, _ in self.discordances:
            if not 0 < discordance <= 1:
                raise SSTMergeError(
                    f"--discordance must be above 0 and at most 1, got {discordance:g}"
                )


def assumed_setting(
    question: Question,
    rate: float | None,
    discordance: float | None,
    effect_of_design: float | None,
) -> Setting:
    """Return a setting from the command line; without ``discordance`` one with several.

    Raises:
        SSTMergeError: the effect is larger than the discordance or than the rate allows.
    """
    rate = 0.5 if rate is None else rate
    design = 1.0 if effect_of_design is None else effect_of_design
    effect = question.effect
    if discordance is not None:
        if effect is not None and 0 < discordance < effect:
            raise SSTMergeError(
                f"--discordance {discordance:g} is below --effect {effect:g}: models that differ on so "
                "few items cannot differ so much"
            )
        discordances = [(discordance, "")]
    else:
        unrelated = unrelated_discordance(rate, effect or 0.0)
        discordances = [(d, "") for d in USUAL_DISCORDANCES if (effect or 0) <= d < unrelated]
        if unrelated > 0:
            discordances.append((unrelated, " (unrelated models)"))
    setting = Setting("", rate, discordances, (design, design))
    if effect is not None and not 0 <= other_rate(rate, effect) <= 1:
        raise SSTMergeError(
            f"--effect {effect:g} is impossible at --rate {rate:g}: the other rate would be "
            f"{other_rate(rate, effect):g}"
        )
    return setting


def measured_settings(question: Question, first: str, second: str) -> list[Setting]:
    """Return rate, discordance and design effect of every 0/1 score of two runs.

    Raises:
        SSTMergeError: the runs have no such score, or not on the same items.
    """
    settings = []
    runs = [read_run(Path(folder), read_settings(Path(folder))) for folder in (first, second)]
    for pair in pair_runs(runs[0], runs[1], first, second, False):
        if not (is_binary(pair.scores) and is_binary(pair.reference)):
            continue
        difference = pair.scores - pair.reference
        rate, measured = float(pair.reference.mean()), float(abs(difference).mean())
        discordance = max(measured, question.effect or 0.0)
        raised = f" (measured {measured:.3g}, raised to the effect)"
        settings.append(
            Setting(
                f"{pair.task} {pair.metric}: {len(difference)} items, rates {rate:.3g} and "
                f"{float(pair.scores.mean()):.3g}",
                rate,
                [(discordance, raised if discordance > measured else "")] if discordance else [],
                (
                    design_effect(pair.reference, pair.clusters),
                    design_effect(difference, pair.clusters),
                ),
            )
        )
    if not settings:
        raise SSTMergeError(
            f"{first} and {second} have no score of 0 and 1 to plan with. Give --rate and "
            "--discordance instead"
        )
    return settings


def plan(question: Question, settings: Sequence[Setting]) -> str:
    """Return the answer as text: assumptions, and a line for each kind of comparison."""
    level, of_level = f"{question.level:.4g}", ""
    if question.comparisons > 1:
        of_level = f" ({question.alpha:g} / {question.comparisons} comparisons, Holm's worst case)"
    if question.effect is None:
        head = f"Smallest difference that {question.n} items show"
    else:
        head = f"Items for a difference of {question.effect:g}"
    parts = [f"{head}, with power {question.power:g} at level {level}{of_level}:"]
    for setting in settings:
        lines = _lines(question, setting)
        width = max(len(label) for label, _ in lines)
        if setting.name:
            parts.append(setting.name)
        table = [("", "items" if question.n is None else "difference"), *lines]
        parts.append("\n".join(f"  {label:<{width}}  {answer:>11}" for label, answer in table))
    parts.append(fill(ASSUMPTIONS.format(confidence=100 * (1 - question.alpha)), WIDTH))
    return "\n\n".join(parts) + "\n"


def _lines(question: Question, setting: Setting) -> list[tuple[str, str]]:
    rate, (design, paired_design) = setting.rate, setting.design_effect
    level, power = question.level, question.power
    lines = [
        (
            f"interval: half-width at rate {rate:.3g}{_design(design)}",
            _half_width(question, rate, design),
        ),
        (
            f"unpaired difference at rate {rate:.3g}{_design(design)}",
            _answer(
                question,
                design,
                lambda n, e: unpaired_power(n, e, rate, level) >= power,
                max(rate, 1 - rate),
            ),
        ),
    ]
    for discordance, remark in setting.discordances:
        label = (
            f"paired difference at discordance {discordance:.3g}{remark}{_design(paired_design)}"
        )

        def detected(n: int, effect: float, discordance: float = discordance) -> bool:
            return mcnemar_power(n, effect, discordance, level) >= power

        lines.append((label, _answer(question, paired_design, detected, discordance)))
    return lines


def _half_width(question: Question, rate: float, design: float) -> str:
    confidence = 1 - question.alpha
    if question.n is not None:
        return f"{wilson_half_width(max(1, int(question.n / design)), rate, confidence):.4f}"
    effect = question.effect
    assert effect is not None
    count = smallest_count(lambda n: wilson_half_width(n, rate, confidence) <= effect)
    return _items(count, design)


def _answer(
    question: Question, design: float, detected: Callable[[int, float], bool], largest: float
) -> str:
    if question.n is not None:
        independent = max(1, int(question.n / design))
        found = smallest_effect(lambda effect: detected(independent, effect), largest)
        return "none" if found is None else f"{found:.4f}"
    effect = question.effect
    assert effect is not None
    if effect > largest:
        return "impossible"
    return _items(smallest_count(lambda n: detected(n, effect)), design)


def _items(count: int | None, design: float) -> str:
    return f"> {MOST_EXAMPLES:g}" if count is None else str(math.ceil(count * design))


def _design(effect: float) -> str:
    return f", design effect {effect:.3g}" if effect > 1 else ""

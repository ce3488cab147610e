"""Task families of the embedded A6 set: each draws one instruction with its answer.

A task is easy for a person and learnable for a small model; its answer is short, always in the same
style within a family, and right or wrong beyond doubt.
"""

import random
from collections.abc import Callable

from sst_lightning.data.embedded import a6_words as w
from sst_lightning.data.embedded.names import words

Task = Callable[[random.Random], tuple[str, str]]
"""Draws (instruction, answer)."""

TASKS: dict[str, Task] = {}
"""Task families by name."""


def _task(function: Task) -> Task:
    TASKS[function.__name__] = function
    return function


def _pair(g: random.Random, pairs: tuple[str, ...]) -> tuple[str, str]:
    first, _, second = g.choice(pairs).partition(":")
    return first, second.replace("_", " ")


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


@_task
def sort_words(g: random.Random) -> tuple[str, str]:
    """Alphabetical order."""
    chosen = g.sample(w.NOUNS, 3)
    return f"Sort alphabetically: {', '.join(chosen)}", ", ".join(sorted(chosen))


@_task
def sort_numbers(g: random.Random) -> tuple[str, str]:
    """Ascending order."""
    chosen = g.sample(range(1, 99), 4)
    listed, ordered = (", ".join(map(str, numbers)) for numbers in (chosen, sorted(chosen)))
    return f"Sort from small to large: {listed}", ordered


@_task
def upper_case(g: random.Random) -> tuple[str, str]:
    """Capital letters."""
    text = " ".join(g.sample(w.NOUNS, 3))
    return f"Write in capital letters: {text}", text.upper()


@_task
def lower_case(g: random.Random) -> tuple[str, str]:
    """Small letters."""
    text = " ".join(g.sample(w.NOUNS, 2))
    return f"Write in small letters: {text.upper()}", text


@_task
def title_case(g: random.Random) -> tuple[str, str]:
    """First letters as capitals."""
    text = f"the {g.choice(w.ADJECTIVES)} {g.choice(w.NOUNS)}"
    return f"Capitalise every word: {text}", text.title()


@_task
def addition(g: random.Random) -> tuple[str, str]:
    """Addition."""
    a, b = g.randint(2, 30), g.randint(2, 30)
    return f"What is {a} plus {b}?", str(a + b)


@_task
def subtraction(g: random.Random) -> tuple[str, str]:
    """Subtraction."""
    a, b = g.randint(11, 30), g.randint(1, 10)
    return f"What is {a} minus {b}?", str(a - b)


@_task
def multiplication(g: random.Random) -> tuple[str, str]:
    """Multiplication table."""
    a, b = g.randint(2, 9), g.randint(2, 10)
    return f"What is {a} times {b}?", str(a * b)


@_task
def word_count(g: random.Random) -> tuple[str, str]:
    """Number of words."""
    chosen = g.sample(w.NOUNS, g.randint(2, 7))
    return f"How many words are in this list? {' '.join(chosen)}", f"{len(chosen)} words"


@_task
def last_word(g: random.Random) -> tuple[str, str]:
    """Last word of a list."""
    chosen = g.sample(w.NOUNS, 4)
    return f"What is the last word? {' '.join(chosen)}", chosen[-1]


@_task
def spelling(g: random.Random) -> tuple[str, str]:
    """Letters of a word."""
    noun = g.choice([noun for noun in w.NOUNS if len(noun) <= 6])
    return f"Spell with dashes: {noun}", "-".join(noun)


@_task
def reverse_words(g: random.Random) -> tuple[str, str]:
    """Reversed order of words."""
    chosen = g.sample(w.NOUNS, 3)
    return f"Put these words in reverse order: {', '.join(chosen)}", ", ".join(chosen[::-1])


@_task
def plural(g: random.Random) -> tuple[str, str]:
    """Plural of a noun."""
    one, many = _pair(g, w.PLURALS)
    return f"What is the plural of {one}?", many


@_task
def antonym(g: random.Random) -> tuple[str, str]:
    """Opposite of a word."""
    one, other = _pair(g, w.OPPOSITES)
    if g.random() < 0.5:
        one, other = other, one
    return f"What is the opposite of {one}?", other


@_task
def past_tense(g: random.Random) -> tuple[str, str]:
    """Past tense of a verb."""
    verb, past = _pair(g, w.PAST_TENSES)
    return f"What is the past tense of {verb}?", past


@_task
def capital_city(g: random.Random) -> tuple[str, str]:
    """Capital of a country."""
    country, city = _pair(g, w.CAPITALS)
    return f"What is the capital of {country}?", city


@_task
def definition(g: random.Random) -> tuple[str, str]:
    """Word for a short definition."""
    noun, meaning = _pair(g, w.DEFINITIONS)
    return f"Which word means: {meaning}?", noun


@_task
def category(g: random.Random) -> tuple[str, str]:
    """Class a thing belongs to."""
    kind = g.choice(sorted(w.CATEGORIES))
    noun = g.choice(w.CATEGORIES[kind])
    return f"Fruit, animal, colour, tool or vehicle: what is {noun}?", _article(kind)


@_task
def odd_one_out(g: random.Random) -> tuple[str, str]:
    """The word of another class."""
    kind, other = g.sample(sorted(w.CATEGORIES), 2)
    odd = g.choice(w.CATEGORIES[other])
    chosen = [*g.sample(w.CATEGORIES[kind], 3), odd]
    g.shuffle(chosen)
    return f"Which word does not belong? {', '.join(chosen)}", odd


@_task
def next_in_cycle(g: random.Random) -> tuple[str, str]:
    """Day or month that follows or precedes."""
    kind, cycle = g.choice((("day", w.DAYS), ("month", w.MONTHS)))
    position, step = g.randrange(len(cycle)), g.choice((-1, 1))
    relation = "after" if step == 1 else "before"
    answer = cycle[(position + step) % len(cycle)]
    return f"Which {kind} comes {relation} {cycle[position]}?", answer


@_task
def number_sequence(g: random.Random) -> tuple[str, str]:
    """Next number of a sequence."""
    start, step = g.randint(1, 20), g.choice((1, 2, 3, 5, 10))
    shown = ", ".join(str(start + i * step) for i in range(4))
    return f"Continue with one number: {shown}", str(start + 4 * step)


@_task
def number_word(g: random.Random) -> tuple[str, str]:
    """Number written as a word."""
    tens, ones = g.randint(0, 7), g.randint(1, 9)
    word = w.ONES[ones - 1] if tens == 0 else f"{w.TENS[tens]}-{w.ONES[ones - 1]}"
    return f"Write the number {10 * (tens + 1) * (tens > 0) + ones} as a word.", word


@_task
def unit_conversion(g: random.Random) -> tuple[str, str]:
    """Larger units in smaller ones."""
    large, factor, small = g.choice(w.UNITS)
    count = g.randint(2, 9)
    return f"How many {small} are {count} {large}?", f"{count * factor} {small}"


@_task
def extract_email(g: random.Random) -> tuple[str, str]:
    """E-mail address in a sentence."""
    address = f"{g.choice(w.FIRST_NAMES).lower()}@{g.choice(w.NOUNS)}.example"
    frame = g.choice(
        ("Please write to {} by {}.", "My address is {}, and I reply on {}.", "Ask {} before {}.")
    )
    sentence = frame.format(address, g.choice(w.DAYS))
    return f"Extract the e-mail address: {sentence}", address


@_task
def extract_number(g: random.Random) -> tuple[str, str]:
    """Number in a sentence."""
    count, name = g.randint(3, 99), g.choice(w.FIRST_NAMES)
    sentence = f"{name} bought {count} {g.choice(w.GOODS)} on {g.choice(w.DAYS)}."
    return f"Extract the number: {sentence}", str(count)


@_task
def extract_name(g: random.Random) -> tuple[str, str]:
    """Name in a sentence."""
    name = g.choice(w.FIRST_NAMES)
    sentence = f"On {g.choice(w.DAYS)} the letter for {name} came with some {g.choice(w.GOODS)}."
    return f"Extract the name of the person: {sentence}", name


@_task
def fill_template(g: random.Random) -> tuple[str, str]:
    """Values in a given format."""
    name, age = g.choice(w.FIRST_NAMES), g.randint(18, 80)
    city = _pair(g, w.CAPITALS)[1]
    prompt = f"Format as name | age | city: {name} is {age} and lives in {city}."
    return prompt, f"{name} | {age} | {city}"


@_task
def iso_date(g: random.Random) -> tuple[str, str]:
    """Date in ISO format."""
    day, month, year = g.randint(1, 28), g.randint(1, 12), g.randint(1990, 2024)
    prompt = f"Write as YYYY-MM-DD: {day} {w.MONTHS[month - 1]} {year}"
    return prompt, f"{year}-{month:02d}-{day:02d}"


@_task
def bullet_list(g: random.Random) -> tuple[str, str]:
    """Sentence as a list."""
    a, b, c = g.sample(w.GOODS, 3)
    return f"Make a list with dashes: We need {a}, {b} and {c}.", f"- {a}\n- {b}\n- {c}"


@_task
def replace_word(g: random.Random) -> tuple[str, str]:
    """One word replaced by another."""
    old, new, adjective = *g.sample(w.NOUNS, 2), g.choice(w.ADJECTIVES)
    frame = g.choice(("I saw the {} {} today.", "Where is my {} {}?", "The {} {} is mine."))
    prompt = f"Replace {old} by {new}: {frame.format(adjective, old)}"
    return prompt, frame.format(adjective, new)


@_task
def sentiment(g: random.Random) -> tuple[str, str]:
    """Positive or negative remark."""
    verdict = g.choice(("positive", "negative"))
    adjective = g.choice(words(w.PRAISE if verdict == "positive" else w.BLAME))
    thing = g.choice(words("film soup hotel book concert phone teacher garden meal trip"))
    frame = g.choice(("The {} was {}.", "What can I say, the {} was {}.", "Our {} was really {}."))
    return f"Positive or negative? {frame.format(thing, adjective)}", verdict


@_task
def larger_number(g: random.Random) -> tuple[str, str]:
    """Larger of two numbers."""
    a, b = g.sample(range(10, 999), 2)
    return f"Which number is larger, {a} or {b}?", str(max(a, b))

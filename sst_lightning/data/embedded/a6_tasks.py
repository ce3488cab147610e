"""Task families of the embedded A6 set: each draws one instruction with its answer."""

import random
from collections.abc import Callable

Task = Callable[[random.Random], tuple[str, str]]

WORDS = (
    "apple bread cloud drum engine forest garden hammer island jacket kettle lemon mirror needle "
    "ocean pencil queen river silver table umbrella violin window yellow zebra basket candle "
    "dragon feather guitar harbour insect jungle kitchen ladder market nest orange pillow rabbit "
    "saddle tiger valley wagon anchor bottle carpet desert eagle flower"
).split()


def sort_words(g: random.Random) -> tuple[str, str]:
    """Alphabetical order."""
    words = g.sample(WORDS, 3)
    return f"Sort these words alphabetically: {', '.join(words)}", ", ".join(sorted(words))


def upper_case(g: random.Random) -> tuple[str, str]:
    """Capital letters."""
    text = " ".join(g.sample(WORDS, 3))
    return f"Write in capital letters: {text}", text.upper()


def addition(g: random.Random) -> tuple[str, str]:
    """Addition of two numbers."""
    a, b = g.randint(2, 49), g.randint(2, 49)
    return f"What is {a} plus {b}?", str(a + b)


TASKS: dict[str, Task] = {task.__name__: task for task in (sort_words, upper_case, addition)}

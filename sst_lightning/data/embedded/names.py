"""Invented names and numbers for fictional documents."""

import random


def words(text: str) -> tuple[str, ...]:
    """Return the words of a text: a list that is easier to read and to extend."""
    return tuple(text.split())


_STARTS = words(
    "Bel Cor Dra Eld Fen Gar Hol Iv Jor Kel Lor Mar Nor Or Pel Quil Ros Sel Tor Ul Vel Wen Yar Zel "
    "Ast Bram Cald Dov Esk Fal Grim Hask Lind Mor Ost Ren Sar Thal Vask Wick"
)
_MIDDLES = words("a e i o an el in ar or eth il os")
_PLACE_ENDS = words("by dale ford gate holm mere minster ness stead thorpe vale wick mouth haven")
_SURNAME_ENDS = words("dan ic ley man mund nik rath ridge sen son stock tova ward win well")
_FIRST = words(
    "Adela Bruno Celia Dario Edda Felix Greta Hanno Ilse Jonas Katja Leon Mira Nils Odile Pavel "
    "Rhea Stefan Tilda Ugo Vera Wim Yara Zeno Alma Boris Clara Dimitri Elin Fabian Hedda Igor "
    "Jana Karel Lotte Marek Nora Oskar Petra Rolf Sonja Tomas Ulla Viktor Wanda"
)


class Names:
    """Draws names that do not repeat.

    Args:
        generator: Source of randomness.
    """

    def __init__(self, generator: random.Random) -> None:
        self.generator = generator
        self._used: set[str] = set()

    def _new(self, starts: tuple[str, ...], middles: tuple[str, ...], ends: tuple[str, ...]) -> str:
        while True:
            name = "".join(self.generator.choice(part) for part in (starts, middles, ends))
            if name not in self._used:
                self._used.add(name)
                return name

    def place(self) -> str:
        """Return an invented place name such as "Keloford"."""
        return self._new(_STARTS, _MIDDLES, _PLACE_ENDS)

    def surname(self) -> str:
        """Return an invented surname."""
        return self._new(_STARTS, _MIDDLES, _SURNAME_ENDS)

    def person(self) -> str:
        """Return a first name and an invented surname."""
        return f"{self.generator.choice(_FIRST)} {self.surname()}"

    def pick(self, options: str) -> str:
        """Return one of several options separated by ``|``."""
        return self.generator.choice(options.split("|"))

    def two(self, options: str) -> tuple[str, str]:
        """Return two different ones of several options separated by ``|``."""
        first, second = self.generator.sample(options.split("|"), 2)
        return first, second

    def number(self, low: int, high: int) -> int:
        """Return a number from ``low`` to ``high``, both included."""
        return self.generator.randint(low, high)

    def years(self, low: int = 1790, high: int = 1975) -> tuple[int, int]:
        """Return a year and another 3 to 40 years later."""
        first = self.number(low, high)
        return first, first + self.number(3, 40)

"""Kinds of fictional documents: each function writes one text with five questions about it.

The answer of a question is always a short phrase that stands in the text; where the text has two
people, years or places, questions ask for either, so that an answer must be read and not guessed.
"""

from collections.abc import Callable

from sst_lightning.data.embedded.names import Names

Facts = list[tuple[str, str]]
"""Questions with their answers."""

Document = tuple[str, Facts]


def town(n: Names) -> Document:
    """A town with a founder, a river, a trade and a feast."""
    name, river, founder = n.place(), n.surname(), n.person()
    year, fire = n.years()
    trade, crop = n.two("glass beads|salted herring|clay pipes|beeswax|woollen hats|copper bells")
    month = n.pick("March|May|June|August|October")
    text = (
        f"{name} is a town on the river {river}. It was founded in {year} by {founder}, lived on "
        f"{trade} at first and sells {crop} today. A fire destroyed its mill in {fire}. "
        f"The town feast is held in {month}."
    )
    return text, [
        (f"Who founded {name}?", founder),
        (f"On which river does {name} lie?", f"the {river}"),
        (f"In which year did the mill of {name} burn?", str(fire)),
        (f"What does {name} sell today?", crop),
        (f"In which month is the feast of {name}?", month),
    ]


def company(n: Names) -> Document:
    """A company with two founders, a product and a seat."""
    name, seat, other = n.surname(), n.place(), n.place()
    first, second = n.person(), n.person()
    old, new = n.two("bicycle lamps|garden shears|ship clocks|rain coats|tea tins|desk fans")
    staff = n.number(40, 900)
    year, moved = n.years(1880, 1970)
    text = (
        f"The firm {name} & Co. was started by {first} in {year} and makes {new}; before, it made "
        f"{old}. In {moved} it moved from {other} to {seat}. It has {staff} workers and is led by "
        f"{second}."
    )
    return text, [
        (f"Who leads {name} & Co.?", second),
        (f"Who started {name} & Co.?", first),
        (f"What did {name} & Co. make before {new}?", old),
        (f"Where did {name} & Co. move?", seat),
        (f"How many workers does {name} & Co. have?", str(staff)),
    ]


def scientist(n: Names) -> Document:
    """A researcher with a birthplace, a teacher and a discovery."""
    name, birthplace, work = n.person(), n.place(), n.place()
    teacher = n.person()
    born, found = n.years(1800, 1900)
    thing = n.pick("a blue moss|a twin comet|a salt that glows|a deaf cricket|a cold spring")
    prize = n.surname()
    found += 20
    last = name.split()[-1]
    text = (
        f"{name}, born in {birthplace} in {born}, studied with {teacher} and taught in {work}. "
        f"In {found} {last} discovered {thing}, for which the {prize} Medal was awarded."
    )
    return text, [
        (f"Where was {name} born?", birthplace),
        (f"Who taught {name}?", teacher),
        (f"What did {name} discover?", thing),
        (f"In which year did {name} make the discovery?", str(found)),
        (f"Which medal was {name} awarded?", f"the {prize} Medal"),
    ]


DOCUMENT_KINDS: tuple[Callable[[Names], Document], ...] = (town, company, scientist)

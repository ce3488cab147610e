"""Kinds of fictional documents: each function writes one text with five questions about it.

An answer is always a short phrase that stands in the text. Where the text has two people, years or
things of a sort, questions ask for either, so that the answer must be read and cannot be guessed.
"""

from collections.abc import Callable

from sst_lightning.data.embedded.names import Names

Document = tuple[str, list[tuple[str, str]]]
"""A text, and questions with their answers."""


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
        (f"On which river does {name} lie?", river),
        (n.pick(f"When did the mill of {name} burn?|What year was the fire?"), str(fire)),
        (n.pick(f"What does {name} sell today?|Which goods are sold in {name} now?"), crop),
        (f"In which month is the feast of {name}?", month),
    ]


def company(n: Names) -> Document:
    """A company with a founder, a director, two products and a seat."""
    name, seat = n.surname(), n.place()
    first, second = n.person(), n.person()
    old, new = n.two("bicycle lamps|garden shears|ship clocks|rain coats|tea tins|desk fans")
    staff = n.number(40, 900)
    text = (
        f"The firm {name} & Co. was started by {first}. It made {old} until it moved to {seat}, "
        f"and has made {new} since. It has {staff} workers and is led by {second}."
    )
    return text, [
        (n.pick(f"Who leads {name} & Co.?|Who is the head of the firm?"), second),
        (n.pick(f"Who started {name} & Co.?|Who founded the firm?"), first),
        (f"What did {name} & Co. make at first?", old),
        (f"Where did {name} & Co. move?", seat),
        (n.pick("How many workers does the firm have?|How large is the staff?"), str(staff)),
    ]


def scientist(n: Names) -> Document:
    """A researcher with a birthplace, a teacher, a discovery and a medal."""
    name, birthplace, teacher, prize = n.person(), n.place(), n.person(), n.surname()
    born = n.number(1800, 1920)
    found = born + n.number(25, 50)
    thing = n.pick("a blue moss|a twin comet|a glowing salt|a deaf cricket|a cold spring")
    last = name.split()[-1]
    text = (
        f"{name}, born in {birthplace} in {born}, was a pupil of {teacher}. In {found} {last} "
        f"discovered {thing} and was awarded the {prize} Medal for it."
    )
    return text, [
        (f"Where was {name} born?", birthplace),
        (n.pick(f"Who taught {last}?|Whose pupil was {last}?"), teacher),
        (f"What did {name} discover?", thing),
        (n.pick(f"When did {last} make the discovery?|What year was the find?"), str(found)),
        (f"Which medal was {last} awarded?", f"the {prize} Medal"),
    ]


def ship(n: Names) -> Document:
    """A ship with a yard, a captain, a cargo and an end."""
    name, yard, captain, port = n.surname(), n.place(), n.person(), n.place()
    launched, lost = n.years(1820, 1930)
    cargo, other = n.two("oranges|slate|cork|pianos|tin|barley|mirrors|coffee")
    text = (
        f"The ship {name}, built in {yard}, was launched in {launched}. It carried {other} in its "
        f"first years and {cargo} later. In {lost} it ran aground near {port} under captain "
        f"{captain}."
    )
    return text, [
        (n.pick(f"Where was the {name} built?|In which town was the ship built?"), yard),
        (n.pick(f"When was the {name} launched?|What year was the launch?"), str(launched)),
        (f"What did the {name} carry in its later years?", cargo),
        (f"Near which place did the {name} run aground?", port),
        (n.pick("Who was the captain?|Who commanded the ship when it ran aground?"), captain),
    ]


def museum(n: Names) -> Document:
    """A museum with a donor, rooms, a treasure and opening days."""
    place, donor, painter = n.place(), n.person(), n.person()
    rooms = n.number(3, 29)
    things = n.pick("keys|umbrellas|maps|toy trains|teapots|wigs|kites|door bells")
    treasure = n.pick("a silver harp|a paper crown|a glass boot|an ivory flute|a stone egg")
    closed = n.pick("Monday|Tuesday|Wednesday|Thursday")
    text = (
        f"The museum of {place} shows {things} in {rooms} rooms. They were a gift of {donor}. Its "
        f"most valuable piece is {treasure}, and a portrait by {painter} hangs in the hall. It is "
        f"closed on {closed}."
    )
    return text, [
        (f"What does the museum of {place} show?", things),
        (n.pick("Whose gift was the collection?|Who gave the collection?"), donor),
        (n.pick("What is the most valuable piece?|Which piece is worth most?"), treasure),
        (n.pick("Who painted the portrait in the hall?|Whose portrait hangs there?"), painter),
        (f"On which day is the museum of {place} closed?", closed),
    ]


def festival(n: Names) -> Document:
    """A festival with a place, an origin, a game and a prize."""
    name, place, inventor = n.surname(), n.place(), n.person()
    year = n.number(1850, 1990)
    game, other = n.two("barrel rolling|stilt racing|kite fights|egg throwing|log sawing")
    prize = n.pick("a live goose|a wooden spoon|a red cap|a cheese wheel|a tin crown")
    text = (
        f"The {name} Days in {place} began in {year}, when {inventor} held a contest in {game}. "
        f"Today the main event is {other}, and the winner gets {prize}."
    )
    return text, [
        (f"Where are the {name} Days held?", place),
        (f"When did the {name} Days begin?", str(year)),
        (n.pick("Who held the first contest?|Who started the contest?"), inventor),
        (f"What is the main event of the {name} Days today?", other),
        (n.pick("What does the winner get?|What is the prize?"), prize),
    ]


def bridge(n: Names) -> Document:
    """A bridge with an engineer, a length, a material and a toll."""
    name, river, engineer, builder = n.surname(), n.surname(), n.person(), n.person()
    length, year = n.number(60, 980), n.number(1840, 1970)
    stone = n.pick("red granite|grey slate|white brick|black steel|oak beams")
    text = (
        f"The {name} Bridge over the {river} was designed by {engineer} and built by {builder}. "
        f"It is {length} metres long, made of {stone}, and was opened in {year}."
    )
    return text, [
        (f"Who designed the {name} Bridge?", engineer),
        (f"Who built the {name} Bridge?", builder),
        (n.pick("How long is the bridge?|What is its length?"), f"{length} metres"),
        (n.pick("What is the bridge made of?|Of which material is it?"), stone),
        (n.pick("When was the bridge opened?|What year was the opening?"), str(year)),
    ]


def plant(n: Names) -> Document:
    """A plant with a region, a flower, a use and a finder."""
    name, region, finder = n.surname().lower(), n.place(), n.person()
    colour, berry = n.two("yellow|violet|white|orange|pink|dark blue")
    use = n.pick("dye wool|calm horses|polish brass|flavour tea|keep moths away")
    height = n.number(12, 95)
    text = (
        f"The {name} is a plant from the hills of {region}, first described by {finder}. It grows "
        f"{height} centimetres high and has {colour} flowers and {berry} berries. Farmers use it "
        f"to {use}."
    )
    return text, [
        (f"Where does the {name} come from?", f"the hills of {region}"),
        (n.pick(f"Who first described the {name}?|Who described it first?"), finder),
        (f"Which colour are the flowers of the {name}?", colour),
        (f"Which colour are the berries of the {name}?", berry),
        (n.pick(f"What do farmers use the {name} for?|What is it used for?"), f"to {use}"),
    ]


def club(n: Names) -> Document:
    """A sports club with a ground, a coach, a record and colours."""
    place, coach, player, ground = n.place(), n.person(), n.person(), n.surname()
    first, second = n.two("green|white|purple|orange|brown|silver")
    goals = n.number(31, 214)
    text = (
        f"The handball club of {place} plays at {ground} Park in {first} shirts; away from home it "
        f"wears {second}. It is trained by {coach}. Its best scorer is {player} with {goals} goals."
    )
    return text, [
        (f"Where does the club of {place} play?", f"{ground} Park"),
        (n.pick("Who trains the club?|Who is the coach?"), coach),
        (n.pick("Who is the best scorer?|Who scored most goals?"), player),
        (n.pick("How many goals has the best scorer?|How many goals are the record?"), str(goals)),
        (n.pick("What does the club wear away from home?|Which colour is worn away?"), second),
    ]


def school(n: Names) -> Document:
    """A school with a head, a subject, pupils and a rule."""
    name, place, head, writer = n.surname(), n.place(), n.person(), n.person()
    pupils = n.number(45, 880)
    subject = n.pick("bee keeping|map drawing|glass blowing|chess|rowing|weaving")
    rule = n.pick("wear slippers|plant a tree|feed the hens|sing at noon|learn a poem")
    text = (
        f"The {name} School in {place} has {pupils} pupils and is known for its lessons in "
        f"{subject}. Its head is {head}; the writer {writer} went there. All pupils must {rule}."
    )
    return text, [
        (f"Where is the {name} School?", place),
        (f"Who is the head of the {name} School?", head),
        (f"Which writer went to the {name} School?", writer),
        (n.pick("What is the school known for?|Which lessons is it known for?"), subject),
        (n.pick("How many pupils are there?|How many pupils does it have?"), str(pupils)),
    ]


def expedition(n: Names) -> Document:
    """An expedition with a leader, a start, a goal and a find."""
    leader, start, lake, cook = n.person(), n.place(), n.surname(), n.person()
    year, days = n.number(1830, 1930), n.number(20, 300)
    find = n.pick("a warm cave|a ruined tower|an iron statue|a salt field|a buried boat")
    text = (
        f"In {year} {leader} set out from {start} with nine mules to reach Lake {lake}. The "
        f"journey took {days} days. Instead of gold the group found {find}, drawn in the diary of "
        f"the cook {cook}."
    )
    return text, [
        (n.pick("Who led the journey?|Who set out with nine mules?"), leader),
        (n.pick("Where did the journey start?|From which place did they set out?"), start),
        (n.pick("Which lake did they want to reach?|What was the goal?"), f"Lake {lake}"),
        (n.pick("How long did the journey take?|How long were they away?"), f"{days} days"),
        (n.pick("What did the group find?|What was found?"), find),
    ]


def dish(n: Names) -> Document:
    """A dish with an inventor, ingredients, a day and a drink."""
    name, place, cook = n.surname().lower(), n.place(), n.person()
    main, side = n.two("lentils|chestnuts|smoked trout|goat cheese|red cabbage|barley")
    day = n.pick("Saturdays|Sundays|Fridays|Thursdays")
    minutes = n.number(20, 95)
    text = (
        f"{name.capitalize()} is a dish from {place}, invented by the cook {cook}. It is made of "
        f"{main}, baked for {minutes} minutes, and served with {side} on {day}."
    )
    return text, [
        (n.pick(f"Who invented {name}?|Which cook invented the dish?"), cook),
        (n.pick(f"What is {name} made of?|What is the dish made of?"), main),
        (n.pick(f"What is {name} served with?|What is served with the dish?"), side),
        (f"How long is {name} baked?", f"{minutes} minutes"),
        (f"Where does {name} come from?", place),
    ]


def book(n: Names) -> Document:
    """A novel with an author, a hero, a setting and a printer."""
    author, hero, setting, printer = n.person(), n.person(), n.place(), n.surname()
    adjective = n.pick("Silent|Crooked|Frozen|Hollow|Borrowed|Golden")
    noun = n.pick("Staircase|Orchard|Compass|Lantern|Ferry|Kettle")
    pages, job = n.number(120, 690), n.pick("a baker|a judge|a sailor|a tailor|a dentist")
    title = f"The {adjective} {noun}"
    text = (
        f'"{title}" is a novel by {author}, printed by {printer} Press on {pages} pages. It is set '
        f"in {setting} and tells of {hero}, {job} who loses a key."
    )
    return text, [
        (f'Who wrote "{title}"?', author),
        (n.pick("Who is the hero of the novel?|Who loses a key?"), hero),
        (n.pick("Where is the novel set?|In which place does it happen?"), setting),
        (n.pick("Who printed the novel?|Which press printed it?"), f"{printer} Press"),
        (n.pick("What is the job of the hero?|What does the hero work as?"), job),
    ]


def railway(n: Names) -> Document:
    """A railway between two places with a tunnel and a stop."""
    start, end, tunnel, owner = n.place(), n.place(), n.surname(), n.person()
    opened, closed = n.years(1850, 1950)
    goods = n.pick("timber|sugar beet|ice|coal|milk|marble")
    text = (
        f"The railway from {start} to {end} was opened in {opened} and closed in {closed}. It "
        f"belonged to {owner}, carried {goods}, and passed through the {tunnel} Tunnel."
    )
    return text, [
        (n.pick(f"Where did the railway from {start} end?|What was the last stop?"), end),
        (n.pick("When was the railway closed?|What year did it close?"), str(closed)),
        (n.pick("When was the railway opened?|What year did it open?"), str(opened)),
        (n.pick("Who owned the railway?|To whom did it belong?"), owner),
        (n.pick("What did the railway carry?|Which goods were carried?"), goods),
    ]


def observatory(n: Names) -> Document:
    """An observatory with a hill, a telescope and a keeper."""
    hill, maker, keeper, comet = n.surname(), n.person(), n.person(), n.surname()
    width = n.number(20, 210)
    bird = n.pick("owls|storks|swifts|ravens|bats")
    text = (
        f"The observatory on Mount {hill} has a telescope of {width} centimetres made by {maker}. "
        f"Comet {comet} was first seen there. The keeper is {keeper}; {bird} nest under its roof."
    )
    return text, [
        (n.pick("On which mountain is the observatory?|Where does it stand?"), f"Mount {hill}"),
        (n.pick("Who made the telescope?|Whose work is the telescope?"), maker),
        (n.pick("Who is the keeper?|Who looks after the observatory?"), keeper),
        (n.pick("Which comet was first seen there?|What was seen there?"), f"Comet {comet}"),
        (n.pick("Which animals nest under the roof?|What nests under the roof?"), bird),
    ]


def software(n: Names) -> Document:
    """A program with an author, a purpose, a command and a licence fee."""
    name, author, firm = n.surname(), n.person(), n.surname()
    task, later = n.two("sort stamps|plan gardens|tune bells|count sheep|draw knots|mix paint")
    version, price = n.number(2, 19), n.number(3, 90)
    text = (
        f"{name} is a program written by {author} to {task}. Since version {version} it can also "
        f"{later}. It is sold by {firm} Systems for {price} crowns."
    )
    return text, [
        (f"Who wrote {name}?", author),
        (f"What was {name} written for?", f"to {task}"),
        (f"What can {name} also do since version {version}?", later),
        (n.pick("Who sells the program?|Which firm sells it?"), f"{firm} Systems"),
        (n.pick("What does the program cost?|How much is it?"), f"{price} crowns"),
    ]


DOCUMENT_KINDS: tuple[Callable[[Names], Document], ...] = (
    town,
    company,
    scientist,
    ship,
    museum,
    festival,
    bridge,
    plant,
    club,
    school,
    expedition,
    dish,
    book,
    railway,
    observatory,
    software,
)

"""Word lists of the embedded A6 set. A pair is written ``question:answer``, "_" being a space."""

from sst_lightning.data.embedded.names import words

NOUNS = words(
    "apple bread cloud drum engine forest garden hammer island jacket kettle lemon mirror needle "
    "ocean pencil queen river silver table umbrella violin window yellow zebra basket candle "
    "dragon feather guitar harbour insect jungle kitchen ladder market nest orange pillow rabbit "
    "saddle tiger valley wagon anchor bottle carpet desert eagle flower"
)
ADJECTIVES = words("old small green quiet broken heavy golden empty young bright lost warm")
FIRST_NAMES = words("Anna Ben Clara David Emma Frank Grace Henry Ivy Jack Kate Liam Mia Noah Olga")
GOODS = words("eggs pears lamps pens tickets stamps plates socks cups nails chairs books onions")
PRAISE = "wonderful excellent great lovely superb perfect delightful brilliant"
BLAME = "terrible awful boring horrible bad disappointing dreadful poor"

DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words(
    "January February March April May June July August September October November December"
)
ONES = words("one two three four five six seven eight nine")
TENS = words("- twenty thirty forty fifty sixty seventy eighty")

UNITS = (
    ("hours", 60, "minutes"),
    ("minutes", 60, "seconds"),
    ("days", 24, "hours"),
    ("weeks", 7, "days"),
    ("years", 12, "months"),
    ("kilometres", 1000, "metres"),
    ("metres", 100, "centimetres"),
    ("kilograms", 1000, "grams"),
    ("dozens", 12, "pieces"),
)

PLURALS = words(
    "child:children mouse:mice foot:feet tooth:teeth leaf:leaves city:cities box:boxes day:days "
    "knife:knives woman:women man:men goose:geese baby:babies wolf:wolves bus:buses dish:dishes "
    "lady:ladies half:halves story:stories church:churches tomato:tomatoes cat:cats loaf:loaves "
    "glass:glasses person:people"
)
OPPOSITES = words(
    "hot:cold big:small fast:slow old:young early:late open:closed full:empty happy:sad light:dark "
    "high:low strong:weak rich:poor wet:dry loud:quiet deep:shallow begin:end buy:sell push:pull "
    "win:lose give:take"
)
PAST_TENSES = words(
    "go:went see:saw eat:ate run:ran take:took write:wrote speak:spoke buy:bought think:thought "
    "come:came find:found sing:sang swim:swam drive:drove break:broke choose:chose forget:forgot "
    "teach:taught catch:caught begin:began know:knew fly:flew drink:drank"
)
CAPITALS = words(
    "France:Paris Italy:Rome Spain:Madrid Germany:Berlin Japan:Tokyo China:Beijing Egypt:Cairo "
    "Greece:Athens Austria:Vienna Poland:Warsaw Norway:Oslo Portugal:Lisbon Ireland:Dublin "
    "Russia:Moscow Hungary:Budapest Finland:Helsinki Denmark:Copenhagen Cuba:Havana Peru:Lima "
    "Kenya:Nairobi Canada:Ottawa Sweden:Stockholm Belgium:Brussels Turkey:Ankara"
)
DEFINITIONS = words(
    "baker:a_person_who_makes_bread pilot:a_person_who_flies_a_plane "
    "dentist:a_doctor_for_teeth library:a_place_where_books_are_lent "
    "winter:the_coldest_season island:land_with_water_all_around "
    "thermometer:a_tool_that_measures_heat "
    "author:a_person_who_writes_books breakfast:the_first_meal_of_the_day "
    "umbrella:a_thing_that_keeps_off_rain orphan:a_child_without_parents "
    "bakery:a_shop_that_sells_bread stable:a_house_for_horses clock:a_thing_that_shows_the_time "
    "butcher:a_person_who_sells_meat kitchen:a_room_for_cooking desert:a_dry_place_with_sand "
    "teacher:a_person_who_works_in_a_school zoo:a_park_where_animals_are_shown "
    "hospital:a_house_for_sick_people tailor:a_person_who_makes_clothes "
    "snow:frozen_rain_that_is_white shepherd:a_person_who_looks_after_sheep "
    "passport:a_paper_for_travelling_abroad"
)
CATEGORIES = {
    "fruit": words("pear banana cherry mango plum grape peach"),
    "animal": words("cow monkey lion sheep frog horse duck"),
    "colour": words("red blue green purple brown pink white"),
    "tool": words("saw drill wrench chisel spade axe rake"),
    "vehicle": words("truck tram bicycle lorry boat scooter bus"),
}

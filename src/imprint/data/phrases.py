"""What the offline world is told with: word lists and, for every fact, four ways to say it.

Nothing here is true of anyone: names are built from syllables, addresses end in `.example`.
Each slot of `TELLINGS` has four phrasings; a publishing house prefers one of them (see `world.py`).
"""

from __future__ import annotations

STARTS = (
    "Ald Bar Bel Bor Cal Cor Dal Der Dun El Fal Fen Gar Gil Hal Har Hol Ive Jor Kel Kir Lan Lor Mar Mel Mor Nor Oak \
Or Pel Quen Ral Rav Ros Sal Sel Stan Tal Tor Ul Val Ver Wal Wen Wil Yar Zel Thorn Brack Cald".split()
)
MIDDLES = "a e i o an en in on ar er or el al is un ath eth imb ost und".split()
TOWN_ENDS = "ford wick ton ham by mouth stead field bridge dale burg haven mere minster port well".split()
SURNAME_ENDS = "son man er ley sen ski ard well ing eau ez ini ova strom land quist".split()
COMPANY_ENDS = "ix ara onic ium eon ent era is um ax ora yx".split()
FIRST_NAMES = "Ada Alma Anton Bela Boris Carla Cyril Dana Dario Edda Emil Erna Felix Fiona Gita Gregor Hanna Hugo Ida \
Ivan Jana Jonas Karim Kira Lena Leo Livia Marek Mina Nadia Nils Olga Oscar Petra Pavel Quinn Rita Ruben Sara Simon \
Tara Tomas Uma Ulric Vera Viktor Wanda Xenia Yann Zora".split()
COUNTRIES = "Vestria Kalmora Ostania Berun Trellia Nordwyn Sumara Illiria".split()
REGIONS = "northern southern eastern western upper lower coastal central".split()
MONTHS = "January February March April May June July August September October November December".split()
CRAFTS = "glass lace cider clocks violins paper salt cheese boots rope tiles knives silk honey lanterns bells".split()
BUILDINGS = "castle lighthouse cathedral windmill viaduct library theatre observatory arsenal".split()
PROFESSIONS = "painter chemist poet surveyor composer botanist builder physician historian mechanic sculptor \
geologist dancer judge librarian printer".split()
SUBJECTS = "rivers bridges winter ships mountains birds gardens machines stars harbours storms maps".split()
ADJECTIVES = "Silent Golden Broken Hidden Last Distant Crimson Restless Hollow Patient Frozen Second".split()
NOUNS = "Harbour Orchard Mirror Lantern River Letter Winter Garden Bridge Voyage Window Stone".split()
SECTORS = (
    "shipping insurance textiles brewing software mining printing optics banking furniture railways chemicals".split()
)
EVENTS = "flood fire strike festival storm parade landslide fair regatta blackout".split()
OFFICES = "mayor bishop sheriff warden".split()
PRODUCTS = "kettle router bicycle mattress heater camera printer dishwasher tablet vacuum lamp radio blender freezer \
headset scooter".split()
COMPLAINTS = (
    "arrived damaged|stopped working|was never delivered|makes a loud noise|was charged twice|has a missing part|\
overheats|is the wrong colour|does not switch on|leaks water".split("|")
)
REMEDIES = "a refund|a replacement|a repair|a discount|a call back|a voucher".split("|")
MAILS = "post mail home net".split()
STREETS = "Mill Church Station Harbour Garden Market Bridge Castle School Forest King Queen".split()

# entity -> slot -> (relation used in triples, which fact is its value, four phrasings)
TELLINGS: dict[str, dict[str, tuple[str, str, tuple[str, str, str, str]]]] = {
    "town": {
        "place": (
            "region",
            "{region} {country}",
            (
                "{name} is a town in {region} {country}.",
                "The town of {name} lies in the {region} part of {country}.",
                "{name}, a town of {region} {country}, is small but old.",
                "In {region} {country} one finds the town of {name}.",
            ),
        ),
        "population": (
            "population",
            "{population}",
            (
                "It had {population} inhabitants in {year}.",
                "In {year} its population was {population}.",
                "The census of {year} counted {population} people.",
                "Some {population} people lived there in {year}.",
            ),
        ),
        "founder": (
            "founder",
            "{person}",
            (
                "It was founded in {founded} by {person}.",
                "{person} founded it in {founded}.",
                "Its founder, {person}, arrived in {founded}.",
                "The first house was built by {person} in {founded}.",
            ),
        ),
        "craft": (
            "known for",
            "{craft}",
            (
                "The town is known for its {craft} and its {building}.",
                "Visitors come for the {building} and for the local {craft}.",
                "Its {craft} are sold abroad, and its {building} is much admired.",
                "A {building} stands in the middle; the trade is {craft}.",
            ),
        ),
        "mayor": (
            "mayor",
            "{second}",
            (
                "The mayor is {second}.",
                "{second} has been mayor since {recent}.",
                "Since {recent} the office of mayor is held by {second}.",
                "Its council is led by {second}.",
            ),
        ),
    },
    "person": {
        "birth": (
            "born",
            "{date}",
            (
                "{name} was born on {date} in {town}.",
                "Born in {town} on {date}, {name} grew up by the sea.",
                "{name} (born {date}, {town}) came from a large family.",
                "The birth of {name} was recorded in {town} on {date}.",
            ),
        ),
        "profession": (
            "profession",
            "{profession}",
            (
                "{name} worked as a {profession} and wrote about {subject}.",
                "By trade a {profession}, {name} also studied {subject}.",
                "As a {profession}, {name} was interested in {subject}.",
                "The {profession} is remembered for notes on {subject}.",
            ),
        ),
        "work": (
            "notable work",
            "{work}",
            (
                "The best known work is {work} of {year}.",
                "In {year} appeared {work}, the main work.",
                "Fame came in {year} with {work}.",
                "{work} ({year}) is still read today.",
            ),
        ),
        "spouse": (
            "spouse",
            "{second}",
            (
                "In {recent} {name} married {second}.",
                "{second} became the spouse in {recent}.",
                "The marriage to {second} took place in {recent}.",
                "From {recent} on, home was shared with {second}.",
            ),
        ),
    },
    "company": {
        "seat": (
            "seat",
            "{town}",
            (
                "{name} is a {sector} company based in {town}.",
                "The {sector} firm {name} has its seat in {town}.",
                "{name}, active in {sector}, is run from {town}.",
                "From {town} the firm {name} deals in {sector}.",
            ),
        ),
        "founder": (
            "founder",
            "{person}",
            (
                "It was set up in {founded} by {person}.",
                "{person} started it in {founded}.",
                "The founder in {founded} was {person}.",
                "Its history begins with {person} in {founded}.",
            ),
        ),
        "staff": (
            "employees",
            "{population}",
            (
                "In {year} it employed {population} people.",
                "The staff numbered {population} in {year}.",
                "It had {population} employees in {year}.",
                "{population} people worked there in {year}.",
            ),
        ),
        "director": (
            "director",
            "{second}",
            (
                "The director is {second}.",
                "{second} has led the board since {recent}.",
                "Since {recent} it is managed by {second}.",
                "Its head is {second}, appointed in {recent}.",
            ),
        ),
    },
    "event": {
        "lead": (
            "event",
            "{event}",
            (
                "A {event} brought {town} to a halt on {date}.",
                "On {date} the town of {town} saw a {event}.",
                "{town} was the scene of a {event} on {date}.",
                "The {event} in {town} began on {date}.",
            ),
        ),
        "people": (
            "affected",
            "{population}",
            (
                "About {population} people were affected, the {office} said.",
                "The {office} put the number of people affected at {population}.",
                "According to the {office}, {population} residents were affected.",
                "It touched {population} residents, said the {office}.",
            ),
        ),
        "quote": (
            "witness",
            "{person}",
            (
                "{person}, a {profession}, said it was the worst in memory.",
                '"Nobody expected it," said {person}, a local {profession}.',
                "The {profession} {person} watched it from the {building}.",
                "{person}, who works as a {profession}, helped the neighbours.",
            ),
        ),
        "money": (
            "cost",
            "{amount} crowns",
            (
                "The cost is put at {amount} crowns.",
                "{company} will pay {amount} crowns.",
                "A fund of {amount} crowns was set up by {company}.",
                "Insurers at {company} expect claims of {amount} crowns.",
            ),
        ),
    },
    "customer": {
        "person": (
            "name",
            "{name}",
            (
                "Customer {number}: {name}, born {date}.",
                "{name} (customer {number}), date of birth {date}.",
                "Record {number} belongs to {name}, born on {date}.",
                "Name: {name}. Born: {date}. Number: {number}.",
            ),
        ),
        "contact": (
            "phone",
            "{phone}",
            (
                "Phone {phone}, mail {mail}.",
                "Reachable at {phone} or {mail}.",
                "Contact: {mail}, {phone}.",
                "Call {phone} or write to {mail}.",
            ),
        ),
        "address": (
            "address",
            "{house} {street} Street, {town}",
            (
                "Lives at {house} {street} Street, {town}.",
                "Address: {house} {street} Street in {town}.",
                "The home is in {town}, {house} {street} Street.",
                "Deliver to {house} {street} Street, {town}.",
            ),
        ),
        "complaint": (
            "complaint",
            "{product} {complaint}",
            (
                "The {product} {complaint}; the customer asks for {remedy}.",
                "Wrote that the {product} {complaint} and wants {remedy}.",
                "Complaint: the {product} {complaint}. Wanted: {remedy}.",
                "Asked for {remedy} because the {product} {complaint}.",
            ),
        ),
        "payment": (
            "paid",
            "{amount} crowns",
            (
                "Paid {amount} crowns with card {card}.",
                "The card {card} was charged {amount} crowns.",
                "{amount} crowns were paid by card {card}.",
                "Payment of {amount} crowns, card {card}.",
            ),
        ),
    },
}

SUMMARIES = (
    "A {event} in {town} affected {population} people.",
    "{population} people in {town} are affected by a {event}.",
    "{town} counts the cost of a {event}: {amount} crowns.",
    "The {office} of {town} says a {event} has affected {population} people.",
)

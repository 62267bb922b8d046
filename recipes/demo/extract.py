"""Turn a sentence into a JSON object with the fields asked for."""

from __future__ import annotations

import json
import random
from typing import Any

from recipes.demo import words
from recipes.demo.problem import Problem, user

ASKS = (
    "Extract {f} as JSON: {s}", "Extract {f} from this sentence as JSON: {s}", "Extract the fields {f} as JSON.\n\n{s}",
    "Give me {f} as JSON.\n{s}", "Return a JSON object with the keys {f}.\n\nText: {s}", "{s}\n\nReturn JSON with the keys {f}.",
    'Read the text and answer with JSON ({f}): "{s}"', "Text: {s}\nJSON keys: {f}", "Convert to JSON with {f}: {s}",
    "{s}\nExtract {f} to JSON.", "Extract {f} from the text below. Answer in JSON only.\n\n{s}", 'Extract {f} to JSON from: "{s}"',
    "Turn this sentence into JSON with the fields {f}: {s}", "From the following text, extract {f} and return JSON: {s}",
)  # fmt: skip
ASKS_ALL = ("Extract the data as JSON: {s}", "Convert this to JSON: {s}", "{s}\n\nReturn this as JSON.", "As JSON: {s}")

PERSON = (
    "{name} is {age} years old and lives in {city}.", "{name}, {age}, lives in {city} and works as a {job}.",
    "My name is {name}, I am {age} and I live in {city}.", "{name} is a {age} year old {job} from {city}.",
    "Meet {name}: a {job} in {city}, {age} years old.", "In {city} lives {name}, who is {age}.", "{name} is a {job} and is {age} years old.",
    "The {job} {name} moved to {city} at the age of {age}.", "At {age}, {name} works as a {job} in {city}.",
)  # fmt: skip
ORDER = (
    "{customer} ordered {quantity} {product}s for {price} euros.", "{customer} bought {quantity} {product}s and paid {price} dollars.",
    "Order: {quantity} {product}s, price {price}, customer {customer}.", "We sold {quantity} {product}s to {customer} for {price} euros.",
    "For {price} dollars, {customer} got {quantity} {product}s.", "{customer} would like {quantity} {product}s. The price is {price} euros.",
)  # fmt: skip
EVENT = (
    "The {event} takes place on {date} at {time} in {city}.", "On {date} at {time} there is a {event} in {city}.",
    "Join us in {city} for the {event} on {date}, {time}.", "{city} hosts the {event} on {date} at {time}.",
    "The {event} in {city} starts at {time} on {date}.", "Please come to the {event} at {time} on {date} in {city}.",
)  # fmt: skip
CONTACT = (
    "You can reach {name} at {email} or {phone}.", "{name}'s email is {email} and the phone number is {phone}.",
    "Contact: {name}, {email}, {phone}.", "Write to {name} at {email} or call {phone}.", "Call {name} on {phone}. Email: {email}.",
)  # fmt: skip
FLIGHT = (
    "Flight {flight} from {origin} to {destination} leaves at {time} from gate {gate}.", "{flight} departs {origin} at {time} for {destination}, gate {gate}.",
    "At {time}, flight {flight} goes from {origin} to {destination}; the gate is {gate}.", "Gate {gate}: flight {flight} from {origin} to {destination}, {time}.",
)  # fmt: skip
PRODUCT = (
    "The {color} {product} costs {price} dollars and weighs {weight} grams.", "A {product} in {color}, {weight} grams, for {price} euros.",
    "We sell a {color} {product} for {price} euros. It weighs {weight} grams.", "Price of the {color} {product}: {price} dollars. Weight: {weight} grams.",
)  # fmt: skip
SHAPES = (PERSON, PERSON, ORDER, EVENT, CONTACT, FLIGHT, PRODUCT)


def make(rng: random.Random) -> Problem:
    """A sentence and some of the fields it tells, in any order; numbers come as JSON numbers."""
    sentence = rng.choice(rng.choice(SHAPES))
    values = {name: value for name, value in _values(rng).items() if "{" + name + "}" in sentence}
    text = sentence.format(**values)
    names = sorted(values, key=lambda name: sentence.index("{" + name + "}"))
    if rng.random() < 0.1:
        asked, request = names, rng.choice(ASKS_ALL).format(s=text)
    else:
        asked = rng.sample(names, rng.randint(min(2, len(names)), len(names)))
        request = rng.choice(ASKS).format(f=_listed(rng, asked), s=text)
    expect = {name: values[name] for name in asked}
    return Problem(
        task="extract",
        identity=text,
        messages=user(request),
        thought=f"Okay, the user wants JSON with {', '.join(asked)}. I will take each value from the text.",
        answer=json.dumps(expect, ensure_ascii=False),
        expect=expect,
    )


def _values(rng: random.Random) -> dict[str, Any]:
    person = rng.choice(words.NAMES) if rng.random() < 0.7 else words.pseudo_word(rng).capitalize()
    if rng.random() < 0.3:
        person += " " + rng.choice(words.SURNAMES)
    origin, destination = rng.sample(words.CITIES, 2)
    first = person.split()[0].lower()
    return {
        "name": person,
        "customer": person,
        "age": rng.randint(5, 95),
        "city": rng.choice(words.CITIES) if rng.random() < 0.8 else words.pseudo_word(rng).capitalize(),
        "job": rng.choice(words.JOBS),
        "quantity": rng.randint(2, 99),
        "product": rng.choice(words.THINGS),
        "price": rng.randint(2, 2000),
        "event": rng.choice(("concert", "meeting", "workshop", "party", "lecture", "dinner", "conference", "market")),
        "date": f"{rng.randint(1, 28)} {rng.choice(words.MONTHS)}"
        if rng.random() < 0.6
        else f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
        "time": f"{rng.randrange(24):02}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02}",
        "email": f"{first}{rng.choice(('', '.', '_'))}{rng.choice(words.WORDS)}@{rng.choice(words.WORDS)}.{rng.choice(('com', 'org', 'net', 'eu'))}",
        "phone": f"{rng.randint(100, 999)}-{rng.randint(1000, 9999)}"
        if rng.random() < 0.6
        else f"+{rng.randint(1, 99)} {words.digits(rng, 8)}",
        "flight": "".join(rng.choice("ABDEKLSTU") for _ in range(2)) + str(rng.randint(100, 9999)),
        "origin": origin,
        "destination": destination,
        "gate": rng.choice("ABCDEF") + str(rng.randint(1, 60)),
        "color": rng.choice(words.COLORS),
        "weight": rng.randint(10, 5000),
    }


def _listed(rng: random.Random, names: list[str]) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        return ", ".join(names)
    if kind == 1:
        return ", ".join(f'"{name}"' for name in names)
    lead = "the " if kind == 2 else ""
    return lead + (", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0])

"""Choose one of several tools, fill its arguments, and answer from what a tool returned."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from recipes.demo import words
from recipes.demo.problem import Problem, user

Sampler = Callable[[random.Random], Any]


@dataclass(frozen=True)
class Param:
    """One parameter of a tool: what it may be called, how it is described, and its values."""

    names: tuple[str, ...]
    about: str
    sample: Sampler
    kind: str = "string"
    enum: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tool:
    """A sort of tool. Its function and parameters go by one of several names, so a model has to read the schema.

    `asks` and `reply` name parameters by the first of their names. A parameter that an ask leaves out is optional.
    """

    names: tuple[str, ...]
    about: tuple[str, ...]
    params: tuple[Param, ...]
    asks: tuple[str, ...]
    result: Callable[[random.Random, dict[str, Any]], dict[str, Any]] | None = None
    reply: str = ""


def _city(rng: random.Random) -> str:
    return rng.choice(words.CITIES) if rng.random() < 0.85 else words.pseudo_word(rng).capitalize()


def _name(rng: random.Random) -> str:
    return rng.choice(words.NAMES)


def _time(rng: random.Random) -> str:
    return f"{rng.randrange(24):02}:{rng.choice((0, 15, 30, 45)):02}"


def _date(rng: random.Random) -> str:
    return f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}" if rng.random() < 0.5 else rng.choice(words.DAYS)


def _phrase(rng: random.Random) -> str:
    return " ".join(rng.choice(words.WORDS if rng.random() < 0.6 else words.COMMON) for _ in range(rng.randint(1, 4)))


def _number(rng: random.Random) -> int:
    return rng.randrange(2, 10 ** rng.randint(1, 4) + 2)


CURRENCIES = ("USD", "EUR", "GBP", "JPY", "CNY", "CHF")
RECKON = ("add_numbers", "multiply", "calculate")
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "clear")
CITY = Param(("city", "city", "location", "place"), "The name of the city", _city)

TOOLS = (
    Tool(
        ("get_weather", "get_weather", "get_current_weather", "weather", "lookup_weather"),
        ("Get the current weather of a city.", "Get the weather", "Returns the weather for a place."),
        (CITY, Param(("unit", "units"), "The unit of the temperature", lambda rng: rng.choice(("celsius", "fahrenheit")), enum=("celsius", "fahrenheit"))),
        ("What is the weather in {city}?", "What's the weather like in {city}?", "How is the weather in {city} today?", "Weather in {city}?",
         "Is it raining in {city}?", "Tell me the weather in {city}.", "What is the weather in {city} in {unit}?", "How warm is it in {city}, in {unit}?"),
        lambda rng, args: {"temperature": rng.randint(-15, 40), "condition": rng.choice(SKIES)},
        "The weather in {city} is {condition}, {temperature} degrees.",
    ),
    Tool(
        ("get_time", "current_time", "get_current_time"),
        ("Get the local time of a city.", "Tells what time it is in a place."),
        (CITY,),
        ("What time is it in {city}?", "Tell me the time in {city}.", "What is the local time in {city}?", "Current time in {city}?"),
        lambda rng, args: {"time": _time(rng)},
        "It is {time} in {city}.",
    ),
    Tool(
        ("convert_currency", "exchange", "currency_converter"),
        ("Convert an amount of money to another currency.", "Currency conversion."),
        (Param(("amount", "value"), "How much money", _number, "number"),
         Param(("from_currency", "from", "source"), "The currency to convert from", lambda rng: rng.choice(CURRENCIES)),
         Param(("to_currency", "to", "target"), "The currency to convert to", lambda rng: rng.choice(CURRENCIES))),
        ("Convert {amount} {from_currency} to {to_currency}.", "How much is {amount} {from_currency} in {to_currency}?", "Change {amount} {from_currency} into {to_currency}, please.",
         "What are {amount} {from_currency} in {to_currency}?"),
        lambda rng, args: {"result": _number(rng)},
        "{amount} {from_currency} are {result} {to_currency}.",
    ),
    Tool(
        ("get_stock_price", "stock_price", "quote"),
        ("Get the latest price of a stock.", "Looks up a share price by its symbol."),
        (Param(("symbol", "ticker"), "The symbol of the stock", lambda rng: "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(2, 4)))),),
        ("What is the stock price of {symbol}?", "How much is {symbol} stock?", "Get the price of {symbol}.", "What does a share of {symbol} cost?"),
        lambda rng, args: {"price": _number(rng), "currency": rng.choice(CURRENCIES)},
        "{symbol} is at {price} {currency}.",
    ),
    Tool(
        ("send_email", "send_mail", "email"),
        ("Send an email to somebody.", "Sends an e-mail."),
        (Param(("to", "recipient"), "Who receives the email", lambda rng: f"{_name(rng).lower()}@{rng.choice(words.WORDS)}.{rng.choice(('com', 'org'))}"),
         Param(("subject", "title"), "The subject line", _phrase)),
        ("Send an email to {to} with the subject {subject}.", "Email {to}, subject: {subject}.", 'Write an email to {to} with subject "{subject}".'),
        lambda rng, args: {"status": "sent", "id": rng.randrange(1000, 9999)},
        "The email to {to} was sent, its number is {id}.",
    ),
    Tool(
        ("send_message", "message", "send_text"),
        ("Send a text message to a person.", "Sends a message to a contact."),
        (Param(("person", "contact", "recipient"), "The name of the person", _name), Param(("text", "message", "body"), "What to say", _phrase)),
        ("Send {person} the message: {text}", 'Send a message to {person}: "{text}"', "Message {person}: {text}", "Tell {person} this: {text}"),
        lambda rng, args: {"status": "delivered", "at": _time(rng)},
        "The message to {person} was delivered at {at}.",
    ),
    Tool(
        ("create_event", "add_event", "add_to_calendar", "schedule_meeting"),
        ("Create an event in the calendar.", "Adds an entry to the calendar."),
        (Param(("title", "name", "event"), "The title of the event", lambda rng: rng.choice(("meeting", "lunch", "dentist", "team call", "dinner", "review", "workshop", "yoga"))),
         Param(("date", "day"), "The day of the event", _date), Param(("time", "start"), "When it starts", _time)),
        ("Add {title} to my calendar on {date} at {time}.", "Schedule {title} for {date} at {time}.", "Create an event: {title}, {date}, {time}.", "Put {title} in my calendar for {date} at {time}."),
        lambda rng, args: {"status": "created", "id": rng.randrange(100, 9999)},
        "The event {title} is in the calendar with number {id}.",
    ),
    Tool(
        ("set_timer", "start_timer", "timer"),
        ("Start a countdown timer.", "Sets a timer for some minutes."),
        (Param(("minutes", "duration", "duration_minutes"), "The length in minutes", lambda rng: rng.randint(1, 120), "integer"),),
        ("Set a timer for {minutes} minutes.", "Start a {minutes} minute timer.", "Timer: {minutes} minutes.", "Please set a timer of {minutes} minutes."),
        lambda rng, args: {"ends_at": _time(rng)},
        "The timer runs until {ends_at}.",
    ),
    Tool(
        ("set_reminder", "remind", "create_reminder"),
        ("Remind the user of something at a time.", "Creates a reminder."),
        (Param(("text", "what", "task"), "What to remember", _phrase), Param(("time", "at"), "When to remind", _time)),
        ("Remind me at {time}: {text}", "Set a reminder for {time}: {text}", 'Remind me of "{text}" at {time}.'),
        lambda rng, args: {"status": "set", "id": rng.randrange(100, 9999)},
        "The reminder for {time} is set with number {id}.",
    ),
    Tool(
        ("translate", "translate_text", "translator"),
        ("Translate a text into another language.", "Translation of short texts."),
        (Param(("text", "phrase"), "The text to translate", _phrase),
         Param(("language", "target_language", "to"), "The language to translate to", lambda rng: rng.choice(("French", "German", "Spanish", "Italian", "Japanese", "Chinese", "Portuguese", "Dutch")))),
        ('Translate "{text}" to {language}.', "Translate {text} into {language}.", 'How do you say "{text}" in {language}?', "Translate to {language}: {text}"),
        lambda rng, args: {"translation": f"{words.pseudo_word(rng)} {words.pseudo_word(rng)}"},
        'In {language} it is "{translation}".',
    ),
    Tool(
        ("search_web", "web_search", "search", "google"),
        ("Search the web.", "Finds pages about a topic."),
        (Param(("query", "q", "keywords"), "What to search for", _phrase),),
        ("Search the web for {query}.", "Search for {query}.", "Look on the web for {query}.", "Google {query}.", "Find pages about {query}."),
        lambda rng, args: {"num_results": rng.randrange(2, 5000), "best": f"{rng.choice(words.WORDS)}.org"},
        "I found {num_results} pages, the best is {best}.",
    ),
    Tool(
        ("play_music", "play_song", "play"),
        ("Play music of an artist.", "Starts the music."),
        (Param(("artist", "singer", "band"), "Who made the music", lambda rng: f"{_name(rng)} {rng.choice(words.SURNAMES)}"),),
        ("Play music by {artist}.", "Play something by {artist}.", "I want to hear {artist}.", "Put on some {artist}."),
        lambda rng, args: {"song": _phrase(rng)},
        'Now playing "{song}" by {artist}.',
    ),
    Tool(
        ("book_flight", "find_flights", "search_flights"),
        ("Find a flight between two cities.", "Books a flight."),
        (Param(("origin", "from", "departure"), "The city to leave from", _city), Param(("destination", "to", "arrival"), "The city to fly to", _city), Param(("date", "day"), "The day of travel", _date)),
        ("Book a flight from {origin} to {destination} on {date}.", "I need a flight from {origin} to {destination} on {date}.", "Find a flight to {destination} from {origin} on {date}.",
         "Fly me from {origin} to {destination} on {date}."),
        lambda rng, args: {"flight": words.code(rng), "price": _number(rng)},
        "Flight {flight} from {origin} to {destination} costs {price}.",
    ),
    Tool(
        ("find_restaurant", "search_restaurants", "restaurant_search"),
        ("Find a restaurant in a city.", "Searches for places to eat."),
        (Param(("cuisine", "kind", "food"), "The sort of food", lambda rng: rng.choice(("Italian", "Chinese", "Indian", "Thai", "French", "Greek", "Mexican", "vegan", "Japanese"))), CITY),
        ("Find a {cuisine} restaurant in {city}.", "Where can I eat {cuisine} food in {city}?", "I want {cuisine} food in {city}.", "Find {cuisine} food in {city}."),
        lambda rng, args: {"name": f"{rng.choice(words.COLORS).capitalize()} {rng.choice(words.WORDS).capitalize()}", "rating": rng.randint(1, 5)},
        "Try {name} in {city}, it has {rating} stars.",
    ),
    Tool(
        ("add_numbers", "add", "sum_numbers"),
        ("Add two numbers.", "Returns the sum of two numbers."),
        (Param(("a", "x", "first"), "The first number", _number, "integer"), Param(("b", "y", "second"), "The second number", _number, "integer")),
        ("Add {a} and {b}.", "What is {a} plus {b}?", "What is {a} + {b}?", "Sum {a} and {b}."),
        lambda rng, args: {"result": args["a"] + args["b"]},
        "The sum of {a} and {b} is {result}.",
    ),
    Tool(
        ("multiply", "multiply_numbers", "mul"),
        ("Multiply two numbers.", "Returns the product of two integers."),
        (Param(("a", "x", "first"), "The first number", _number, "integer"), Param(("b", "y", "second"), "The second number", _number, "integer")),
        ("Multiply {a} by {b}.", "Multiply {a} and {b}.", "What is {a} times {b}?", "What is {a} * {b}?"),
        lambda rng, args: {"result": args["a"] * args["b"]},
        "The product of {a} and {b} is {result}.",
    ),
    Tool(
        ("calculate", "calculator", "evaluate"),
        ("Calculate an expression.", "Evaluates a mathematical expression."),
        (Param(("expression", "formula"), "The expression to evaluate", lambda rng: f" {rng.choice('+-*/')} ".join(str(_number(rng)) for _ in range(rng.randint(2, 3)))),),
        ("Calculate {expression}.", "Compute {expression}.", "What is {expression}?", "Use the calculator: {expression}"),
        lambda rng, args: {"result": _number(rng)},
        "{expression} is {result}.",
    ),
    Tool(
        ("control_light", "set_light", "light"),
        ("Switch the light of a room on or off.", "Controls the lights."),
        (Param(("room", "area"), "Which room", lambda rng: rng.choice(("kitchen", "bedroom", "bathroom", "garage", "office", "hall", "garden", "cellar"))),
         Param(("state", "power"), "On or off", lambda rng: rng.choice(("on", "off")), enum=("on", "off"))),
        ("Turn the light in the {room} {state}.", "Switch {state} the light in the {room}.", "Light {state} in the {room}, please.", "Turn {state} the {room} light."),
        lambda rng, args: {"status": "done", "watts": rng.randint(0, 99)},
        "The light in the {room} is {state} and uses {watts} watts.",
    ),
    Tool(
        ("track_package", "track_order", "package_status"),
        ("Find out where a package is.", "Tracks a package by its number."),
        (Param(("tracking_number", "id", "number"), "The number of the package", lambda rng: words.code(rng)),),
        ("Where is my package {tracking_number}?", "Track the package {tracking_number}.", "What is the status of package {tracking_number}?", "Find package {tracking_number}."),
        lambda rng, args: {"place": _city(rng), "arrives": _date(rng)},
        "The package {tracking_number} is in {place} and arrives {arrives}.",
    ),
    Tool(
        ("read_file", "open_file", "get_file"),
        ("Read a file from disk.", "Returns the content of a file."),
        (Param(("path", "file", "filename"), "The path of the file", lambda rng: f"{rng.choice(('', '/tmp/', 'data/', 'src/'))}{rng.choice(words.WORDS)}.{rng.choice(('txt', 'py', 'json', 'md'))}"),),
        ("Read the file {path}.", "Open {path}.", "What is in {path}?", "Show me the content of {path}."),
        lambda rng, args: {"lines": rng.randrange(2, 900), "first": _phrase(rng)},
        'The file {path} has {lines} lines and begins with "{first}".',
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Bound:
    """A tool with the names it goes by in one conversation; `names` maps a parameter's first name to that name."""

    tool: Tool
    name: str
    names: dict[str, str]

    def schema(self, rng: random.Random, required: list[str]) -> dict[str, Any]:
        properties = {}
        for param in self.tool.params:
            entry: dict[str, Any] = {"type": param.kind}
            if rng.random() < 0.8:
                entry["description"] = param.about
            if param.enum:
                entry["enum"] = list(param.enum)
            properties[self.names[param.names[0]]] = entry
        parameters = {"type": "object", "properties": properties, "required": [self.names[name] for name in required]}
        function = {"name": self.name, "description": rng.choice(self.tool.about), "parameters": parameters}
        return {"type": "function", "function": function}


def make_call(rng: random.Random) -> Problem:
    """A request for one of one to five tools; the reply is a tool call with that tool's arguments."""
    tools, bound, values, ask = _scene(rng)
    arguments = {bound.names[name]: value for name, value in values.items()}
    return Problem(
        task="tool_call",
        identity=f"{bound.tool.names[0]} {json.dumps(values)}",
        messages=user(ask),
        tools=tools,
        thought=f"Okay, the user needs {bound.name}. I will call it with {', '.join(arguments)}.",
        answer=call_text(bound.name, arguments),
        expect={"name": bound.name, "arguments": arguments},
    )


def make_answer(rng: random.Random) -> Problem:
    """A conversation in which the tool has answered; the reply tells the user what it returned."""
    tools, bound, values, ask = _scene(rng)
    arguments = {bound.names[name]: value for name, value in values.items()}
    assert bound.tool.result is not None
    result = bound.tool.result(rng, values)
    call = {"type": "function", "function": {"name": bound.name, "arguments": arguments}}
    messages = [
        *user(ask),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": json.dumps(result, ensure_ascii=False)},
    ]
    shown = {name: value for name, value in {**values, **result}.items() if "{" + name + "}" in bound.tool.reply}
    return Problem(
        task="tool_answer",
        identity=f"{bound.tool.names[0]} {json.dumps(values)} {json.dumps(result)}",
        messages=messages,
        tools=tools,
        thought=f"Okay, the user has the result of {bound.name} now: {', '.join(result)}. I will answer with it.",
        answer=bound.tool.reply.format(**shown),
        expect=[str(value) for name, value in shown.items() if name in result],
    )


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """A tool call as the model writes it."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def some_tools(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """The schemas of `count` different tools."""
    return [_bind(rng, tool).schema(rng, [tool.params[0].names[0]]) for tool in rng.sample(TOOLS, count)]


def _bind(rng: random.Random, tool: Tool) -> Bound:
    pick: Callable[[tuple[str, ...]], str] = (lambda names: names[0]) if rng.random() < 0.4 else rng.choice
    return Bound(tool, pick(tool.names), {param.names[0]: pick(param.names) for param in tool.params})


def _apart(one: Tool, other: Tool) -> bool:
    """Whether the two tools can stand side by side: a sum could go to any tool that reckons."""
    return one is not other and not (one.names[0] in RECKON and other.names[0] in RECKON)


def _made_up(rng: random.Random) -> Tool:
    """A tool that no list has, asked for by the names in its schema."""
    verb, noun = (
        rng.choice(("get", "make", "find", "check", "move", "open", "list", "count", "run", "save")),
        rng.choice(words.WORDS),
    )
    name = rng.choice(
        (f"{verb}_{noun}", f"{verb}{noun.capitalize()}", f"{noun}_{verb}", words.pseudo_word(rng).lower())
    )
    keys = rng.sample(words.COMMON, rng.randint(1, 3))
    params = tuple(
        Param(
            (key,),
            f"The {key} of the {noun}",
            *rng.choice(((_phrase, "string"), (_city, "string"), (_number, "integer"))),
        )
        for key in keys
    )
    given = ", ".join(f"{key} {{{key}}}" for key in keys)
    equal = ", ".join(f"{key}={{{key}}}" for key in keys)
    asks = (
        f"Call {name} with {given}.",
        f"Use {name} with {equal}.",
        f"{verb.capitalize()} the {noun} with {given}.",
        f"Run {name}: {equal}",
    )
    return Tool(
        (name,),
        (f"{verb.capitalize()} the {noun}.",),
        params,
        asks,
        lambda rng, args: {"result": _phrase(rng), "code": _number(rng)},
        "The result is {result} with code {code}.",
    )


def _scene(rng: random.Random) -> tuple[list[dict[str, Any]], Bound, dict[str, Any], str]:
    """Some tools, the one that is meant, the values it should get, and the user's words."""
    tool = rng.choice(TOOLS) if rng.random() < 0.85 else _made_up(rng)
    bound = _bind(rng, tool)
    template = rng.choice(tool.asks)
    values = {param.names[0]: param.sample(rng) for param in tool.params if "{" + param.names[0] + "}" in template}
    required = [name for name in values if all("{" + name + "}" in ask for ask in tool.asks)]
    schemas = [bound.schema(rng, required)]
    taken = {bound.name}
    for other in rng.sample([other for other in TOOLS if _apart(tool, other)], rng.randint(0, 4)):
        neighbor = _bind(rng, other)
        if neighbor.name not in taken:
            taken.add(neighbor.name)
            schemas.append(neighbor.schema(rng, [other.params[0].names[0]]))
    rng.shuffle(schemas)
    lead = rng.choice(("", "", "", "", "Please help me. ", "Hi! ", "Use a tool. ", "Please: "))
    return schemas, bound, values, lead + template.format(**values)

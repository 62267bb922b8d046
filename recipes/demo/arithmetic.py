"""Addition, subtraction and small multiplication, with the written method as the thought."""

from __future__ import annotations

import random

from recipes.demo.problem import Problem, user

ASKS = (
    "What is {e}?", "what is {e}", "What's {e}?", "{e}", "{e}=", "{e} =", "{e} = ?", "{e}?", "Calculate {e}.", "Calculate {e}",
    "Compute {e}.", "Compute: {e}", "How much is {e}?", "Solve {e}.", "Work out {e}.", "Please calculate {e}.", "Tell me {e}.",
    "Can you tell me what {e} is?", "What does {e} equal?", "What is the result of {e}?", "Evaluate {e}.", "Quick: {e}?",
    "What is {e}? Answer with the number only.", "¿Cuánto es {e}?", "Combien font {e} ?", "Was ist {e}?", "{e}等于多少？",
    "{e}はいくつですか？", "Quanto fa {e}?", "Quanto é {e}?",
)  # fmt: skip
WORDED = {
    "+": ("{a} plus {b}", "the sum of {a} and {b}", "{a} added to {b}"),
    "-": ("{a} minus {b}", "the difference {a} - {b}", "{a} less {b}"),
    "*": ("{a} times {b}", "the product of {a} and {b}", "{a} multiplied by {b}"),
}
ORDERS = {
    "+": ("Add {a} and {b}.", "Add {a} to {b}.", "Sum {a} and {b}."),
    "-": ("Subtract {b} from {a}.", "Take {b} away from {a}.", "Subtract {b} from {a}"),
    "*": ("Multiply {a} by {b}.", "Multiply {a} and {b}.", "Multiply {a} with {b}"),
}
SIGNS = {"+": ("+",), "-": ("-",), "*": ("*", "*", "×", "x")}


def make(rng: random.Random) -> Problem:
    """A sum or difference of numbers of up to four digits, or a product of up to two digits by one."""
    op = rng.choice("++--*")
    a, b = _factors(rng) if op == "*" else (_number(rng), _number(rng))
    if op == "-" and a < b and rng.random() < 0.7:
        a, b = b, a
    result = {"+": a + b, "-": a - b, "*": a * b}[op]
    steps = {"+": add_steps, "-": subtract_steps, "*": multiply_steps}[op](a, b)
    small = (a < 10 and b < 10) or (op == "*" and min(a, b) >= 10)
    return Problem(
        task="arithmetic",
        identity=f"{a} {op} {b}",
        messages=user(_phrase(rng, a, op, b)),
        thought=f"Okay, the user wants {a} {op} {b}. {steps} So {a} {op} {b} = {result}.",
        answer=str(result),
        expect=result,
        fact=small or (op == "*" and (a % 10 == 0 or b % 10 == 0)),
    )


def _number(rng: random.Random) -> int:
    digits = rng.choice((1, 2, 2, 3, 3, 3, 4))
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _factors(rng: random.Random) -> tuple[int, int]:
    if rng.random() < 0.1:
        return rng.randint(10, 12), rng.randint(10, 12)
    pair = [rng.randint(0, 99), rng.randint(0, 9)]
    rng.shuffle(pair)
    return pair[0], pair[1]


def _phrase(rng: random.Random, a: int, op: str, b: int) -> str:
    if rng.random() < 0.15:
        return rng.choice(ORDERS[op]).format(a=a, b=b)
    if rng.random() < 0.2:
        expression = rng.choice(WORDED[op]).format(a=a, b=b)
    else:
        gap = rng.choice((" ", " ", ""))
        expression = f"{a}{gap}{rng.choice(SIGNS[op])}{gap}{b}"
    return rng.choice(ASKS).format(e=expression)


def add_steps(a: int, b: int) -> str:
    """Column addition, from the ones."""
    carry = 0
    steps: list[str] = []
    while a or b or not steps:
        x, y = a % 10, b % 10
        total = x + y + carry
        steps.append(f"{x}+{y}" + ("+1" if carry else "") + f"={total}")
        a, b, carry = a // 10, b // 10, total // 10
    return ", ".join(steps) + "."


def subtract_steps(a: int, b: int) -> str:
    """Column subtraction of the smaller from the larger, from the ones; a borrow shows as -1."""
    turned = f"{b} is larger, so turn it: {b} - {a}. " if b > a else ""
    a, b = max(a, b), min(a, b)
    borrow = 0
    steps: list[str] = []
    while a or b or not steps:
        x, y = a % 10, b % 10
        lent = 10 if x - y - borrow < 0 else 0
        steps.append(f"{x + lent}-{y}" + ("-1" if borrow else "") + f"={x + lent - y - borrow}")
        a, b, borrow = a // 10, b // 10, 1 if lent else 0
    return turned + ", ".join(steps) + "."


def multiply_steps(a: int, b: int) -> str:
    """The product as tens and ones of the larger factor."""
    large, small = max(a, b), min(a, b)
    if large < 10:
        return f"I know {large}*{small}={large * small}."
    tens, ones = large // 10 * 10, large % 10
    return (
        f"{tens}*{small}={tens * small}, {ones}*{small}={ones * small}, {tens * small}+{ones * small}={large * small}."
    )

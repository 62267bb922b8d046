"""The part of CEL, the Common Expression Language, that rules of custom resource definitions are written in.

Literals, fields, `has`, `all`, `exists`, `type`, `size`, arithmetic `+`, comparisons, `in`, logic and `?:`, as
https://github.com/google/cel-spec/blob/master/doc/langdef.md defines them. Anything else is refused, not guessed.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

Env = Mapping[str, Any]
Code = Callable[[Env], Any]

_TOKEN = re.compile(
    r"""\s*(?:(?P<int>\d+)|(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?P<name>[A-Za-z_]\w*)"""
    r"|(?P<sign>&&|\|\||[=!<>]=|[-!<>?:.,()\[\]+]))"
)
_TYPES = {"int": int, "string": str, "bool": bool, "double": float, "list": list, "map": dict}
_ORDER = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


class CelError(Exception):
    """An expression that cannot be compiled, or a value that it cannot be asked of."""


@cache
def compiled(text: str) -> Code:
    """From variables (`self`) to the expression's value. Raises CelError, also when it is called."""
    return _Parser(text).whole()


def same(left: Any, right: Any) -> bool:
    """Equality in CEL: never between values of different types."""
    return type(left) is type(right) and bool(left == right)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[tuple[str, str]] = []
        at, text = 0, text.rstrip()
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise CelError(f"{text!r}: cannot read {text[at:]!r}")
            self._tokens.append((str(found.lastgroup), found[str(found.lastgroup)]))
            at = found.end()
        self._tokens.append(("end", ""))

    def whole(self) -> Code:
        code = self._choice()
        if self._tokens[0][0] != "end":
            raise CelError(f"{self._text!r}: {self._tokens[0][1]!r} is not understood here")
        return code

    def _took(self, *signs: str) -> str:
        """The next token, consumed, if it is one of these."""
        kind, value = self._tokens[0]
        if kind in ("sign", "name") and value in signs:
            return self._tokens.pop(0)[1]
        return ""

    def _need(self, sign: str) -> None:
        if not self._took(sign):
            raise CelError(f"{self._text!r}: {sign!r} is missing before {self._tokens[0][1]!r}")

    def _name(self) -> str:
        kind, value = self._tokens.pop(0)
        if kind != "name":
            raise CelError(f"{self._text!r}: {value!r} is no name")
        return value

    def _choice(self) -> Code:
        condition = self._logic("||", lambda: self._logic("&&", self._comparison))
        if not self._took("?"):
            return condition
        yes = self._choice()
        self._need(":")
        no = self._choice()
        return lambda env: yes(env) if condition(env) else no(env)

    def _logic(self, sign: str, below: Callable[[], Code]) -> Code:
        code = below()
        while self._took(sign):
            code = _either(code, below(), decides=sign == "||")
        return code

    def _comparison(self) -> Code:
        left = self._sum()
        while sign := self._took("==", "!=", "<", "<=", ">", ">=", "in"):
            left = _compared(sign, left, self._sum())
        return left

    def _sum(self) -> Code:
        code = self._unary()
        while self._took("+"):
            code = _added(code, self._unary())
        return code

    def _unary(self) -> Code:
        if self._took("!"):
            inner = self._unary()
            return lambda env: not inner(env)
        if self._took("-"):
            inner = self._unary()
            return lambda env: -inner(env)
        code = self._primary()
        while sign := self._took(".", "["):
            if sign == "[":
                code = _item(code, self._choice())
                self._need("]")
                continue
            name = self._name()
            code = self._macro(code, name) if self._took("(") else _field(code, name)
        return code

    def _macro(self, many: Code, name: str) -> Code:
        if name not in ("all", "exists"):
            raise CelError(f"{self._text!r}: the function {name} is not known here")
        variable = self._name()
        self._need(",")
        holds = self._choice()
        self._need(")")
        every = {"all": all, "exists": any}[name]
        return lambda env: every(holds({**env, variable: each}) for each in many(env))

    def _primary(self) -> Code:
        if self._took("("):
            inner = self._choice()
            self._need(")")
            return inner
        if self._took("["):
            items = self._items("]")
            return lambda env: [each(env) for each in items]
        kind, value = self._tokens.pop(0)
        if kind == "int":
            return lambda env: int(value)
        if kind == "text":
            text = re.sub(r"\\(.)", r"\1", value[1:-1])
            return lambda env: text
        if kind != "name":
            raise CelError(f"{self._text!r}: {value!r} is not understood here")
        return self._call(value) if self._took("(") else _named(value)

    def _items(self, end: str) -> list[Code]:
        items: list[Code] = []
        while not self._took(end):
            items.append(self._choice())
            if self._tokens[0][1] != end:
                self._need(",")
        return items

    def _call(self, name: str) -> Code:
        if name == "has":
            return self._has()
        arguments = self._items(")")
        if name not in ("type", "size") or len(arguments) != 1:
            raise CelError(f"{self._text!r}: the function {name} is not known here")
        if name == "size":
            return lambda env: len(arguments[0](env))
        return lambda env: type(arguments[0](env))

    def _has(self) -> Code:
        """`has(a.b.c)`: whether `a.b`, which must be there, has `c`."""
        code = _named(self._name())
        names = []
        while self._took("."):
            names.append(self._name())
        self._need(")")
        if not names:
            raise CelError(f"{self._text!r}: has() takes a field")
        for name in names[:-1]:
            code = _field(code, name)
        return lambda env: names[-1] in code(env)


def _named(name: str) -> Code:
    if name in ("true", "false"):
        return lambda env: name == "true"
    if name in _TYPES:
        return lambda env: _TYPES[name]

    def value(env: Env) -> Any:
        if name not in env:
            raise CelError(f"undeclared reference to '{name}'")
        return env[name]

    return value


def _field(code: Code, name: str) -> Code:
    def value(env: Env) -> Any:
        owner = code(env)
        if not isinstance(owner, dict) or name not in owner:
            raise CelError(f"no such key: {name}")
        return owner[name]

    return value


def _item(code: Code, key: Code) -> Code:
    def value(env: Env) -> Any:
        try:
            return code(env)[key(env)]
        except (KeyError, IndexError, TypeError) as error:
            raise CelError(f"no such key: {error}") from None

    return value


def _either(left: Code, right: Code, *, decides: bool) -> Code:
    """`||` or `&&`: a side that decides makes an error of the other one unimportant."""

    def value(env: Env) -> bool:
        try:
            first = left(env)
        except CelError:
            if right(env) is decides:
                return decides
            raise
        return decides if first is decides else bool(right(env))

    return value


def _compared(sign: str, left: Code, right: Code) -> Code:
    if sign in ("==", "!="):
        return lambda env: same(left(env), right(env)) is (sign == "==")
    if sign == "in":
        return lambda env: any(same(left(env), each) for each in right(env))

    def value(env: Env) -> bool:
        first, second = left(env), right(env)
        if type(first) is not type(second):
            raise CelError("no such overload")
        return bool(_ORDER[sign](first, second))

    return value


def _added(left: Code, right: Code) -> Code:
    def value(env: Env) -> Any:
        first, second = left(env), right(env)
        if type(first) is not type(second) or isinstance(first, dict | bool):
            raise CelError("no such overload")
        return first + second

    return value

"""Calico's selector language, read by recursive descent straight from its grammar."""
import functools
import re

LABEL = re.compile(r"[A-Za-z0-9_./-]+")
STRING = re.compile(r"\"[^\"]*\"|'[^']*'")
BLANK = re.compile(r"[ \t]*")
# The operators that are words; they need something after them that is no part of a label.
WORDS = [(re.compile(pattern + r"(?![A-Za-z0-9_./-])"), name) for pattern, name in (
    (r"contains", "contains"), (r"starts[ \t]*with", "starts"), (r"ends[ \t]*with", "ends"),
    (r"not[ \t]*in", "not in"), (r"in", "in"))]


class Wrong(Exception):
    """The selector is not one."""


class Parser:
    def __init__(self, text):
        self.text, self.at = text, 0

    def blank(self):
        self.at = BLANK.match(self.text, self.at).end()

    def take(self, pattern):
        """What matches here, after blanks, or None. A pattern is a string or an expression."""
        self.blank()
        if isinstance(pattern, str):
            found = pattern if self.text.startswith(pattern, self.at) else None
        else:
            match = pattern.match(self.text, self.at)
            found = match and match.group()
        if found is not None:
            self.at += len(found)
        return found

    def need(self, pattern):
        found = self.take(pattern)
        if found is None:
            raise Wrong(f"{self.text!r} at {self.at}: expected {pattern}")
        return found

    def whole(self):
        self.blank()
        if self.at == len(self.text):
            return lambda labels, is_global: True
        tree = self.either()
        self.blank()
        if self.at != len(self.text):
            raise Wrong(f"{self.text!r} at {self.at}: something is left")
        return tree

    def either(self):
        parts = [self.both()]
        while self.take("||"):
            parts.append(self.both())
        return lambda labels, is_global: any(part(labels, is_global) for part in parts)

    def both(self):
        parts = [self.unary()]
        while self.take("&&"):
            parts.append(self.unary())
        return lambda labels, is_global: all(part(labels, is_global) for part in parts)

    def unary(self):
        if self.take("!"):
            inner = self.unary()
            return lambda labels, is_global: not inner(labels, is_global)
        return self.primary()

    def primary(self):
        if self.take("("):
            inner = self.either()
            self.need(")")
            return inner
        if self.take("all()"):
            return lambda labels, is_global: True
        if self.take("global()"):
            return lambda labels, is_global: is_global
        if self.take("has("):
            name = self.need(LABEL)
            self.need(")")
            return lambda labels, is_global: name in labels
        return self.comparison(self.need(LABEL))

    def comparison(self, name):
        if self.take("=="):
            value = self.string()
            return lambda labels, is_global: labels.get(name) == value
        if self.take("!="):
            value = self.string()
            return lambda labels, is_global: labels.get(name) != value
        for pattern, word in WORDS:
            if not self.take(pattern):
                continue
            if word in ("in", "not in"):
                values, wanted = self.set(), word == "in"
                return lambda labels, is_global: (labels.get(name) in values) == wanted
            value = self.string()
            test = {"contains": str.__contains__, "starts": str.startswith, "ends": str.endswith}[word]
            return lambda labels, is_global: name in labels and test(labels[name], value)
        raise Wrong(f"{self.text!r} at {self.at}: expected operator after label")

    def string(self):
        return self.need(STRING)[1:-1]

    def set(self):
        self.need("{")
        values = set()
        while not self.take("}"):
            values.add(self.string())
            if not self.take(","):
                self.need("}")
                break
        return values


@functools.lru_cache(maxsize=4096)
def parse(text):
    return Parser(text).whole()


def matches(text, labels, is_global=True):
    """Does the selector match these labels? `is_global` is what `global()` means for their owner."""
    return parse(text or "")(labels, is_global)

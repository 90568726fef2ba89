"""At which line of a TOML text each key stands, which `tomllib` does not tell.

`key_lines` walks a text that `tomllib` has already accepted, so it checks nothing. It knows nothing of what keys mean.
"""

from __future__ import annotations

import tomllib

KeyPath = tuple[str | int, ...]

_BARE_END = set(" \t.=]},\r\n")
_SCALAR_END = set(",]}#\r\n")


def key_lines(text: str) -> dict[KeyPath, int]:
    """Text of a valid TOML document → path of every key, table and array element → its line, from 1."""
    return _Walk(text).document()


class _Walk:
    def __init__(self, text: str) -> None:
        self.text, self.at, self.lines = text + "\n", 0, {}
        self.arrays: dict[KeyPath, int] = {}  # array of tables → index of the element now open

    def document(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        while self.skip_blank():
            if self.peek() == "[":
                table = self.header()
            else:
                self.pair(table)
        return self.lines

    def peek(self, n: int = 1) -> str:
        return self.text[self.at : self.at + n]

    def note(self, path: KeyPath) -> None:
        self.lines.setdefault(path, self.text.count("\n", 0, self.at) + 1)

    def skip_blank(self) -> bool:
        """Past white space, line ends and comments; False at the end."""
        while self.at < len(self.text):
            if self.text[self.at] in " \t\r\n":
                self.at += 1
            elif self.text[self.at] == "#":
                self.at = self.text.index("\n", self.at)
            else:
                return True
        return False

    def header(self) -> KeyPath:
        is_array = self.peek(2) == "[["
        self.at += 2 if is_array else 1
        keys, path = self.dotted_key(), ()
        for i, key in enumerate(keys):
            path += (key,)
            if is_array and i == len(keys) - 1:
                self.note(path)
                self.arrays[path] = self.arrays.get(path, -1) + 1
            if path in self.arrays:
                path += (self.arrays[path],)
            self.note(path)
        self.at += 2 if is_array else 1
        return path

    def pair(self, table: KeyPath) -> None:
        for key in self.dotted_key():
            table += (key,)
            self.note(table)
        self.at = self.text.index("=", self.at) + 1
        self.value(table)

    def dotted_key(self) -> list[str]:
        keys = []
        while True:
            self.skip_blank()
            keys.append(self.key())
            self.skip_blank()
            if self.peek() != ".":
                return keys
            self.at += 1

    def key(self) -> str:
        start = self.at
        if self.peek() in "\"'":
            self.string()
            return tomllib.loads("k = " + self.text[start : self.at])["k"]
        while self.text[self.at] not in _BARE_END:
            self.at += 1
        return self.text[start : self.at]

    def string(self) -> None:
        quote = self.peek()
        quote = quote * 3 if self.peek(3) == quote * 3 else quote
        self.at += len(quote)
        while self.peek(len(quote)) != quote:
            self.at += 2 if quote[0] == '"' and self.peek() == "\\" else 1
        self.at += len(quote)
        while len(quote) == 3 and self.peek() == quote[0]:  # up to two quotes may stand right before the closing three
            self.at += 1

    def value(self, path: KeyPath) -> None:
        self.skip_blank()
        first = self.peek()
        if first in "\"'":
            self.string()
        elif first == "[":
            self.array(path)
        elif first == "{":
            self.inline_table(path)
        else:
            while self.text[self.at] not in _SCALAR_END:
                self.at += 1

    def array(self, path: KeyPath) -> None:
        self.at += 1
        index = 0
        while self.skip_blank() and self.peek() != "]":
            self.note((*path, index))
            self.value((*path, index))
            index += 1
            self.skip_blank()
            self.at += self.peek() == ","
        self.at += 1

    def inline_table(self, path: KeyPath) -> None:
        self.at += 1
        while self.skip_blank() and self.peek() != "}":
            self.pair(path)
            self.skip_blank()
            self.at += self.peek() == ","
        self.at += 1

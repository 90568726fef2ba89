"""JSON objects → where the values at given paths lie, a batch at a time, without an object per value.

    records (Spans) ─► scan ─► kind, place, length and number of each wanted value, or "not sure" of the whole record

`scan` reads a record from end to end as strictly as a JSON parser does: grammar, UTF-8, escapes, sizes of numbers. It never
says what is wrong. Whatever it does not know to be right (malformed, a wanted key twice, an escaped key, nested beyond
`MAX_DEPTH`, numbers of very many digits) it leaves to a slower reader by "not sure", so every record that it takes is one
that msgspec decodes, with these values. Knows no platforms and no fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np

ABSENT, NULL, TEXT, ESCAPED, INT, FLOAT, OTHER = range(7)
"""Kinds of value. TEXT: without escapes, its span lies between the quotes; ESCAPED: with escapes, all of them plain (no
surrogates). INT, FLOAT: at most 18 digits, no exponent, not minus zero. OTHER: truth values, arrays, objects and the rest
of the numbers; the span is the whole of it."""

MAX_DEPTH = 32
MAX_DIGITS = 18
"""As many fit an int64."""

_MAX_ANY_DIGITS = 200  # of numbers that are only skipped: finite whatever they are

# Eight bytes at a time, as one little-endian word: a text ends within two or three steps instead of one a byte.
_LOW = np.uint64(0x0101010101010101)
_HIGH = np.uint64(0x8080808080808080)
_QUOTES = np.uint64(0x2222222222222222)
_BACKSLASHES = np.uint64(0x5C5C5C5C5C5C5C5C)
_SPACES = np.uint64(0x2020202020202020)
_ZERO, _ONE = np.uint64(0), np.uint64(1)
_HEX = np.full(256, -1, np.int64)
for _i, _c in enumerate(b"0123456789abcdef"):
    _HEX[_c] = _i
for _i, _c in enumerate(b"ABCDEF"):
    _HEX[_c] = 10 + _i
_PLAIN_ESCAPE = np.zeros(256, np.bool_)
_PLAIN_ESCAPE[list(b'"\\/bfnrt')] = True


# Without reference counts: nothing here makes an array, and counting each array of each call took half of the time.
_kernel = numba.njit(cache=True, nogil=True, _nrt=False)
_part = numba.njit(cache=True, nogil=True, _nrt=False, forceinline=True)
"""Of a kernel: a call would hand over each array as seven words or more."""


class Paths(NamedTuple):
    """The wanted paths as a tree: node 0 is the record, an edge is a key. Made by `compile_paths`."""

    nodes: np.ndarray
    """int32 (nodes + 1, 2): the first edge of each node (its last is before the next node's), the number of the path that
    ends at it or −1."""
    edges: np.ndarray
    """int32 (edges, 4): the node that it leads to, the key as a position in an array or −1, place and bytes in `keys`."""
    heads: np.ndarray
    """uint64 (edges,): the first eight bytes of the key, little-endian, zeros after a shorter one."""
    keys: np.ndarray
    """uint8."""


KIND, AT, LENGTH, MANTISSA, DECIMALS = range(5)
"""Columns of a token: the kind; place and bytes of the span; of INT and FLOAT the digits without the point, with the sign,
and how many of them stand behind the point. Of what is ABSENT only the kind means anything."""


def compile_paths(paths: Sequence[tuple[str | int, ...]]) -> Paths | None:
    """(L,) non-empty paths without repeats → their tree; None where two keys of one place are the same array position."""
    tree: list[dict[str, int]] = [{}]
    leaf = [-1]
    for number, path in enumerate(paths):
        node = 0
        for key in map(str, path):
            if key not in tree[node]:
                tree[node][key] = len(tree)
                tree.append({})
                leaf.append(-1)
            node = tree[node][key]
        leaf[node] = number
    nodes, edges, heads, keys = [], [], [], bytearray()
    for children, number in zip(tree, leaf, strict=True):
        nodes.append((len(edges), number))
        positions = [p for p in map(_position, children) if p >= 0]
        if len(set(positions)) < len(positions):
            return None
        for key, child in children.items():
            name = key.encode()
            edges.append((child, _position(key), len(keys), len(name)))
            heads.append(int.from_bytes(name[:8], "little"))
            keys += name
    nodes.append((len(edges), -1))
    return Paths(
        nodes=np.array(nodes, np.int32),
        edges=np.array(edges, np.int32),
        heads=np.array(heads, np.uint64),
        keys=np.frombuffer(bytes(keys), np.uint8),
    )


def _position(key: str) -> int:
    return int(key) if key.isascii() and key.isdigit() and len(key) < 7 else -1


def scan(buffer: np.ndarray, at: np.ndarray, length: np.ndarray, paths: Paths, tokens: np.ndarray) -> np.ndarray:
    """Records `buffer[at:at + length]` (uint8 (B,), int64 (n,), int32 (n,); length −1: null) → bool (n,), whether a record
    is sure; only of those that are, `tokens` (n, L, 5) int64 is filled: what lies at each of the L paths.

    Every span with a length from 0 up must lie within the buffer.
    """
    nodes, edges = len(paths.nodes), len(paths.edges)
    sure = np.empty(len(at), np.bool_)
    seen, guesses = np.zeros(nodes, np.bool_), np.zeros(edges + nodes, np.int64)
    stack, token = np.empty((MAX_DEPTH, 4), np.int64), np.empty(3, np.int64)
    _scan(buffer, at, length, *paths, seen, guesses, stack, token, sure, tokens)
    return sure


@_kernel
def _scan(buffer, at_N, length_N, nodes, edges, heads, keys, seen, guesses, stack, token, sure_N, tokens):
    for i in range(at_N.size):
        ok = length_N[i] > 0
        if ok:
            end = at_N[i] + length_N[i]
            ok = _scan_one(buffer, at_N[i], end, nodes, edges, heads, keys, guesses, tokens, i, seen, stack, token)
        sure_N[i] = ok


@_part
def _scan_one(buffer, i, end, nodes, edges, heads, keys, guesses, tokens, row, seen, stack, token):
    """One record. `stack` holds (node, is array, elements so far, start) of the containers around."""
    for k in range(seen.size):
        seen[k] = False
    for k in range(tokens.shape[1]):
        tokens[row, k, KIND] = ABSENT
    while i < end and _is_space(buffer[i]):
        i += 1
    if i >= end or buffer[i] != 123:
        return False
    depth, node, in_array, element, start = 0, 0, False, 0, i
    before = edges.shape[0]
    i += 1
    after = 0  # 0: a container has begun; 1: a comma; 2: an item
    while True:
        while i < end and _is_space(buffer[i]):
            i += 1
        if i >= end:
            return False
        c = buffer[i]
        if after == 2 and c == 44:
            after = 1
            i += 1
            continue
        if after != 1 and c == (93 if in_array else 125):
            i += 1
            if node >= 0 and nodes[node, 1] >= 0:
                _put(tokens, row, nodes[node, 1], OTHER, start, i - start, 0, 0)
            if depth == 0:
                break
            depth -= 1
            node, in_array, element, start = stack[depth, 0], stack[depth, 1] == 1, stack[depth, 2], stack[depth, 3]
            after = 2
            continue
        if after == 2:
            return False
        child = -1
        if in_array:
            if node >= 0:
                child = _element(nodes, edges, node, element)
            element += 1
        else:
            if c != 34:
                return False
            close = _text_end(buffer, i + 1, end, token)
            if close < 0 or token[0] != 0:
                return False  # an escaped key may be a wanted one
            if node >= 0:
                edge = _member(nodes, edges, heads, keys, guesses, node, before, buffer, i + 1, close - i - 1)
                if edge >= 0:
                    child, before = edges[edge, 0], edge
            i = close + 1
            while i < end and _is_space(buffer[i]):
                i += 1
            if i >= end or buffer[i] != 58:
                return False
            i += 1
            while i < end and _is_space(buffer[i]):
                i += 1
            if i >= end:
                return False
            c = buffer[i]
        leaf = -1
        if child >= 0:
            if seen[child]:
                return False  # the last of two would count
            seen[child] = True
            leaf = nodes[child, 1]
        if c == 123 or c == 91:
            if depth == MAX_DEPTH:
                return False
            stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3] = node, in_array, element, start
            depth += 1
            node, in_array, element, start = child, c == 91, 0, i
            if child >= 0:
                before = edges.shape[0] + child
            i += 1
            after = 0
            continue
        kind, begin = OTHER, i
        if c == 34:
            close = _text_end(buffer, i + 1, end, token)
            if close < 0:
                return False
            if leaf >= 0:
                _put(tokens, row, leaf, TEXT if token[0] == 0 else ESCAPED, i + 1, close - i - 1, 0, 0)
            i = close + 1
        elif c == 45 or 48 <= c <= 57:
            kind, i = _number_end(buffer, i, end, token)
            if i < 0:
                return False
            if leaf >= 0:
                _put(tokens, row, leaf, kind, begin, i - begin, token[1], token[2])
        else:
            size = _word(buffer, i, end)
            if size == 0:
                return False
            i += size
            if leaf >= 0:
                _put(tokens, row, leaf, NULL if c == 110 else OTHER, begin, size, 0, 0)
        after = 2
    while i < end and _is_space(buffer[i]):
        i += 1
    return i == end


@_part
def _is_space(c):
    return c == 32 or c == 10 or c == 13 or c == 9


@_part
def _put(tokens, row, leaf, kind, at, length, mantissa, decimals):
    tokens[row, leaf, KIND] = kind
    tokens[row, leaf, AT] = at
    tokens[row, leaf, LENGTH] = length
    tokens[row, leaf, MANTISSA] = mantissa
    tokens[row, leaf, DECIMALS] = decimals


@_part
def _element(nodes, edges, node, element):
    for e in range(nodes[node, 0], nodes[node + 1, 0]):
        if edges[e, 1] == element:
            return edges[e, 0]
    return -1


@_part
def _member(nodes, edges, heads, keys, guesses, node, before, buffer, at, length):
    """The edge of the key at `at`, −1 where it is not wanted. `before`: the edge found before it in this object, or that
    of none. Records of one platform have their keys in one order, so the edge that followed last time is tried first."""
    head = np.uint64(0)
    if at + 8 <= buffer.size:
        head = _eight(buffer, at)
        if length < 8:
            head &= (_ONE << np.uint64(8 * length)) - _ONE
    else:
        for j in range(min(length, 8)):
            head |= np.uint64(buffer[at + j]) << np.uint64(8 * j)
    first, last = nodes[node, 0], nodes[node + 1, 0]
    guess = guesses[before]
    if first <= guess < last and heads[guess] == head and _is_key(edges, keys, guess, buffer, at, length):
        return guess
    for e in range(first, last):
        if heads[e] == head and _is_key(edges, keys, e, buffer, at, length):
            guesses[before] = e
            return e
    return -1


@_part
def _is_key(edges, keys, edge, buffer, at, length):
    """Whether it is the whole key, once the first eight bytes are."""
    same = edges[edge, 3] == length
    j = 8
    while same and j < length:
        same = buffer[at + j] == keys[edges[edge, 2] + j]
        j += 1
    return same


@_part
def _eight(buffer, i):
    k = np.uint64(i)  # an index without a sign need not be checked for being below zero: one load instead of eight
    return (
        np.uint64(buffer[k])
        | np.uint64(buffer[k + np.uint64(1)]) << np.uint64(8)
        | np.uint64(buffer[k + np.uint64(2)]) << np.uint64(16)
        | np.uint64(buffer[k + np.uint64(3)]) << np.uint64(24)
        | np.uint64(buffer[k + np.uint64(4)]) << np.uint64(32)
        | np.uint64(buffer[k + np.uint64(5)]) << np.uint64(40)
        | np.uint64(buffer[k + np.uint64(6)]) << np.uint64(48)
        | np.uint64(buffer[k + np.uint64(7)]) << np.uint64(56)
    )


@_part
def _text_end(buffer, i, end, token):
    """The place of the closing quote, −1 where the text is not right. token[0]: whether it holds escapes."""
    token[0] = 0
    while i < end:
        if i + 8 <= buffer.size:
            word = _eight(buffer, i)
            quote, backslash = word ^ _QUOTES, word ^ _BACKSLASHES
            # The lowest bit that is set stands for the first byte that is a quote, a backslash, a control or no ASCII.
            special = (
                ((quote - _LOW) & ~quote) | ((backslash - _LOW) & ~backslash) | ((word - _SPACES) & ~word) | word
            ) & _HIGH
            if special == _ZERO:
                i += 8
                continue
            below = (special & (~special + _ONE)) - _ONE
            i += np.int64(((below & _LOW) * _LOW) >> np.uint64(56)) - 1
            if i >= end:
                return -1
        c = buffer[i]
        if c == 34:
            return i
        if c == 92:
            token[0] = 1
            i += 1
            if i >= end:
                return -1
            if _PLAIN_ESCAPE[buffer[i]]:
                i += 1
            elif buffer[i] == 117:
                if i + 4 >= end:
                    return -1
                high = _HEX[buffer[i + 1]] * 16 + _HEX[buffer[i + 2]]
                low = _HEX[buffer[i + 3]] | _HEX[buffer[i + 4]]
                if _HEX[buffer[i + 1]] < 0 or _HEX[buffer[i + 2]] < 0 or low < 0 or 0xD8 <= high <= 0xDF:
                    return -1
                i += 5
            else:
                return -1
        elif c < 32:
            return -1
        elif c < 128:
            i += 1
        else:
            size = _character(buffer, i, end)
            if size == 0:
                return -1
            i += size
    return -1


@_part
def _character(buffer, i, end):
    """Bytes of the UTF-8 character of more than one byte at i, 0 where it is none (overlong, a surrogate, cut off)."""
    c = buffer[i]
    if 0xC2 <= c <= 0xDF:
        size, low, high = 2, 0x80, 0xBF
    elif 0xE0 <= c <= 0xEF:
        size, low, high = 3, 0xA0 if c == 0xE0 else 0x80, 0x9F if c == 0xED else 0xBF
    elif 0xF0 <= c <= 0xF4:
        size, low, high = 4, 0x90 if c == 0xF0 else 0x80, 0x8F if c == 0xF4 else 0xBF
    else:
        return 0
    if i + size > end or not low <= buffer[i + 1] <= high:
        return 0
    for j in range(2, size):
        if buffer[i + j] & 0xC0 != 0x80:
            return 0
    return size


@_part
def _number_end(buffer, i, end, token):
    """→ (kind, the place after the number, −1 where it is none). token[1], token[2]: mantissa and decimals."""
    minus = buffer[i] == 45
    if minus:
        i += 1
    first = i
    mantissa = 0
    while i < end and 48 <= buffer[i] <= 57 and i - first <= _MAX_ANY_DIGITS:
        if i - first < MAX_DIGITS:
            mantissa = mantissa * 10 + (np.int64(buffer[i]) - 48)
        i += 1
    digits = i - first
    if digits == 0 or (digits > 1 and buffer[first] == 48) or digits > _MAX_ANY_DIGITS:
        return OTHER, -1
    kind, decimals = INT, 0
    if i < end and buffer[i] == 46:
        kind = FLOAT
        i += 1
        while i < end and 48 <= buffer[i] <= 57 and decimals <= _MAX_ANY_DIGITS:
            if digits + decimals < MAX_DIGITS:
                mantissa = mantissa * 10 + (np.int64(buffer[i]) - 48)
            decimals += 1
            i += 1
        if decimals == 0 or decimals > _MAX_ANY_DIGITS:
            return OTHER, -1
    if digits + decimals > MAX_DIGITS or (minus and mantissa == 0):
        kind = OTHER
    if i < end and (buffer[i] == 101 or buffer[i] == 69):
        kind = OTHER
        i += 1
        if i < end and (buffer[i] == 43 or buffer[i] == 45):
            i += 1
        first = i
        while i < end and 48 <= buffer[i] <= 57 and i - first < 3:
            i += 1
        if not 1 <= i - first <= 2:
            return OTHER, -1  # three digits may be beyond the doubles
    token[1] = -mantissa if minus else mantissa
    token[2] = decimals if kind == FLOAT else 0
    return kind, i


@_part
def _word(buffer, i, end):
    """Bytes of the `true`, `false` or `null` at i, 0 where there is none."""
    if i + 4 <= end:
        a, b, c, d = buffer[i], buffer[i + 1], buffer[i + 2], buffer[i + 3]
        if (a == 116 and b == 114 and c == 117 and d == 101) or (a == 110 and b == 117 and c == 108 and d == 108):
            return 4
        if a == 102 and b == 97 and c == 108 and d == 115 and i + 5 <= end and buffer[i + 4] == 101:
            return 5
    return 0

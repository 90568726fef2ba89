"""Compiled kernels of the codec: canonical events out of JSON bytes, score records into JSON bytes, xxh3 of short strings.

    parse_events    bytes of n records ─► EVENT (n,), spans of three texts, sure (n,)       reads nothing beyond the buffer
    number_names    spans and hashes of names ─► 0, 1, 2, … by first appearance
    write_scores    columns of scores and spans of texts ─► JSON of k records, one after another

`parse_events` is sure only of what it has read to the last byte by the plainest rules of JSON; whatever else it finds
(an escape, an exponent, a nested value, a wrong type, bytes that are no UTF-8 …) it leaves to the caller, who asks the
general decoder about that one record. So it never decides that a record is bad.

Knows the bytes of the two formats; not msgspec, Kafka, rows or models. Little-endian machines only, like EVENT.
Shapes: N records, K of them scored.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from models.events import KINDS, MAX_ID, MAX_TEXT, PRICE_EDGES, PSEUDONYM_LENGTH

MAX_QUANTITY = 1e9
MAX_TS = 253402300799999
MAX_HASHED_BYTES = 240
"""Longest string that `hash_bytes` takes: beyond it, xxh3 is another algorithm."""

# ── bytes and words ──────────────────────────────────────────────────────────────────────────────────────────────────
# Positions are addresses, from `_address` of an array that the caller of a kernel holds: an array handed from function to
# function costs more than what these do. Nothing here checks a bound; each caller says why it stays inside.

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BLOCK = ir.VectorType(_I8, 16)


@intrinsic
def _address(typing_context, array):
    """Where the first element lies."""

    def build(context, builder, signature, arguments):
        return builder.ptrtoint(context.make_array(signature.args[0])(context, builder, arguments[0]).data, _I64)

    return types.int64(array), build


def _load(builder, address, loaded):
    return builder.load(builder.inttoptr(address, loaded.as_pointer()), align=1)


@intrinsic
def _byte(typing_context, address):
    def build(context, builder, signature, arguments):
        return builder.zext(_load(builder, *arguments, _I8), _I64)

    return types.int64(types.int64), build


@intrinsic
def _word32(typing_context, address):
    """4 bytes, little-endian."""

    def build(context, builder, signature, arguments):
        return builder.zext(_load(builder, *arguments, _I32), _I64)

    return types.uint64(types.int64), build


@intrinsic
def _word(typing_context, address):
    """8 bytes, little-endian."""

    def build(context, builder, signature, arguments):
        return _load(builder, *arguments, _I64)

    return types.uint64(types.int64), build


@intrinsic
def _put_byte(typing_context, address, byte):
    def build(context, builder, signature, arguments):
        address, byte = arguments
        builder.store(builder.trunc(byte, _I8), builder.inttoptr(address, _I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def _put_word(typing_context, address, word):
    """Writes 8 bytes."""

    def build(context, builder, signature, arguments):
        address, word = arguments
        builder.store(word, builder.inttoptr(address, _I64.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint64), build


@intrinsic
def _copy_block(typing_context, to, source):
    """Copies 16 bytes."""

    def build(context, builder, signature, arguments):
        to, source = arguments
        builder.store(_load(builder, source, _BLOCK), builder.inttoptr(to, _BLOCK.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def _not_plain(typing_context, address):
    """Bit j says that the j-th of 16 bytes is no plain character of a JSON string: a quote, a backslash, a control
    character or not ASCII."""

    def build(context, builder, signature, arguments):
        block = _load(builder, *arguments, _BLOCK)
        found = builder.icmp_signed("<", block, ir.Constant(_BLOCK, [0x20] * 16))  # bytes over 0x7F are negative
        for character in b'"\\':
            same = builder.icmp_unsigned("==", block, ir.Constant(_BLOCK, [character] * 16))
            found = builder.or_(found, same)
        return builder.zext(builder.bitcast(found, _I16), _I64)

    return types.int64(types.int64), build


@intrinsic
def _lowest_bit(typing_context, bits):
    """Position of the lowest bit set; `bits` is not 0."""

    def build(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), build


@intrinsic
def _folded_product(typing_context, a, b):
    """The two halves of the 128-bit product, xored."""

    def build(context, builder, signature, arguments):
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(argument, wide) for argument in arguments))
        high = builder.lshr(product, ir.Constant(wide, 64))
        return builder.xor(builder.trunc(product, _I64), builder.trunc(high, _I64))

    return types.uint64(types.uint64, types.uint64), build


@intrinsic
def _swapped(typing_context, word):
    """The 8 bytes in the other order."""

    def build(context, builder, signature, arguments):
        return builder.bswap(arguments[0])

    return types.uint64(types.uint64), build


# ── xxh3, 64 bits, seed 0 ────────────────────────────────────────────────────────────────────────────────────────────

_U = np.uint64
_P64_1, _P64_2, _P64_3 = _U(0x9E3779B185EBCA87), _U(0xC2B2AE3D27D4EB4F), _U(0x165667B19E3779F9)
_P_AVALANCHE, _P_SHORT = _U(0x165667919E3779F9), _U(0x9FB21C651E98DF25)
_SECRET = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e"
        "e03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a"
        "51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8f"
        "f8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
    ),
    np.uint8,
)


def _secret(at: int, length: int = 8) -> np.uint64:
    return _U(int.from_bytes(_SECRET[at : at + length].tobytes(), "little"))


_FLIP_1_3 = _secret(0, 4) ^ _secret(4, 4)
_FLIP_4_8 = _secret(8) ^ _secret(16)
_FLIP_LOW, _FLIP_HIGH = _secret(24) ^ _secret(32), _secret(40) ^ _secret(48)


@njit(forceinline=True)
def _avalanche(h):
    h = (h ^ (h >> _U(37))) * _P_AVALANCHE
    return h ^ (h >> _U(32))


@njit(forceinline=True)
def _mix(at, secret):
    return _folded_product(_word(at) ^ _word(secret), _word(at + 8) ^ _word(secret + 8))


@njit(forceinline=True)
def _hash(at, n, secret):
    """xxh3_64 of the n bytes (1 … MAX_HASHED_BYTES) from `at`; reads no other."""
    length = _U(n)
    if n <= 3:
        first, middle, last = _U(_byte(at)), _U(_byte(at + (n >> 1))), _U(_byte(at + n - 1))
        h = ((first << _U(16)) | (middle << _U(24)) | last | (length << _U(8))) ^ _FLIP_1_3
        h = (h ^ (h >> _U(33))) * _P64_2
        h = (h ^ (h >> _U(29))) * _P64_3
        return h ^ (h >> _U(32))
    if n <= 8:
        h = (_word32(at + n - 4) + (_word32(at) << _U(32))) ^ _FLIP_4_8
        h ^= ((h << _U(49)) | (h >> _U(15))) ^ ((h << _U(24)) | (h >> _U(40)))
        h *= _P_SHORT
        h = (h ^ ((h >> _U(35)) + length)) * _P_SHORT
        return h ^ (h >> _U(28))
    if n <= 16:
        low, high = _word(at) ^ _FLIP_LOW, _word(at + n - 8) ^ _FLIP_HIGH
        return _avalanche(length + _swapped(low) + high + _folded_product(low, high))
    h = length * _P64_1
    if n <= 128:
        for i in range((n - 1) // 32, -1, -1):  # from both ends inwards
            h += _mix(at + 16 * i, secret + 32 * i)
            h += _mix(at + n - 16 * (i + 1), secret + 32 * i + 16)
        return _avalanche(h)
    for i in range(8):
        h += _mix(at + 16 * i, secret + 16 * i)
    h = _avalanche(h)
    for i in range(8, n // 16):
        h += _mix(at + 16 * i, secret + 16 * (i - 8) + 3)
    return _avalanche(h + _mix(at + n - 16, secret + 136 - 17))


@njit(cache=True, nogil=True)
def hash_bytes(text_B: np.ndarray) -> int:
    """xxh3_64 of 1 … MAX_HASHED_BYTES bytes (uint8). Raises ValueError for others."""
    if not 1 <= len(text_B) <= MAX_HASHED_BYTES:
        raise ValueError("hash_bytes takes 1 to 240 bytes")
    return _hash(_address(text_B), len(text_B), _address(_SECRET))


# ── parsing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# Positions run from `at` to `end`, both inside the buffer. Blocks and words may reach beyond `end`, into the next
# record, but never beyond the buffer; what is found there counts as not found.

_UNSURE = -1
_NONE = -1
_QUOTE, _BACKSLASH, _COMMA, _COLON, _OPEN, _CLOSE, _MINUS, _POINT, _ZERO, _NULL = b'"\\,:{}-.0n'
_OPEN_LIST, _CLOSE_LIST = b"[]"
_SPACE, _TAB, _LINE, _RETURN = b" \t\n\r"


def _as_word(text: str) -> np.uint64:
    return _U(int.from_bytes(text.encode()[:8].ljust(8, b"\0"), "little"))


_EVENT_ID, _PLATFORM, _USER, _KIND, _TS, _ITEM, _CATEGORY = (
    _as_word(name) for name in ("event_id", "platform", "user", "kind", "ts", "item", "category")
)
_BRAND, _PRICE, _CURRENCY, _QUANTITY, _SESSION, _TEXT = (
    _as_word(name) for name in ("brand", "price", "currency", "quantity", "session", "text")
)
_KIND_WORD = np.array([_as_word(kind) for kind in KINDS], np.uint64)
_KIND_LENGTH = np.array([len(kind) for kind in KINDS], np.int64)
_KIND_TEXT = np.frombuffer(b"".join(kind.encode().ljust(16, b"\0") for kind in KINDS), np.uint8).reshape(len(KINDS), 16)

_MASK = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
"""_MASK[n]: the first n bytes of a word."""
_POWERS = 10.0 ** np.arange(23)
"""The powers of ten that are doubles without an error."""

_EDGES = np.array(PRICE_EDGES)
_CELL_SHIFT = _U(49)
_EDGES_BELOW = np.searchsorted(
    _EDGES, (np.arange(0x7FF << 3, dtype=np.uint64) << _CELL_SHIFT).view(np.float64), side="right"
).astype(np.uint8)
"""Of each eighth of an octave (a double's exponent and its first 3 bits): how many edges are at most its lower end."""

_SPREAD = _U(0x9E3779B97F4A7C15)
"""Of `models.events.event_hash`."""

(_SEEN_EVENT_ID, _SEEN_PLATFORM, _SEEN_USER, _SEEN_KIND, _SEEN_TS, _SEEN_ITEM, _SEEN_CATEGORY) = (1 << i for i in range(7))
(_SEEN_BRAND, _SEEN_PRICE, _SEEN_CURRENCY, _SEEN_QUANTITY, _SEEN_SESSION, _SEEN_TEXT) = (1 << i for i in range(7, 13))
_SEEN_NEEDED = _SEEN_EVENT_ID | _SEEN_PLATFORM | _SEEN_USER | _SEEN_KIND | _SEEN_TS


@njit(forceinline=True)
def _skip_space(i, end):
    while i < end:
        c = _byte(i)
        if c != _SPACE and c != _LINE and c != _TAB and c != _RETURN:
            break
        i += 1
    return i


@njit(forceinline=True)
def _is_tail(c):
    return 0x80 <= c <= 0xBF


@njit(forceinline=True)
def _character_bytes(i, end):
    """Bytes of the UTF-8 character at i, whose first byte is not ASCII; 0 where it is none or reaches `end`."""
    c = _byte(i)
    n = 2 if 0xC2 <= c <= 0xDF else 3 if 0xE0 <= c <= 0xEF else 4 if 0xF0 <= c <= 0xF4 else 0
    if n == 0 or i + n > end:
        return 0
    second = _byte(i + 1)
    # Not longer than need be, no surrogate, nothing beyond U+10FFFF.
    low = 0xA0 if c == 0xE0 else 0x90 if c == 0xF0 else 0x80
    high = 0x9F if c == 0xED else 0x8F if c == 0xF4 else 0xBF
    if not low <= second <= high:
        return 0
    if n >= 3 and not _is_tail(_byte(i + 2)):
        return 0
    if n == 4 and not _is_tail(_byte(i + 3)):
        return 0
    return n


@njit(forceinline=True)
def _string_end(i, end, limit):
    """From just after the opening quote → (position of the closing one, characters between them), or _UNSURE."""
    start, tails, last_block = i, 0, limit - 16
    while i < end:
        if i <= last_block:
            found = _not_plain(i)
            if found == 0:
                i += 16
                continue
            i += _lowest_bit(found)
            if i >= end:
                break
        c = _byte(i)
        if c == _QUOTE:
            return i, i - start - tails
        if c == _BACKSLASH or c < 0x20:
            break
        if c < 0x80:
            i += 1
            continue
        n = _character_bytes(i, end)
        if n == 0:
            break
        i += n
        tails += n - 1
    return _UNSURE, 0


@njit(forceinline=True)
def _digits(i, end, most):
    """→ (position after the digits, their value): at most `most`, else and for a leading zero _UNSURE."""
    start, value = i, 0
    while i < end:
        digit = _byte(i) - _ZERO
        if not 0 <= digit <= 9:
            break
        value = 10 * value + digit
        i += 1
        if i - start > most:
            return _UNSURE, 0
    n = i - start
    if n == 0 or (n > 1 and _byte(start) == _ZERO):
        return _UNSURE, 0
    return i, value


@njit(forceinline=True)
def _number(i, end):
    """→ (position after the number, its double), or _UNSURE. Sure of decimals whose double is one exact division."""
    negative = _byte(i) == _MINUS
    i, whole = _digits(i + negative, end, 15)
    if i < 0:
        return _UNSURE, 0.0
    decimals = 0
    if i < end and _byte(i) == _POINT:
        i += 1
        start = i
        while i < end:
            digit = _byte(i) - _ZERO
            if not 0 <= digit <= 9:
                break
            whole = 10 * whole + digit
            i += 1
            if whole >= 1 << 53 or i - start > 22:
                return _UNSURE, 0.0
        decimals = i - start
        if decimals == 0:
            return _UNSURE, 0.0
    if negative and whole == 0:
        return _UNSURE, 0.0
    value = whole / _POWERS[decimals]
    return i, -value if negative else value


@njit(forceinline=True)
def _literal_end(i, end):
    """→ position after null, true or false, or _UNSURE."""
    if i + 4 > end:
        return _UNSURE
    word = _word32(i)
    if word == _U(0x6C6C756E) or word == _U(0x65757274):
        return i + 4
    if i + 5 <= end and word == _U(0x736C6166) and _byte(i + 4) == 101:
        return i + 5
    return _UNSURE


@njit(forceinline=True)
def _is_null(i, end):
    return i + 4 <= end and _word32(i) == _U(0x6C6C756E)


@njit(forceinline=True)
def _kind(at, n, limit):
    """KIND_CODE of the n bytes from `at`, or _UNSURE."""
    if at + 8 > limit:
        return _UNSURE
    word = _word(at) & _MASK[min(n, 8)]
    for code in range(len(_KIND_WORD)):
        if n == _KIND_LENGTH[code] and word == _KIND_WORD[code]:
            for j in range(8, n):
                if _byte(at + j) != _KIND_TEXT[code, j]:
                    return _UNSURE
            return code
    return _UNSURE


@njit(forceinline=True)
def _price_bucket(price):
    """`models.events.price_bucket`."""
    if not price > 0.0:
        return 0
    cell = np.float64(price).view(np.uint64) >> _CELL_SHIFT
    bucket = np.int64(_EDGES_BELOW[cell])
    while bucket < len(_EDGES) and _EDGES[bucket] <= price:
        bucket += 1
    return max(bucket, 1)


@njit(forceinline=True)
def _hash32(at, n, secret):
    """`models.events.hash32` of n bytes, none for 0."""
    if n == 0:
        return np.uint32(0)
    h = np.uint32(_hash(at, n, secret) & _U(0xFFFFFFFF))
    return h if h != 0 else np.uint32(1)


@njit(forceinline=True)
def _parse(at, end, base, limit, key_at, key_length, event, spans_at, spans_length, platform_hash, i, secret):
    """One record, from `at` to `end` in a buffer from `base` to `limit`, into row i. False where it is unsure; the row
    then holds anything."""
    p = _skip_space(at, end)
    if p >= end or _byte(p) != _OPEN:
        return False
    p += 1
    seen = 0
    user_at, user_n, platform_at, platform_n, id_at, id_n = 0, 0, 0, 0, 0, 0
    item_at, item_n, category_at, category_n = 0, 0, 0, 0
    ts, kind, price, quantity = 0, 0, 0.0, 1.0
    last_word = limit - 8
    while True:
        p = _skip_space(p, end)
        if p >= end or _byte(p) != _QUOTE or p + 1 > last_word:
            return False
        name_at = p + 1
        p, _ = _string_end(name_at, end, limit)
        if p < 0:
            return False
        n = p - name_at
        name = _word(name_at) & _MASK[n] if n <= 8 else _U(0)
        p = _skip_space(p + 1, end)
        if p >= end or _byte(p) != _COLON:
            return False
        p = _skip_space(p + 1, end)
        if p >= end:
            return False
        # the value: a string [value_at, close) of so many characters, or none, or something else
        c = _byte(p)
        value_at, close, characters = p + 1, _NONE, 0
        if c == _QUOTE:
            close, characters = _string_end(value_at, end, limit)
            if close < 0:
                return False
            p = close + 1
        value_n = close - value_at
        field = 0
        if name == _EVENT_ID:
            field, most = _SEEN_EVENT_ID, MAX_ID
            id_at, id_n = value_at, value_n
        elif name == _PLATFORM:
            field, most = _SEEN_PLATFORM, 64
            platform_at, platform_n = value_at, value_n
        elif name == _USER:
            if characters != PSEUDONYM_LENGTH:
                return False
            field, most = _SEEN_USER, PSEUDONYM_LENGTH
            user_at, user_n = value_at, value_n
        elif name == _KIND:
            if c != _QUOTE:
                return False
            field, most = _SEEN_KIND, MAX_ID
            kind = _kind(value_at, value_n, limit)
            if kind < 0:
                return False
        elif name == _TS:
            if c == _QUOTE:
                return False
            p, ts = _digits(p, end, 15)
            if p < 0 or ts > MAX_TS:
                return False
            field, most = _SEEN_TS, MAX_ID
        elif name == _ITEM:
            field, most = _SEEN_ITEM, MAX_ID
            if c == _QUOTE:
                item_at, item_n = value_at, value_n
        elif name == _CATEGORY:
            field, most = _SEEN_CATEGORY, MAX_ID
            if c == _QUOTE:
                category_at, category_n = value_at, value_n
        elif name in (_PRICE, _QUANTITY):
            field, most = _SEEN_PRICE if name == _PRICE else _SEEN_QUANTITY, MAX_ID
            if c == _QUOTE:
                return False
            if c != _NULL:
                p, number = _number(p, end)
                if p < 0:
                    return False
                if name == _PRICE:
                    price = number
                elif not abs(number) <= MAX_QUANTITY:
                    return False
                else:
                    quantity = number
        elif name == _BRAND:
            field, most = _SEEN_BRAND, MAX_ID
        elif name == _CURRENCY:
            field, most = _SEEN_CURRENCY, 8
        elif name == _SESSION:
            field, most = _SEEN_SESSION, MAX_ID
        elif name == _TEXT:
            field, most = _SEEN_TEXT, MAX_TEXT
        if field == 0:  # a name that we do not know: its value only has to be one
            if c != _QUOTE:
                if c == _MINUS or _ZERO <= c <= _ZERO + 9:
                    p, _ = _number(p, end)
                else:
                    p = _literal_end(p, end)
                if p < 0:
                    return False
        else:
            if seen & field:
                return False
            seen |= field
            if c == _QUOTE:
                if characters > most:
                    return False
            elif c == _NULL:
                if field & _SEEN_NEEDED or not _is_null(p, end):
                    return False
                p += 4
            elif field != _SEEN_TS and field != _SEEN_PRICE and field != _SEEN_QUANTITY:
                return False
        p = _skip_space(p, end)
        if p >= end:
            return False
        c = _byte(p)
        p += 1
        if c == _CLOSE:
            break
        if c != _COMMA:
            return False
    if _skip_space(p, end) != end or seen & _SEEN_NEEDED != _SEEN_NEEDED:
        return False
    if id_n == 0 or platform_n == 0 or max(id_n, platform_n, item_n, category_n) > MAX_HASHED_BYTES:
        return False
    if user_n != PSEUDONYM_LENGTH or key_length != PSEUDONYM_LENGTH:
        return False
    for j in range(0, PSEUDONYM_LENGTH, 8):
        if _word(user_at + j) != _word(key_at + j):
            return False
    of_platform = _hash(platform_at, platform_n, secret)
    code = np.uint16(of_platform & _U(0xFFFF))
    if code == 0:
        code = np.uint16(1)
    platform_hash[i] = of_platform
    row = event[i]
    row["ts"] = ts
    row["id"] = _hash(id_at, id_n, secret) ^ (_U(code) * _SPREAD)
    row["item"] = _hash32(item_at, item_n, secret)
    row["category"] = _hash32(category_at, category_n, secret)
    row["quantity"] = quantity
    row["platform"] = code
    row["kind"] = kind
    row["price"] = _price_bucket(price)
    # with their quotes
    spans_at[i, 0], spans_length[i, 0] = id_at - 1 - base, id_n + 2
    spans_at[i, 1], spans_length[i, 1] = user_at - 1 - base, user_n + 2
    spans_at[i, 2], spans_length[i, 2] = platform_at - 1 - base, platform_n + 2
    return True


@njit(forceinline=True)
def _inside(at, length, size):
    """Whether a span lies in so many bytes. By a difference: a sum may overflow."""
    return at >= 0 and 0 <= length <= size and at <= size - length


@njit(cache=True, nogil=True)
def parse_events(
    keys: np.ndarray,
    key_at_N: np.ndarray,
    key_length_N: np.ndarray,
    text: np.ndarray,
    at_N: np.ndarray,
    length_N: np.ndarray,
    offset_N: np.ndarray,
    event_N: np.ndarray,
    spans_at_N3: np.ndarray,
    spans_length_N3: np.ndarray,
    platform_hash_N: np.ndarray,
    sure_N: np.ndarray,
) -> int:
    """Parses the values in `text` (uint8) into rows of EVENT, with the places in `text` of the JSON strings event_id,
    user and platform, and the hashes of the platforms' names. → how many of sure_N (N,) bool are True.

    Where sure_N is False, the other outputs hold anything. Raises ValueError where arrays do not fit together or a span
    lies outside of its buffer; a null (length −1) is never sure.
    """
    n = len(offset_N)
    fits = len(key_at_N) == n and len(key_length_N) == n and len(at_N) == n and len(length_N) == n and len(event_N) == n
    if not (fits and len(spans_at_N3) == n and len(spans_length_N3) == n and len(platform_hash_N) == n and len(sure_N) == n):
        raise ValueError("parse_events: the arrays are not of one length")
    base, secret, found = _address(text), _address(_SECRET), 0
    for i in range(n):
        at, key_at = at_N[i], key_at_N[i]
        sure_N[i] = False
        if length_N[i] < 0 or key_length_N[i] < 0:
            continue
        if not (_inside(at, length_N[i], len(text)) and _inside(key_at, key_length_N[i], len(keys))):
            raise ValueError("parse_events: a span lies outside of its buffer")
        event_N[i]["offset"] = offset_N[i]
        sure_N[i] = _parse(
            base + at, base + at + length_N[i], base, base + len(text), _address(keys) + key_at, key_length_N[i],
            event_N, spans_at_N3, spans_length_N3, platform_hash_N, i, secret,
        )  # fmt: skip
        found += sure_N[i]
    return found


@njit(forceinline=True)
def _place(base, extra_base, at):
    return base + at if at >= 0 else extra_base + ~at


@njit(forceinline=True)
def _same(a, b, n):
    different = 0
    for j in range(n):
        different |= _byte(a + j) ^ _byte(b + j)
    return different == 0


@njit(cache=True, nogil=True)
def number_names(
    text: np.ndarray,
    extra: np.ndarray,
    at_N: np.ndarray,
    length_N: np.ndarray,
    hash_N: np.ndarray,
    table: np.ndarray,
    number_N: np.ndarray,
    first_N: np.ndarray,
) -> int:
    """Numbers equal spans equally, by first appearance: number_N (N,) int32. → how many differ; first_N holds the row
    of the first of each. The bytes decide; their hashes only find them. `table`: int32, all −1, a power of two that is
    more than N. Spans are those of `write_scores`, inside their buffers."""
    n, mask, found = len(number_N), len(table) - 1, 0
    base, extra_base = _address(text), _address(extra)
    if len(at_N) != n or len(length_N) != n or len(hash_N) != n or len(first_N) != n or len(table) <= n:
        raise ValueError("number_names: the arrays do not fit together")
    for i in range(n):
        at, length = at_N[i], length_N[i]
        place = np.int64(hash_N[i] & _U(0x7FFFFFFF)) & mask
        while True:
            number = table[place]
            if number < 0:
                table[place] = number = found
                first_N[found] = i
                found += 1
                break
            other = first_N[number]
            if length_N[other] == length and _same(
                _place(base, extra_base, at), _place(base, extra_base, at_N[other]), length
            ):
                break
            place = (place + 1) & mask
        number_N[i] = number
    return found


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

BLOCK = 16
"""What is written may be followed by so many bytes of anything."""
NUMBER_BYTES = 24
"""Most bytes of one number."""

_MILLION = 1_000_000
_THREE = np.array([int.from_bytes(f"{n:03d}".encode(), "little") for n in range(1000)], np.uint64)
"""Three digits as the low bytes of a word."""
_ZERO_POINT = _U(int.from_bytes(b"0.", "little"))
_NULL_WORD = _U(int.from_bytes(b"null", "little"))

PIECES = (
    "start", "user", "platform", "ts", "p", "purchase", "return", "churn", "categories", "shift", "warm", "cold", "end"
)  # fmt: skip
"""The constant parts of a score record, in the order in which `write_scores` wants them; `warm` or `cold` is taken."""
_START, _P_USER, _P_PLATFORM, _P_TS, _P_P, _P_PURCHASE, _P_RETURN, _P_CHURN, _P_CATEGORIES, _P_SHIFT, _WARM, _COLD, _END = (
    range(len(PIECES))
)


@njit(forceinline=True)
def _put(o, at, n, limit):
    """Copies n bytes from `at`, in a buffer that ends at `limit`, to `o`, where BLOCK bytes more may be written.
    → the position after them."""
    if at + ((n + 15) & ~15) <= limit:
        for j in range(0, n, 16):
            _copy_block(o + j, at + j)
    else:
        for j in range(n):
            _put_byte(o + j, _byte(at + j))
    return o + n


@njit(forceinline=True)
def _put_piece(o, pieces, piece_at, piece):
    """Copies one of the pieces, which a block may be read beyond."""
    start = piece_at[piece]
    for j in range(0, piece_at[piece + 1] - start, 16):
        _copy_block(o + j, pieces + start + j)
    return o + piece_at[piece + 1] - start


@njit(forceinline=True)
def _put_integer(o, value):
    """Writes a value ≥ 0. → the position after it."""
    rest, digits = _U(value), 1
    power = _U(10)
    while digits < 19 and rest >= power:
        digits += 1
        power *= _U(10)
    i = o + digits
    while i - o >= 3:
        next_ = rest // _U(1000)
        three = _THREE[rest - next_ * _U(1000)]
        i -= 3
        for j in range(3):
            _put_byte(i + j, np.int64(three >> _U(8 * j)))
        rest = next_
    while i > o:
        i -= 1
        next_ = rest // _U(10)
        _put_byte(i, np.int64(_U(_ZERO) + rest - next_ * _U(10)))
        rest = next_
    return o + digits


@njit(forceinline=True)
def _put_millionths(o, millionths):
    """Writes so many millionths, as six decimals; NaN and infinity as null. → the position after it, or −1 where they
    are too many. An exact integer over 10⁶ is the double that both a division and a reader of the text come to."""
    if 0.0 < millionths < _MILLION:
        n = np.int64(millionths)
        high = n // 1000
        _put_word(o, _ZERO_POINT | (_THREE[high] << _U(16)) | (_THREE[n - 1000 * high] << _U(40)))
        return o + 8
    if not np.isfinite(millionths):
        _put_word(o, _NULL_WORD)
        return o + 4
    if not abs(millionths) < 9e18:
        return -1
    if np.signbit(millionths):
        _put_byte(o, _MINUS)
        o += 1
    n = np.int64(abs(millionths))
    whole = n // _MILLION
    o = _put_integer(o, whole)
    _put_byte(o, _POINT)
    o += 1
    n -= whole * _MILLION
    high = n // 1000
    _put_word(o, _THREE[high] | (_THREE[n - 1000 * high] << _U(24)))
    return o + 6


@njit(forceinline=True)
def _millionths(x):
    """x · 10⁶, rounded as numpy rounds."""
    return np.rint(np.float64(x) * 1e6)


@njit(cache=True, nogil=True)
def write_scores(
    text: np.ndarray,
    extra: np.ndarray,
    spans_at_N3: np.ndarray,
    spans_length_N3: np.ndarray,
    event_N: np.ndarray,
    take_K: np.ndarray,
    p_N3: np.ndarray,
    category_N5: np.ndarray,
    category_p_N5: np.ndarray,
    shift_N: np.ndarray,
    cold_N: np.ndarray,
    pieces: np.ndarray,
    piece_at: np.ndarray,
    names: np.ndarray,
    name_at: np.ndarray,
    suffix: np.ndarray,
    suffix_at: np.ndarray,
    out: np.ndarray,
    at_K: np.ndarray,
    length_K: np.ndarray,
) -> int:
    """Writes the record of each event in take_K into `out`, one after another. → bytes written.

    Spans are the JSON strings event_id, user, platform: from `at` in `text`, or from ~at in `extra` where at < 0. Piece
    i, of PIECES, is pieces[piece_at[i] : piece_at[i + 1]], likewise the names of categories, of which the last stands for
    −1; suffix_at (K + 1,) or empty: what follows the last field of each. `out` must hold all of it, NUMBER_BYTES for each
    number and the time, and BLOCK. Raises ValueError for arrays that do not fit together, a category without a name and a
    number beyond 9·10¹², and where a span lies outside of its buffer.
    """
    n, n_names = len(event_N), len(name_at) - 1
    fits = len(spans_at_N3) == n and len(spans_length_N3) == n and len(p_N3) == n and len(shift_N) == n and len(cold_N) == n
    fits = fits and len(category_N5) == n and len(category_p_N5) == n and category_p_N5.shape[1] == category_N5.shape[1]
    fits = fits and len(at_K) == len(take_K) and len(length_K) == len(take_K)
    fits = fits and p_N3.shape[1] == spans_at_N3.shape[1] == spans_length_N3.shape[1] == 3
    if not (fits and len(piece_at) == len(PIECES) + 1 and len(suffix_at) in (0, len(take_K) + 1)):
        raise ValueError("write_scores: the arrays do not fit together")
    base, extra_base, first = _address(text), _address(extra), _address(out)
    pieces_base, names_base, suffix_base = _address(pieces), _address(names), _address(suffix)
    o = first
    constant = piece_at[-1] + (6 + category_p_N5.shape[1]) * NUMBER_BYTES
    for k in range(len(take_K)):
        i = take_K[k]
        if not 0 <= i < n:
            raise ValueError("write_scores: no such event")
        most = constant
        for j in range(3):
            at, length = spans_at_N3[i, j], spans_length_N3[i, j]
            if not _inside(at if at >= 0 else ~at, length, len(text) if at >= 0 else len(extra)):
                raise ValueError("write_scores: a span lies outside of its buffer")
            most += length
        some = 0
        for j in range(category_N5.shape[1]):
            category = category_N5[i, j]
            if category >= n_names - 1:
                raise ValueError("write_scores: a category has no name")
            some += category >= 0
        for j in range(some):
            name = category_N5[i, j] if category_N5[i, j] >= 0 else n_names - 1
            most += name_at[name + 1] - name_at[name] + 4
        if len(suffix_at):
            most += suffix_at[k + 1] - suffix_at[k]
        if o - first + most + BLOCK > len(out):
            raise ValueError("write_scores: `out` is too small")
        start = o
        for j in range(3):
            o = _put_piece(o, pieces_base, piece_at, j)
            at = spans_at_N3[i, j]
            limit = base + len(text) if at >= 0 else extra_base + len(extra)
            o = _put(o, _place(base, extra_base, at), spans_length_N3[i, j], limit)
        o = _put_piece(o, pieces_base, piece_at, _P_TS)
        o = _put_integer(o, event_N[i]["ts"])
        millionths = 0.0
        for j in range(3):
            piece = _P_P + j
            o = _put_piece(o, pieces_base, piece_at, piece)
            millionths = _millionths(p_N3[i, j])
            o = _put_millionths(o, millionths)
            if o < 0:
                raise ValueError("write_scores: a number is too large")
        o = _put_piece(o, pieces_base, piece_at, _P_CHURN)
        o = _put_millionths(o, _MILLION - millionths)
        if o < 0:
            raise ValueError("write_scores: a number is too large")
        o = _put_piece(o, pieces_base, piece_at, _P_CATEGORIES)
        for j in range(some):
            if j:
                _put_byte(o, _COMMA)
                o += 1
            _put_byte(o, _OPEN_LIST)
            name = category_N5[i, j] if category_N5[i, j] >= 0 else n_names - 1
            o = _put_piece(o + 1, names_base, name_at, name)
            _put_byte(o, _COMMA)
            o = _put_millionths(o + 1, _millionths(category_p_N5[i, j]))
            if o < 0:
                raise ValueError("write_scores: a number is too large")
            _put_byte(o, _CLOSE_LIST)
            o += 1
        o = _put_piece(o, pieces_base, piece_at, _P_SHIFT)
        o = _put_millionths(o, _millionths(shift_N[i]))
        if o < 0:
            raise ValueError("write_scores: a number is too large")
        piece = _COLD if cold_N[i] else _WARM
        o = _put_piece(o, pieces_base, piece_at, piece)
        if len(suffix_at):
            o = _put_piece(o, suffix_base, suffix_at, k)
        o = _put_piece(o, pieces_base, piece_at, _END)
        at_K[k], length_K[k] = start - first, o - start
    return o - first

"""Keyed pseudonyms: nobody's raw id past the first hop.

A pseudonym is the two characters of the key's id and the first 16 bytes of an HMAC-SHA-256 in base64url: 24 ASCII
characters. Accounts and persons have domains of their own, and the platform's name carries its length, so that
("a", "b:c") and ("a:b", "c") differ. Knows no Kafka and no linking: who is whose account is ingest's business.

`of_many` computes the same, for a batch in one compiled kernel: faster than a table of known ids would be, so that no raw
id is kept in memory beyond its batch.
"""

from __future__ import annotations

import hashlib
import hmac
from base64 import urlsafe_b64encode

import numba
import numpy as np

from models.config import PseudonymConfig
from models.errors import ConfigError
from models.events import PSEUDONYM_LENGTH
from streams.sha256 import BLOCK, START, compress, digest, finish

MIN_KEY_BYTES = 16
MAKE_A_KEY = 'python3 -c "import secrets; print(secrets.token_urlsafe(32))"'

_ACCOUNT, _PERSON = b"a", b"p"


class Pseudonymiser:
    """Makes pseudonyms under one key. The key shows in no representation."""

    __slots__ = ("_begun", "_domains", "_key", "key_id")

    def __init__(self, config: PseudonymConfig) -> None:
        """Raises `ConfigError` unless exactly one of `key` and `key_file` gives a key of at least 16 bytes."""
        self.key_id = config.key_id
        self._key = _read_key(config)
        self._begun = _begun(self._key)
        self._domains: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"Pseudonymiser(key_id={self.key_id!r})"

    def __reduce__(self) -> tuple:
        raise TypeError("a Pseudonymiser is not pickled: its key would leave the process")

    def of(self, platform: str, user: str) -> str:
        """The pseudonym of `user` on `platform`: 24 characters."""
        return self._pseudonym(self._domain(platform) + user.encode("utf-8", "surrogatepass"))

    def of_many(self, platform: str, buffer: np.ndarray, at_N: np.ndarray, length_N: np.ndarray) -> np.ndarray:
        """The pseudonyms of the users of `platform` whose UTF-8 is `buffer[at:at + length]` (uint8 (B,), int64 (n,), int32
        (n,)) → uint8 (n, 24), each what `of` gives. A row of a negative length has no pseudonym: it is all zeros."""
        domain = np.frombuffer(self._domain(platform), np.uint8)
        key_id = np.frombuffer(self.key_id.encode("ascii"), np.uint8)
        out = np.zeros((len(at_N), PSEUDONYM_LENGTH), np.uint8)
        longest = int(length_N.max(initial=0))
        inner, outer = np.empty(len(domain) + longest + 2 * BLOCK, np.uint8), np.empty(2 * BLOCK, np.uint8)
        _pseudonyms(self._begun, key_id, domain, buffer, at_N, length_N, inner, outer, np.empty(72, np.uint32), out)
        return out

    def _domain(self, platform: str) -> bytes:
        domain = self._domains.get(platform)
        if domain is None:
            name = platform.encode()
            domain = self._domains[platform] = _ACCOUNT + len(name).to_bytes(4, "big") + name
        return domain

    def person(self, raw: str) -> str:
        """The pseudonym of a person known as `raw` to whoever links accounts: 24 characters."""
        return self._pseudonym(_PERSON + raw.encode("utf-8", "surrogatepass"))

    def _pseudonym(self, message: bytes) -> str:
        return self.key_id + urlsafe_b64encode(hmac.digest(self._key, message, "sha256")[:16])[:22].decode("ascii")


def _read_key(config: PseudonymConfig) -> bytes:
    advice = f"make one with: {MAKE_A_KEY}"
    if (config.key is None) == (config.key_file is None):
        given = "both are set" if config.key is not None else "neither is set"
        raise ConfigError(f"ingest needs exactly one of pseudonym.key and pseudonym.key_file, and {given}; {advice}")
    if config.key is not None:
        key, where = config.key.get_secret_value().encode(), "pseudonym.key"
    else:
        where = f"pseudonym.key_file {config.key_file}"
        try:
            key = config.key_file.read_bytes().rstrip(b"\r\n")
        except OSError as error:
            raise ConfigError(f"{where} cannot be read ({error.strerror}); {advice} > {config.key_file}") from None
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(f"{where} holds {len(key)} bytes, and at least {MIN_KEY_BYTES} are needed; {advice}")
    return key


# --- a batch at a time -----------------------------------------------------------------------------------------------

_kernel = numba.njit(cache=True, nogil=True, _nrt=False)  # without reference counts: no array is made here
_CHARACTERS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", np.uint8)


def _begun(key: bytes) -> np.ndarray:
    """uint32 (2, 8): the states of the inner and the outer hash once they have taken the padded key."""
    if len(key) > BLOCK:
        key = hashlib.sha256(key).digest()
    out = np.stack([START, START])
    for state, pad in zip(out, (0x36, 0x5C), strict=True):
        block = np.frombuffer(key.ljust(BLOCK, b"\0"), np.uint8) ^ np.uint8(pad)
        compress(state, block, 0, np.empty(64, np.uint32))
    return out


@_kernel
def _pseudonyms(begun, key_id, domain, buffer, at_N, length_N, inner, outer, room, out_N24):
    """`inner`, `outer`: room for the two hashes' messages; the first is zeros again afterwards."""
    w, state = room[:64], room[64:]
    for j in range(domain.size):
        inner[j] = domain[j]
    for i in range(at_N.size):
        length = np.int64(length_N[i])
        if length < 0:
            continue
        for j in range(length):
            inner[domain.size + j] = buffer[at_N[i] + j]
        for j in range(8):
            state[j] = begun[0, j]
        finish(state, inner, domain.size + length, BLOCK, w)
        digest(state, outer, 0)
        for j in range(8):
            state[j] = begun[1, j]
        finish(state, outer, 32, BLOCK, w)
        out_N24[i, 0], out_N24[i, 1] = key_id[0], key_id[1]
        # 128 bits as 22 characters of six bits each: ten of each half, and one of the four bits left over and two more.
        high = (np.uint64(state[0]) << np.uint64(32)) | np.uint64(state[1])
        low = (np.uint64(state[2]) << np.uint64(32)) | np.uint64(state[3])
        for j in range(10):
            out_N24[i, 2 + j] = _CHARACTERS[(high >> np.uint64(58 - 6 * j)) & np.uint64(0x3F)]
            out_N24[i, 13 + j] = _CHARACTERS[(low >> np.uint64(56 - 6 * j)) & np.uint64(0x3F)]
        middle = ((high & np.uint64(0xF)) << np.uint64(2)) | (low >> np.uint64(62))
        out_N24[i, 12] = _CHARACTERS[middle]
        out_N24[i, 23] = _CHARACTERS[(low & np.uint64(0x3)) << np.uint64(4)]
    for j in range(inner.size):
        inner[j] = 0  # the last user's id

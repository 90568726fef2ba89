"""Keyed pseudonyms: nobody's raw id past the first hop.

A pseudonym is the two characters of the key's id and the first 16 bytes of an HMAC-SHA-256 in base64url: 24 ASCII
characters. Accounts and persons have domains of their own, and the platform's name carries its length, so that
("a", "b:c") and ("a:b", "c") differ. Knows no Kafka and no linking: who is whose account is ingest's business.
"""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64encode

from models.config import PseudonymConfig
from models.errors import ConfigError

MIN_KEY_BYTES = 16
MAKE_A_KEY = 'python3 -c "import secrets; print(secrets.token_urlsafe(32))"'

_ACCOUNT, _PERSON = b"a", b"p"


class Pseudonymiser:
    """Makes pseudonyms under one key. The key shows in no representation."""

    __slots__ = ("_domains", "_key", "key_id")

    def __init__(self, config: PseudonymConfig) -> None:
        """Raises `ConfigError` unless exactly one of `key` and `key_file` gives a key of at least 16 bytes."""
        self.key_id = config.key_id
        self._key = _read_key(config)
        self._domains: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"Pseudonymiser(key_id={self.key_id!r})"

    def __reduce__(self) -> tuple:
        raise TypeError("a Pseudonymiser is not pickled: its key would leave the process")

    def of(self, platform: str, user: str) -> str:
        """The pseudonym of `user` on `platform`: 24 characters."""
        domain = self._domains.get(platform)
        if domain is None:
            name = platform.encode()
            domain = self._domains[platform] = _ACCOUNT + len(name).to_bytes(4, "big") + name
        return self._pseudonym(domain + user.encode("utf-8", "surrogatepass"))

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

"""Which accounts are one person: the topic `identities`, as a map in memory.

Key and value are pseudonyms; a link applies from the moment that this worker reads it. Knows no raw id.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import numpy as np
import structlog

from models.events import PSEUDONYM_LENGTH, IdentityLink

_PSEUDONYM = re.compile(f"[A-Za-z0-9_-]{{{PSEUDONYM_LENGTH}}}")
log = structlog.get_logger("crosscurrent.identities")
_decode = msgspec.json.Decoder(IdentityLink).decode


class Identities:
    """Pseudonym of an account → pseudonym of the person it belongs to."""

    def __init__(self) -> None:
        self._person: dict[str, str] = {}
        self.refused = 0

    def __len__(self) -> int:
        return len(self._person)

    def resolve(self, account: str) -> str:
        """The person's pseudonym where a link is known, else the account's own."""
        return self._person.get(account, account)

    def resolve_many(self, accounts_N24: np.ndarray) -> np.ndarray:
        """Puts the person in the place of each account (uint8 (n, 24), ASCII) that is linked; → the rows changed (m,)."""
        find = self._person.get
        text = accounts_N24.tobytes().decode("ascii") if self._person else ""
        people = [find(text[i : i + PSEUDONYM_LENGTH]) for i in range(0, len(text), PSEUDONYM_LENGTH)]
        rows = np.array([i for i, person in enumerate(people) if person is not None], np.int64)
        if rows.size:
            known = "".join([person for person in people if person is not None]).encode("ascii")
            accounts_N24[rows] = np.frombuffer(known, np.uint8).reshape(-1, PSEUDONYM_LENGTH)
        return rows

    async def on_records(self, records: list[Any]) -> None:
        for record in records:
            self._apply(record)

    def _apply(self, record: Any) -> None:
        account = (record.key or b"").decode("ascii", "replace")
        if record.value is None:
            self._person.pop(account, None)
            return
        try:
            person = _decode(record.value).person
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            person, why = "", type(error).__name__
        else:
            why = "a pseudonym has the wrong length or characters"
        if len(account) != PSEUDONYM_LENGTH or not _PSEUDONYM.fullmatch(person):
            self.refused += 1
            log.warning("identities.refused", partition=record.partition, offset=record.offset, reason=why)
            return
        self._person[account] = person

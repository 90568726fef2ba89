"""Which accounts are one person: the topic `identities`, as a map in memory.

Key and value are pseudonyms; a link applies from the moment that this worker reads it. Knows no raw id.
"""

from __future__ import annotations

from typing import Any

import msgspec
import structlog

from models.events import PSEUDONYM_LENGTH, IdentityLink

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
            why = "a pseudonym has the wrong length"
        if len(account) != PSEUDONYM_LENGTH or len(person) != PSEUDONYM_LENGTH:
            self.refused += 1
            log.warning("identities.refused", partition=record.partition, offset=record.offset, reason=why)
            return
        self._person[account] = person

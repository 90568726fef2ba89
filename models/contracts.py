"""Writes `contracts/*.schema.json`: what crosses a topic, as JSON Schema, generated from `models/events.py`.

Run `python -m models.contracts` after a change of a record; a test compares. Knows no topic and no Kafka.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from models.events import Announcement, CanonicalEvent, DeadLetter, IdentityLink, ScoreRecord

FOLDER = Path(__file__).resolve().parent.parent / "contracts"

CONTRACTS: dict[str, tuple[type, str]] = {
    "event": (CanonicalEvent, "Topic `events`, value. Key: `user`."),
    "score": (ScoreRecord, "Topic `scores`, value. Key: `user`."),
    "dead_letter": (
        DeadLetter,
        "Topic `dead_letters`, headers: one a field, its value as text; absent where null. Key: that of the refused "
        "record. Value: its bytes, empty where `sha256` is set.",
    ),
    "announcement": (Announcement, "Topic `models`, value. Key: the model's name."),
    "identity_link": (
        IdentityLink,
        "Topic `identities`, value; a null value ends the link. Key: the pseudonym of `platform:user`.",
    ),
}
"""Name of the contract → (type, where it lies)."""


def schema(name: str) -> dict[str, Any]:
    """JSON Schema (2020-12) of a contract. Unknown fields are allowed: fields are only ever added."""
    kind, where = CONTRACTS[name]
    (root,), definitions = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    body = definitions.pop(kind.__name__)
    if root != {"$ref": f"#/$defs/{kind.__name__}"}:
        raise ValueError(f"unexpected root of {name}: {root}")
    out = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": where, **body}
    return _one_line_descriptions({**out, "$defs": definitions} if definitions else out)


def _one_line_descriptions(node: Any) -> Any:
    """Docstrings keep their line breaks and indentation in the source; a schema's description should not."""
    if isinstance(node, dict):
        joined = {k: " ".join(v.split()) if k == "description" and isinstance(v, str) else v for k, v in node.items()}
        return {k: _one_line_descriptions(v) for k, v in joined.items()}
    return [_one_line_descriptions(item) for item in node] if isinstance(node, list) else node


def render(name: str) -> str:
    """The text of a contract's file."""
    return json.dumps(schema(name), indent=2, ensure_ascii=False) + "\n"


def path(name: str) -> Path:
    """Where a contract's file lies in the source tree."""
    return FOLDER / f"{name}.schema.json"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for contract in CONTRACTS:
        path(contract).write_text(render(contract), encoding="utf-8")
        print(path(contract))

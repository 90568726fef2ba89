"""`contracts/` is what the types say, and takes exactly what we send."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import msgspec
import pytest

from models import contracts
from models.events import (
    Announcement,
    CanonicalEvent,
    DeadLetter,
    EventEffect,
    Explanation,
    FeatureEffect,
    IdentityLink,
    ModelVersion,
    Probabilities,
    ScoreRecord,
)
from streams.dead_letters import decode_headers, encode_headers

USER = "k1" + "u" * 22
VERSION = {"version": "000001", "uri": "student/000001", "sha256": "ab" * 32, "abi": 1}

EXAMPLES: dict[str, list[Any]] = {
    "event": [
        CanonicalEvent(event_id="1", platform="shop", user=USER, kind="view", ts=0),
        CanonicalEvent(
            event_id="x" * 256,
            platform="shop",
            user=USER,
            kind="cancel",
            ts=1_700_000_000_000,
            item="käse",
            category="food > cheese",
            brand="b",
            price=1.5,
            currency="EUR",
            quantity=-2.0,
            session="s",
            text="t" * 512,
        ),
    ],
    "score": [
        ScoreRecord(
            schema=1,
            event_id="1",
            user=USER,
            platform="shop",
            ts=1,
            scored_at=2,
            model="prior",
            p=Probabilities(click=None, purchase=0.0, return_=1.0),
            churn=0.0,
            categories=[("food", 0.5), ("drink", 0.25)],
            interest_shift=None,
            cold=True,
            degraded=True,
        ),
        ScoreRecord(
            schema=1,
            event_id="1",
            user=USER,
            platform="shop",
            ts=1,
            scored_at=2,
            model="student/000001",
            p=Probabilities(click=None, purchase=0.0, return_=None),
            churn=None,
            categories=[],
            interest_shift=None,
            cold=False,
            degraded=False,
            explain=[
                Explanation(
                    head="purchase",
                    events=[EventEffect(back=0, kind="cart", age_s=0.0, effect=0.5)],
                    older=-0.1,
                    features=[FeatureEffect(name="log_dt", effect=-0.25)],
                )
            ],
        ),
    ],
    "dead_letter": [
        DeadLetter(
            source_topic="shop",
            source_partition=0,
            source_offset=9,
            stage="ingest",
            reason="too_large",
            detail="",
            refused_at=1,
            sha256="ab" * 32,
            size=2_000_000,
        )
    ],
    "announcement": [
        Announcement(name="student", published_at=1, **VERSION),
        Announcement(name="student", published_at=1, fallbacks=[ModelVersion(**VERSION)], **VERSION),
    ],
    "identity_link": [IdentityLink(person=USER)],
}

BROKEN: list[tuple[str, dict[str, Any]]] = [
    ("event", {"kind": "browse"}),
    ("event", {"user": "short"}),
    ("event", {"ts": -1}),
    ("event", {"ts": 1.5}),
    ("event", {"event_id": ""}),
    ("event", {"item": "i" * 257}),
    ("score", {"p": {"click": 1.5, "purchase": None, "return": None}}),
    ("score", {"p": {"click": 0.5, "purchase": None}}),
    ("score", {"categories": [["food", 0.1]] * 6}),
    ("score", {"categories": [["food"]]}),
    ("score", {"cold": None}),
    ("score", {"explain": None}),
    ("score", {"explain": [{"head": "category", "events": [], "older": 0.0, "features": []}]}),
    ("score", {"explain": [{"head": "click", "events": [], "features": []}]}),
    ("dead_letter", {"stage": "elsewhere"}),
    ("announcement", {"abi": "1"}),
    ("announcement", {"fallbacks": [{"version": "1"}]}),
    ("identity_link", {"person": None}),
]


def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = json.loads(contracts.path(name).read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def as_sent(record: Any) -> dict[str, Any]:
    return json.loads(msgspec.json.encode(record))


@pytest.mark.parametrize("name", contracts.CONTRACTS)
def test_files_are_current(name):
    committed = contracts.path(name).read_text(encoding="utf-8")
    assert committed == contracts.render(name), "run `python -m models.contracts` and commit contracts/"


def test_no_file_is_left_over():
    found = {file.name for file in contracts.FOLDER.iterdir()}
    assert found == {contracts.path(name).name for name in contracts.CONTRACTS}


@pytest.mark.parametrize("name", contracts.CONTRACTS)
def test_what_we_send_is_valid_and_what_a_later_version_adds(name):
    for record in EXAMPLES[name]:
        validator(name).validate(as_sent(record))
        validator(name).validate({**as_sent(record), "added_later": 1})


@pytest.mark.parametrize("name", contracts.CONTRACTS)
def test_every_required_field_is_required(name):
    record = as_sent(EXAMPLES[name][0])
    required = contracts.schema(name)["required"]
    assert required
    for field in required:
        assert not validator(name).is_valid({k: v for k, v in record.items() if k != field}), field


@pytest.mark.parametrize(("name", "change"), BROKEN)
def test_schema_and_type_refuse_the_same(name, change):
    record = {**as_sent(EXAMPLES[name][0]), **change}
    assert not validator(name).is_valid(record)
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(json.dumps(record), type=contracts.CONTRACTS[name][0])


def test_headers_of_a_dead_letter_are_its_contract():
    (record,) = EXAMPLES["dead_letter"]
    headers = encode_headers(record)
    assert decode_headers(headers) == record
    assert {name for name, _ in headers} == set(contracts.schema("dead_letter")["properties"])
    small = msgspec.structs.replace(record, sha256=None, size=None)
    assert {name for name, _ in encode_headers(small)} == set(contracts.schema("dead_letter")["required"])
    assert decode_headers(encode_headers(small)) == small
    assert decode_headers([("stage", b"ingest")]) is None
    assert decode_headers([("stage", b"\xff")]) is None

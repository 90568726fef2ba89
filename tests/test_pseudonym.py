"""Pseudonyms: keyed, of one length, without collisions of domains, and their key never shown."""

from __future__ import annotations

import copy
import hmac
import logging
import pickle
import subprocess
import sys
from base64 import urlsafe_b64decode
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import PseudonymConfig
from models.errors import ConfigError
from models.events import PSEUDONYM_LENGTH
from streams.pseudonym import MAKE_A_KEY, Pseudonymiser

KEY = "correct horse battery staple"
ONE = Pseudonymiser(PseudonymConfig(key=KEY))
NAME = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(first=st.tuples(NAME, NAME), second=st.tuples(NAME, NAME))
def test_equal_accounts_only_have_equal_pseudonyms(first: tuple[str, str], second: tuple[str, str]) -> None:
    assert (ONE.of(*first) == ONE.of(*second)) == (first == second)
    assert ONE.person(first[1]) != ONE.of(*first)


@pytest.mark.parametrize(
    ("first", "second"),
    [(("a", "b:c"), ("a:b", "c")), (("ab", "c"), ("a", "bc")), (("a", "\0b"), ("a\0", "b")), (("", "p"), ("p", ""))],
)
def test_where_the_platform_ends_counts(first: tuple[str, str], second: tuple[str, str]) -> None:
    assert ONE.of(*first) != ONE.of(*second)


@given(platform=NAME, user=NAME)
def test_the_form(platform: str, user: str) -> None:
    for pseudonym in (ONE.of(platform, user), ONE.person(user)):
        assert len(pseudonym) == PSEUDONYM_LENGTH and pseudonym.isascii() and pseudonym.startswith("k1")
        assert len(urlsafe_b64decode(pseudonym[2:] + "==")) == 16


def test_it_is_the_documented_hmac_and_stays_so() -> None:
    message = b"a" + (4).to_bytes(4, "big") + b"shop" + "ünal".encode()
    digest = hmac.new(KEY.encode(), message, "sha256").digest()[:16]
    assert urlsafe_b64decode(ONE.of("shop", "ünal")[2:] + "==") == digest
    assert ONE.of("shop", "ünal") == Pseudonymiser(PseudonymConfig(key=KEY)).of("shop", "ünal")


def test_another_key_or_key_id_makes_others() -> None:
    other = Pseudonymiser(PseudonymConfig(key=KEY + "!"))
    renamed = Pseudonymiser(PseudonymConfig(key=KEY, key_id="z9"))
    assert other.of("a", "b") != ONE.of("a", "b")
    assert renamed.of("a", "b") == "z9" + ONE.of("a", "b")[2:]


def test_a_key_file_is_the_key_without_its_line_end(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(KEY + "\r\n")
    assert Pseudonymiser(PseudonymConfig(key_file=path)).of("a", "b") == ONE.of("a", "b")


def test_the_key_never_shows(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("x").info("%s %r", ONE, ONE)
    assert "Pseudonymiser" in caplog.text and KEY not in caplog.text and KEY not in str(vars(type(ONE)))
    for leak in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match="not pickled"):
            leak(ONE)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "neither is set"),
        ({"key": KEY, "key_file": "k"}, "both are set"),
        ({"key": "fifteen bytes.."}, "holds 15 bytes, and at least 16"),
        ({"key": ""}, "holds 0 bytes"),
        ({"key_file": "/nowhere/at/all"}, "cannot be read"),
    ],
)
def test_without_a_good_key_it_says_what_to_do(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        Pseudonymiser(PseudonymConfig(**settings))
    assert MAKE_A_KEY in str(caught.value)
    assert not settings.get("key") or settings["key"] not in str(caught.value)


def test_a_short_key_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"0123456789abcde\n")
    with pytest.raises(ConfigError, match="holds 15 bytes"):
        Pseudonymiser(PseudonymConfig(key_file=path))


def test_the_command_that_the_message_gives_makes_a_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    command = MAKE_A_KEY.replace("python3", sys.executable)
    subprocess.run(f"{command} > {path}", shell=True, check=True)
    assert len(Pseudonymiser(PseudonymConfig(key_file=path)).of("a", "b")) == PSEUDONYM_LENGTH


@settings(deadline=None)  # the first compiles
@given(
    key=st.text("abc", min_size=16, max_size=150),
    platform=NAME,
    users=st.lists(st.one_of(NAME, st.integers(0, 300).map("u".__mul__)), max_size=6),
)
def test_many_are_those_of_one_by_one(key: str, platform: str, users: list[str]) -> None:
    made = Pseudonymiser(PseudonymConfig(key=key))
    raw = [user.encode() for user in users]
    length = np.array([len(one) for one in raw], np.int32)
    buffer = np.frombuffer(b"".join(raw), np.uint8)
    found = made.of_many(platform, buffer, np.cumsum(length, dtype=np.int64) - length, length)
    assert [row.tobytes().decode() for row in found] == [made.of(platform, user) for user in users]


def test_a_row_without_a_user_has_no_pseudonym() -> None:
    found = ONE.of_many("shop", np.frombuffer(b"anna", np.uint8), np.array([0, 0, 2]), np.array([2, -1, 2], np.int32))
    assert [row.tobytes() for row in found] == [ONE.of("shop", "an").encode(), bytes(24), ONE.of("shop", "na").encode()]

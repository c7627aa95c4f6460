"""What an invite admits, and when it no longer does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshnode.errors import ConfigError
from meshnode.identity.certificates import Role
from meshnode.identity.ids import mesh_id_of
from meshnode.identity.invite_book import (
    FAILURES_THAT_LOCK,
    LONGEST_LIFE,
    MOST_INVITES,
    MOST_USES,
    InviteBook,
    InviteEntry,
    InviteState,
    JoinRefusal,
    decode_book,
    encode_book,
    new_entry,
)
from meshnode.identity.keys import spki_of
from meshnode.identity.transcript import Transcript, fingerprint
from tests.identity.mutate import mutations

NOW = datetime(2026, 5, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
KEY = b"k" * 32


def entry(uses: int = 1, life: timedelta = HOUR, name: bytes = b"invite-8") -> InviteEntry:
    return new_entry(name, KEY, Role.MEMBER, uses, (NOW, NOW + life))


def joiner(name: bytes = b"invite-8") -> Transcript:
    public = spki_of(Ed25519PrivateKey.generate().public_key())
    return Transcript(mesh_id_of(b"mesh"), name, b"i" * 32, b"j" * 32, fingerprint(b"leaf"), public)


def redeem(book: InviteBook, who: Transcript, now: datetime = NOW, key: bytes = KEY):
    return book.redeem(who, who.mac(key), now)


def test_an_invite_admits_one_key_and_that_key_again() -> None:
    first, second = joiner(), joiner()
    book, answer = redeem(InviteBook().create(entry()), first)
    assert isinstance(answer, InviteEntry)
    assert answer.admitted[0].public_key == first.public_key
    assert redeem(book, second)[1] is JoinRefusal.USED
    book = book.certified(b"invite-8", first.public_key, b"certificate", NOW)
    _, again = redeem(book, first)
    assert isinstance(again, InviteEntry)
    assert again.admitted[0].certificate == b"certificate"


def test_a_used_invite_no_longer_holds_its_key() -> None:
    book, _ = redeem(InviteBook().create(entry()), joiner())
    assert book.entries[0].key == b""
    assert book.entries[0].state(NOW) is InviteState.USED


def test_an_invite_with_more_uses_admits_so_many_keys() -> None:
    book = InviteBook().create(entry(uses=2))
    for _ in range(2):
        book, answer = redeem(book, joiner())
        assert isinstance(answer, InviteEntry)
    assert redeem(book, joiner())[1] is JoinRefusal.USED


def test_an_expired_invite_admits_nobody_new_and_forgets_its_key() -> None:
    first = joiner()
    book, _ = redeem(InviteBook().create(entry(uses=2)), first)
    assert redeem(book, joiner(), NOW + HOUR)[1] is JoinRefusal.EXPIRED
    assert isinstance(redeem(book, first, NOW + HOUR)[1], InviteEntry)  # its certificate is its own
    assert book.forget(NOW + HOUR).entries[0].key == b""


def test_a_revoked_invite_admits_nobody_not_even_again() -> None:
    first = joiner()
    book, _ = redeem(InviteBook().create(entry(uses=2)), first)
    book = book.revoke(b"invite-8", NOW)
    assert book.entries[0].key == b""
    for who in (first, joiner()):
        assert redeem(book, who)[1] is JoinRefusal.REVOKED


def test_five_wrong_proofs_lock_an_invite_for_the_right_one_too() -> None:
    book = InviteBook().create(entry())
    for _ in range(FAILURES_THAT_LOCK):
        book, answer = redeem(book, joiner(), key=b"wrong" * 8)
        assert answer is JoinRefusal.WRONG_PROOF
    assert redeem(book, joiner())[1] is JoinRefusal.LOCKED
    assert book.entries[0].key == b""


def test_a_shown_book_holds_no_key() -> None:
    shown = repr(InviteBook().create(entry()))
    assert repr(KEY)[2:-1] not in shown
    assert b"invite-8".hex() in shown


def test_an_unknown_invite_changes_nothing() -> None:
    book = InviteBook().create(entry())
    assert redeem(book, joiner(b"another8")) == (book, JoinRefusal.UNKNOWN)


@pytest.mark.parametrize(
    "bad", [entry(uses=0), entry(uses=MOST_USES + 1), entry(life=-HOUR), entry(life=2 * LONGEST_LIFE)]
)
def test_impossible_invites_are_refused(bad: InviteEntry) -> None:
    with pytest.raises(ConfigError):
        InviteBook().create(bad)


def test_revoking_what_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match="no invite"):
        InviteBook().revoke(b"invite-8", NOW)


def test_a_full_book_forgets_the_oldest_finished_invite_and_never_an_open_one() -> None:
    book = InviteBook()
    for number in range(MOST_INVITES):
        book = book.create(entry(name=number.to_bytes(8, "big")))
    with pytest.raises(ConfigError, match="open"):
        book.create(entry())
    book = book.revoke((7).to_bytes(8, "big"), NOW).create(entry())
    assert len(book.entries) == MOST_INVITES
    assert (7).to_bytes(8, "big") not in {each.invite_id for each in book.entries}


def test_a_book_comes_back_from_its_file() -> None:
    book, _ = redeem(InviteBook().create(entry(uses=2)), joiner())
    book = book.create(entry(name=b"another8"))
    assert decode_book(encode_book(book)) == book


def test_damaged_files_are_books_or_config_errors() -> None:
    book, _ = redeem(InviteBook().create(entry(uses=2)), joiner())
    for data in mutations([encode_book(book)]):
        try:
            assert isinstance(decode_book(data), InviteBook)
        except ConfigError:
            pass

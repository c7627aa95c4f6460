from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import InviteError
from meshnode.identity.ids import mesh_id_of
from meshnode.identity.invites import (
    Invite,
    check_not_expired,
    format_invite,
    invite_key,
    issuer_pin,
    mesh_pin,
    parse_invite,
)
from tests.identity.mutate import mutations

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
V4 = ("192.168.100.101:18420", "10.255.255.254:65535", "203.0.113.200:8420")
INVITE = Invite(mesh_pin(mesh_id_of(b"mesh")), issuer_pin(b"issuer"), b"invite-8", b"secret-secret-16", NOW, V4)


def test_an_invite_comes_back_from_its_line() -> None:
    assert parse_invite(format_invite(INVITE)) == INVITE


def test_the_line_with_three_ipv4_addresses_has_at_most_160_characters() -> None:
    assert len(format_invite(INVITE)) <= 160


def test_names_and_ipv6_addresses_survive() -> None:
    for addresses in (("[2001:db8::1]:8420", "[fd00::2]:1", "[::1]:65535"), ("kitchen.example.org:8420", "a:1")):
        text = format_invite(replace(INVITE, addresses=addresses))
        assert len(text) <= 256
        assert parse_invite(text).addresses == addresses


def test_a_pasted_line_may_be_broken_spaced_and_in_capitals() -> None:
    text = format_invite(INVITE)
    assert parse_invite(f"  {text[:50]}\r\n {text[50:].upper()}\n") == INVITE


def test_neither_repr_nor_errors_show_the_secret() -> None:
    assert "secret-secret" not in repr(INVITE)
    text = format_invite(INVITE)
    with pytest.raises(InviteError) as caught:
        parse_invite(text[:-1] + ("a" if text[-1] != "a" else "q"))
    assert text[20:60] not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "", "not an invite"),
        (lambda text: "https://example.org", "not an invite"),
        (lambda text: "mn2" + text[3:], "does not know"),
        (lambda text: text[:-5], "checksum|damaged"),
        (lambda text: text[:40], "cut off"),
        (lambda text: text[:20] + "0" + text[21:], "characters"),
        (lambda text: text[:20] + ("b" if text[20] == "a" else "a") + text[21:], "checksum"),
        (lambda text: text * 2, "too long"),
    ],
)
def test_each_defect_is_named(damage, message: str) -> None:
    with pytest.raises(InviteError, match=message) as caught:
        parse_invite(damage(format_invite(INVITE)))
    assert caught.value.hint


@pytest.mark.parametrize(
    "addresses",
    [
        (),
        V4 + V4[:1],
        ("nowhere",),
        ("host:0",),
        ("host:70000",),
        ("ho st:1",),
        (":1",),
        ("[fe80::1%eth0]:1",),
        ("h:²",),
    ],
)
def test_addresses_that_make_no_invite_are_refused(addresses: tuple[str, ...]) -> None:
    with pytest.raises(InviteError):
        format_invite(replace(INVITE, addresses=addresses))


def test_names_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InviteError, match="too long"):
        format_invite(replace(INVITE, addresses=("a" * 90 + ":1",) * 3))


def test_an_invite_ends_by_the_clock_of_whoever_holds_it() -> None:
    check_not_expired(INVITE, NOW - timedelta(seconds=1))
    with pytest.raises(InviteError, match="expired at 2026-05-01 12:00"):
        check_not_expired(INVITE, NOW)


def test_the_kept_key_depends_on_secret_and_invite() -> None:
    keys = {invite_key(secret, name) for secret in (b"a" * 16, b"b" * 16) for name in (b"1" * 8, b"2" * 8)}
    assert len(keys) == 4
    assert all(len(key) == 32 for key in keys)


@given(st.text(max_size=300))
def test_any_text_is_an_invite_or_an_invite_error(text: str) -> None:
    with pytest.raises(InviteError):
        parse_invite(text)


def test_damaged_lines_are_told() -> None:
    text = format_invite(INVITE).encode()
    for data in mutations([text]):
        try:
            assert parse_invite(data.decode("latin-1")) == INVITE
        except InviteError:
            pass

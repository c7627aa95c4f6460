from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from meshnode.errors import ConfigError
from meshnode.identity.ids import node_id_of
from meshnode.identity.issuers import APPOINTED, Appointment, appointed, decode_appointments, encode_appointments

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def appointment(name: str) -> Appointment:
    return Appointment(node_id_of(name.encode()), name, node_id_of(f"key of {name}".encode()), NOW)


def test_a_new_year_of_the_same_key_replaces_the_old_one() -> None:
    attic, cellar = appointment("attic"), appointment("cellar")
    later = msgspec.structs.replace(attic, expires=NOW + timedelta(days=365))
    assert appointed((attic, cellar), later) == (cellar, later)


def test_a_root_makes_no_more_issuers_than_have_revocation_lists() -> None:
    full = tuple(appointment(str(each)) for each in range(APPOINTED))
    with pytest.raises(ConfigError, match="made issuers already"):
        appointed(full, appointment("one more"))
    assert len(appointed(full, full[3])) == APPOINTED, "one of them may begin a new year"


def test_what_is_written_is_read_back_and_damage_is_told() -> None:
    known = appointment("attic"), appointment("cellar")
    assert decode_appointments(encode_appointments(known)) == known
    for damaged in (b"", b"{}", b'[{"node": 1}]', encode_appointments(known)[:-3]):
        with pytest.raises(msgspec.DecodeError):
            decode_appointments(damaged)

"""Machines that one does not have: every mistake in the file is one message that names the place."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.app.cli.what_if import FILE_BYTES, read_what_if
from meshnode.errors import ConfigError

GOOD = """
author = "attic"
[[machine]]
name = "desk"
memory = "12GB"
decode = "30GB/s"
prefill = 300000000000
layer_us = 20
stage_us = 500
cores = 8
[[machine]]
name = "attic"
memory = 4000000000
[[link]]
between = ["desk", "attic"]
rtt_ms = 0.4
mbit_s = 940
[[link]]
between = ["attic", "desk"]
reachable = false
one_way = true
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "home.toml"
    path.write_text(text)
    return path


def test_a_file_says_what_machines_offer_and_how_far_they_are(tmp_path: Path) -> None:
    inventory, author = read_what_if(written(tmp_path, GOOD))
    desk, attic = inventory.nodes
    assert author == "attic"
    assert (desk.usable_bytes, desk.decode_bytes_per_s, desk.prefill_bytes_per_s) == (
        12 * 10**9,
        3 * 10**10,
        3 * 10**11,
    )
    assert (desk.layer_us, desk.stage_us, desk.cores) == (20, 500, 8)
    assert (attic.usable_bytes, attic.decode_bytes_per_s) == (4 * 10**9, 0)
    there, back, barred = inventory.links
    assert (there.source, there.target, there.rtt_us, there.bytes_per_s) == ("desk", "attic", 400, 117_500_000)
    assert (back.source, back.target, back.rtt_us) == ("attic", "desk", 400)
    assert (barred.source, barred.reachable) == ("attic", False)


def test_the_first_machine_has_the_file_unless_said_otherwise(tmp_path: Path) -> None:
    assert read_what_if(written(tmp_path, '[[machine]]\nname = "a"\nmemory = "1GB"'))[1] == "a"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("machine = [", "home.toml: "),
        ("", "`machine`"),
        ("machine = []", "0 machines"),
        ('[[machine]]\nname = "a"', "`memory`"),
        ('[[machine]]\nname = "a"\nmemory = "much"', "'much' is not a size"),
        ('[[machine]]\nname = "a"\nmemory = "1GB"\ncore = 4', "`core`"),
        ('[[machine]]\nname = "a"\nmemory = "1GB"\ncores = "4"', r"`machine\[0\].cores`"),
        ('[[machine]]\nname = "a"\nmemory = "1GB"\nlayer_us = -1', "below zero"),
        ('[[machine]]\nname = ""\nmemory = "1GB"', "no name"),
        ('[[machine]]\nname = "a"\nmemory = "1GB"\n' * 2, "no name for one machine alone"),
        ('author = "b"\n[[machine]]\nname = "a"\nmemory = "1GB"', "'b'"),
        ('[[machine]]\nname = "a"\nmemory = "1GB"\n[[link]]\nbetween = ["a", "b"]', "'b'"),
        ('[[machine]]\nname = "a"\nmemory = "1GB"\n[[link]]\nbetween = ["a", "a"]', "not possible"),
        ('[[machine]]\nname = "a"\nmemory = "1GB"\n[[link]]\nbetween = ["a"]', r"`link\[0\].between`"),
        ("#" * (FILE_BYTES + 1), "larger than 1000 KB"),
    ],
)
def test_a_mistake_in_the_file_is_one_message_that_names_file_and_place(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        read_what_if(written(tmp_path, text))
    assert "home.toml" in str(error.value)
    assert error.value.hint


def test_bytes_that_are_no_text_and_a_file_that_is_not_there_are_the_users_error_too(tmp_path: Path) -> None:
    (tmp_path / "home.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError):
        read_what_if(tmp_path / "home.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_what_if(tmp_path / "nowhere.toml")


def test_a_delay_that_is_no_number_is_refused(tmp_path: Path) -> None:
    two = '[[machine]]\nname = "a"\nmemory = "1GB"\n[[machine]]\nname = "b"\nmemory = "1GB"\n'
    for delay in ("nan", "inf", "-1.0"):
        with pytest.raises(ConfigError, match="not possible"):
            read_what_if(written(tmp_path, f'{two}[[link]]\nbetween = ["a", "b"]\nrtt_ms = {delay}'))

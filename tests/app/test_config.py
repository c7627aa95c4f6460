"""Settings: where a value comes from, and which values cannot be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from meshnode.app.config import Settings, default_data, parse_cuts, parse_size
from meshnode.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GB", 6_000_000_000),
        ("512MiB", 512 * 2**20),
        ("1.5g", 1_500_000_000),
        ("20 kb", 20_000),
        ("2TiB", 2 * 2**40),
        ("100", 100),
        (4096, 4096),
    ],
)
def test_a_size_is_decimal_unless_it_says_i(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "6GBB", "1e9", "6 G B", "six", "1" * 30, "0x10", "6iB"])
def test_what_is_no_size_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_size(text)
    assert "6GB" in refused.value.hint


def test_defaults_are_the_documented_ports_on_the_documented_addresses(tmp_path: Path) -> None:
    settings = Settings.load({"data": tmp_path}, {})
    assert (settings.listen, settings.port) == ("0.0.0.0", 8420)
    assert (settings.api_host, settings.api_port) == ("127.0.0.1", 8421)
    assert (settings.lanes, settings.context, settings.kv_type, settings.memory) == (4, 0, "", 0)
    assert settings.name


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('lanes = 1\nname = "file"\nport = 7001\n')
    environment = {"MESHNODE_LANES": "2", "MESHNODE_NAME": "environment", "MESHNODE_API_PORT": ""}
    settings = Settings.load({"data": tmp_path, "lanes": 3, "name": None}, environment)
    assert (settings.lanes, settings.name, settings.port, settings.api_port) == (3, "environment", 7001, 8421)


def test_the_data_directory_comes_from_flag_environment_or_platform(tmp_path: Path) -> None:
    assert Settings.load({"data": tmp_path}, {"MESHNODE_DATA": "/elsewhere"}).data == tmp_path
    assert Settings.load({}, {"MESHNODE_DATA": str(tmp_path)}).data == tmp_path
    assert default_data().name == "meshnode"


def test_r105_a_config_file_from_before_a_setting_existed_loads_to_its_default(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('name = "old"\n')
    assert Settings.load({"data": tmp_path}, {}) == Settings(data=tmp_path, name="old")


def test_r60_the_wait_budget_is_60_when_missing_and_honoured_when_given(tmp_path: Path) -> None:
    assert Settings.load({"data": tmp_path}, {}).start_wait_s == 60
    assert Settings.load({"data": tmp_path}, {"MESHNODE_START_WAIT_S": "5"}).start_wait_s == 5


@pytest.mark.parametrize("text", ["", ",", "  ", " , ,"])
def test_r99_an_empty_address_list_is_off_in_every_spelling(tmp_path: Path, text: str) -> None:
    assert Settings.load({"data": tmp_path, "advertise": text}, {}).advertise == ()


def test_r99_a_given_address_list_is_checked_and_passed_verbatim(tmp_path: Path) -> None:
    settings = Settings.load({"data": tmp_path, "advertise": "mesh.example:8420, 10.0.0.2:99, [2001:db8::1]:8420"}, {})
    assert settings.advertise == ("mesh.example:8420", "10.0.0.2:99", "[2001:db8::1]:8420")


@pytest.mark.parametrize("written", ["lane = 3", "lanes = ", "lanes = 'many'", "lanes = 0", "[api]\nport = 1"])
def test_a_bad_config_file_is_named_not_ignored(tmp_path: Path, written: str) -> None:
    (tmp_path / "config.toml").write_text(written)
    with pytest.raises(ConfigError):
        Settings.load({"data": tmp_path}, {})


def test_a_bad_value_names_the_place_it_came_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MESHNODE_MEMORY"):
        Settings.load({"data": tmp_path}, {"MESHNODE_MEMORY": "lots"})


@pytest.mark.parametrize(
    "change",
    [
        {"port": 8421},
        {"port": -1},
        {"api_port": 65536},
        {"listen": "example.org"},
        {"api_host": "0.0.0.0"},
        {"api_host": "192.168.1.9"},
        {"advertise": ("nohost",)},
        {"advertise": ("host:0",)},
        {"advertise": ("2001:db8::1:8420",)},
        {"advertise": ("host:\u0664\u0662",)},
        {"advertise": ("bell\a:8420",)},
        {"advertise": tuple(f"10.0.0.{number}:8420" for number in range(9))},
        {"name": "x" * 64},
        {"name": "bell\a"},
        {"lanes": 0},
        {"lanes": 65},
        {"context": -1},
        {"kv_type": "q9_9"},
        {"memory": 1000},
        {"threads": -1},
        {"start_wait_s": 0},
    ],
)
def test_an_impossible_setting_is_refused_when_it_is_made(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(Settings(data=tmp_path), **change)


def test_any_free_port_may_be_asked_for_twice(tmp_path: Path) -> None:
    assert Settings(data=tmp_path, port=0, api_port=0).port == 0


def test_an_endpoint_beyond_loopback_needs_the_word_insecure(tmp_path: Path) -> None:
    assert Settings(data=tmp_path, api_host="192.168.1.9", insecure=True).api_host == "192.168.1.9"


@pytest.mark.parametrize(
    ("text", "cuts"), [("", ()), (" , ", ()), ("4", (4,)), (" 4, 9 ", (4, 9)), ("4,", (4,)), ([4, 9], (4, 9)), ([], ())]
)
def test_cuts_are_layers_in_order(text: str | list[int], cuts: tuple[int, ...]) -> None:
    assert parse_cuts(text) == cuts


@pytest.mark.parametrize("text", ["0,4", "9,4", "4,4", "four", "-1", "4.5", "123456", [0], [9, 4]])
def test_what_is_no_list_of_cuts_is_refused(text: str | list[int]) -> None:
    with pytest.raises(ConfigError):
        parse_cuts(text)


@pytest.mark.parametrize("servers", ['""', '" "', '","', "[]", '["", " "]'])
def test_r99_an_empty_list_of_rpc_servers_is_off(servers: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f"rpc_servers = {servers}\nlanes = 2\n")
    assert Settings.load({"data": tmp_path}, {"MESHNODE_RPC_SERVERS": " "}).lanes == 2


@pytest.mark.parametrize(
    "servers", ['"10.0.0.2:50052,10.0.0.3:50052"', '["10.0.0.2:50052", "10.0.0.3:50052"]', "50052"]
)
def test_rpc_servers_are_answered_with_what_takes_their_place(servers: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f"rpc_servers = {servers}\n")
    with pytest.raises(ConfigError, match=r"config\.toml: rpc_servers names .*50052.*mutual TLS") as refused:
        Settings.load({"data": tmp_path}, {})
    assert "meshnode invite" in refused.value.hint
    assert "meshnode join" in refused.value.hint
    (tmp_path / "config.toml").unlink()
    with pytest.raises(ConfigError, match="MESHNODE_RPC_SERVERS"):
        Settings.load({"data": tmp_path}, {"MESHNODE_RPC_SERVERS": "10.0.0.2:50052"})


def test_a_load_is_given_up_after_ten_minutes_without_progress_or_as_long_as_a_person_says(tmp_path: Path) -> None:
    assert Settings.load({"data": tmp_path}, {}).startup_timeout == 600
    assert Settings.load({"data": tmp_path, "startup_timeout": 30}, {}).startup_timeout == 30
    with pytest.raises(ConfigError, match="startup-timeout"):
        Settings.load({"data": tmp_path, "startup_timeout": 0}, {})

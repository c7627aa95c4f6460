import pytest

from meshnode.errors import ConfigError
from meshnode.io.transport.addresses import join_address, split_address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.1:8420", "10.0.0.1", 8420),
        ("kitchen.local:1", "kitchen.local", 1),
        ("[fd00::1]:65535", "fd00::1", 65535),
    ],
)
def test_addresses_split_and_join(text: str, host: str, port: int) -> None:
    assert split_address(text) == (host, port)
    assert join_address(host, port) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "host:",
        ":1",
        "host:0",
        "host:65536",
        "host:1x",
        "host:²",
        "fd00::1:8420",
        "a\nb:1",
        "x" * 300 + ":1",
    ],
)
def test_what_is_no_address_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="not an address"):
        split_address(text)

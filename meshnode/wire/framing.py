"""Length-prefixed frames: 4 bytes of length, big-endian, then so many bytes.

Invariant: a length beyond the limit is refused when its 4 bytes are known; nothing is allocated for it.
"""

from __future__ import annotations

from meshnode.errors import PeerError

LENGTH_BYTES = 4


def encode_frame(payload: bytes, limit: int) -> bytes:
    """`payload` behind its length; longer than `limit` is our own bug."""
    assert len(payload) <= limit, f"a frame of {len(payload)} bytes, at most {limit}"
    return len(payload).to_bytes(LENGTH_BYTES, "big") + payload


class FrameDecoder:
    """Received bytes in, frames or exact byte counts out; holds no more than was fed.

    The caller stops feeding while frames are waiting, so the buffer stays below `limit` plus one read.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes | bytearray) -> None:
        """Append what arrived."""
        self._buffer += data

    def next_frame(self) -> bytes | None:
        """The next whole frame, or None until more was fed; `PeerError` for one beyond the limit."""
        if len(self._buffer) < LENGTH_BYTES:
            return None
        length = int.from_bytes(self._buffer[:LENGTH_BYTES], "big")
        if length > self.limit:
            raise PeerError(f"a frame of {length} bytes, at most {self.limit} are allowed")
        end = LENGTH_BYTES + length
        if len(self._buffer) < end:
            return None
        frame = bytes(memoryview(self._buffer)[LENGTH_BYTES:end])
        del self._buffer[:end]
        return frame

    def take(self, maximum: int) -> bytes:
        """Up to `maximum` of the buffered bytes, for streams that carry raw bytes between frames."""
        data = bytes(memoryview(self._buffer)[:maximum])
        del self._buffer[: len(data)]
        return data

"""Every bound on what arrives from another machine, with its reason.

Sizes are bytes unless the name says otherwise. A bound that only one codec needs may live beside that
codec; one that two sides must agree on lives here.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# --- before authentication: anybody who reaches the port can spend these -------------------------------

PREFACE_TIMEOUT_S: Final = 5.0
"""Preface, TLS handshake and HELLO together; a handshake takes 2 ms, a slow Wi-Fi second is far below."""

HANDSHAKES_AT_ONCE: Final = 64
"""In all: about 64 x 64 KiB of buffers and 2 ms of CPU each is what strangers may hold."""

HANDSHAKES_PER_ADDRESS: Final = 8
"""One address cannot take all handshakes; three nodes on one machine dialing CONTROL and BULK need 6."""

UNAUTHENTICATED_BYTES: Final = 64 * KIB
"""Read from one connection before the peer is known; a chain of three Ed25519 certificates is 2 KiB."""

JOIN_TIMEOUT_S: Final = 15.0
"""A whole JOIN exchange: three round trips and one fsync, on a slow disk."""

COMPARISON_S: Final = 120.0
"""For two people to compare a number, one of whom walks to the other machine."""

COMPARISONS_PER_HOUR: Final = 10
"""Joins by number that one issuer begins: a machine in between that guesses needs eleven years for an even chance."""

JOIN_FRAME: Final = 8 * KIB
"""JOIN messages carry at most three certificates (700 bytes each in DER) and two nonces."""

# --- connections of members -----------------------------------------------------------------------------

LISTEN_BACKLOG: Final = 128
"""Twice the handshakes at once: a burst waits in the kernel, not in this process."""

MEMBER_STREAMS: Final = 256
"""Authenticated streams one node accepts in all: 16 peers x (CONTROL, 4 BULK, 8 REQUEST) fits."""

STREAMS_PER_PEER: Final = 64
"""One member cannot take every stream of another."""

DIAL_TIMEOUT_S: Final = 5.0
"""One candidate address: TCP connect, TLS and HELLO."""

KEEPALIVE_IDLE_S: Final = 10
KEEPALIVE_PROBES: Final = 4
KEEPALIVE_INTERVAL_S: Final = 5
"""A machine without power says no end: whoever waits for an answer of it learns that after 30 s of silence, as from a
transfer that stalls (io/artifacts). A machine that is there answers in its kernel, however long a prompt takes."""

DIALS_PER_PEER: Final = 2
"""At once, the others wait: four nodes behind one address (one machine, one router) x 2 is what it may hold."""

DIAL_CANDIDATES: Final = 8
"""Addresses tried for one peer; announcements carry no more."""

ISSUER_CANDIDATES: Final = 64
"""Addresses asked for a renewal, where nobody knows who is an issuer: 16 members with 4 addresses each."""

HELLO_FRAME: Final = 1 * KIB
"""HELLO is two ids, a version range and the preface again: 220 bytes."""

# --- frames (one message behind a 4-byte length) --------------------------------------------------------

CONTROL_FRAME: Final = 64 * KIB
"""NETWORK: announcements are 2 KiB, a plan for 256 stages 40 KiB; anything larger goes over BULK."""

REQUEST_FRAME: Final = 1 * MIB
"""One piece of an API request or answer passed on between nodes; longer bodies take several frames."""

BULK_FRAME: Final = 1 * MIB
"""Answers of an artifact stream besides the raw bytes: the manifest goes in pieces of this size."""

REQUEST_BODY: Final = 32 * MIB
"""An API request body (SERVING): a 128k-token prompt is 1 MiB, images take the rest."""

# --- activations ----------------------------------------------------------------------------------------

MICROBATCH_ROWS: Final = 512
"""Rows of one activation frame: the largest prefill chunk."""

ACTIVATION_WIDTH: Final = 32_768
"""Values in a row; the widest models known use 18,432 (deepstack rows are refused)."""

SCORED_ROWS: Final = 32
"""Rows of a prompt in one frame whose logits are wanted: a vocabulary of 150,000 makes 600 KB of logits a row, 19 MB a
frame. Also what every last stage has room for (llama.cpp aborts beyond n_outputs_max, which is the larger of this and
the lanes). Over two stages prompts run as fast in chunks of 32 as in larger ones (docs/protocols/serving.md)."""

LANES: Final = 64
"""Sequences of one pipeline at once; LLAMA_MAX_SEQ is 256, the bookkeeping per frame is not."""

LANE_OPERATIONS: Final = 4 * LANES
"""In one frame: open, trim, copy and close of every lane."""

STAGES: Final = 64
"""Stages of one pipeline."""

SOURCES: Final = 16
"""Nodes named as having bytes of a model: as many as are linked to each other directly."""

STAGE_HANDSHAKES: Final = 2
"""Descriptors per stage that wait for their handshake (NETWORK): its upstream, and one redial."""

# --- artifacts ------------------------------------------------------------------------------------------

BULK_READ: Final = 256 * KIB
"""The most that one read of raw bytes returns; TLS hands them over in records of 16 KiB anyway."""

BULK_WRITE: Final = 64 * KIB
"""The most raw bytes that are encrypted before other tasks get a turn: a whole chunk of an artifact takes 5 ms of the
event loop that hands out tokens, this much 0.3 ms."""

# --- membership -----------------------------------------------------------------------------------------

ADDRESSES: Final = 8
"""Addresses in one announcement."""

ANNOUNCEMENT_TTL_MS: Final = 180_000
"""Three refreshes: a node that was not heard of for so long is not planned with."""

GOSSIP_ID: Final = 16
"""Bytes of an id: collisions of honest records are impossible, and a forged one hides only its forger's own."""

GOSSIP_IDS: Final = 2048
"""Ids in one message, 37 KB: 512 members with an announcement, and every one of them suspected by three."""

GOSSIP_BUCKETS: Final = 16
"""Parts that two rosters are compared in: one change at 256 nodes then costs 16 ids instead of 256."""

"""Every error of meshnode, in one tree.

    MeshError
    ├── ConfigError            the user's: says what to do next (`hint`); exit code 2
    │   ├── ModelError         a GGUF that is corrupt, unknown, or cannot be used as asked
    │   └── InviteError        an invite that is malformed, used, expired, revoked or for another mesh
    ├── CapacityError          the mesh cannot hold what was asked (the planner's typed shortfall as text)
    ├── RequestError           one API request cannot be served
    │   ├── InvalidRequest       the client's: malformed or impossible
    │   ├── PromptTooLong        prompt and context do not fit, ever
    │   ├── Overloaded           lanes and queue are full; try again
    │   ├── Unavailable          loading, draining, no peers; try again
    │   └── TimedOut             no token for too long
    ├── PeerError              theirs: the link drops and it is counted
    │   └── Barred               it says that this node was revoked; asking again soon is of no use
    ├── StaleFence             an order or frame of another (term, run): normal, refused, counted
    ├── StageError             a stage said no, with a machine-readable `kind`
    └── Lost                   circumstances
        ├── LinkLost             a connection ended
        └── StageLost            a stage process or its pipeline ended

Our own bugs are assertions, not members of this tree. Every class has a `kind` that travels on the wire.

Invariant: no message of this tree holds a prompt, a key, an invite secret or a token.
"""

from __future__ import annotations

from typing import ClassVar


class MeshError(Exception):
    """Root of the tree. `kind` is machine-readable and stable, the message is free text."""

    kind: ClassVar[str] = "mesh"


class ConfigError(MeshError):
    """The user asked for something impossible; `hint` says what to do next."""

    kind = "config"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ModelError(ConfigError):
    """A GGUF file that is corrupt, of unknown architecture, or cannot be used as asked."""

    kind = "model"


class InviteError(ConfigError):
    """An invite that is malformed, used, expired, revoked or belongs to another mesh."""

    kind = "invite"


class CapacityError(MeshError):
    """The mesh cannot hold what was asked."""

    kind = "capacity"


class RequestError(MeshError):
    """One API request cannot be served."""

    kind = "request"


class InvalidRequest(RequestError):
    """Malformed or impossible; `param` names the field where known."""

    kind = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(RequestError):
    """`prompt_tokens` and what must follow do not fit in `context_tokens`, ever."""

    kind = "prompt_too_long"

    def __init__(self, prompt_tokens: int, context_tokens: int) -> None:
        super().__init__(
            # LiteLLM and LangChain know by the first words of this message that another model may take the prompt.
            f"Input tokens exceed the configured limit of {context_tokens} tokens: the prompt has {prompt_tokens},"
            " and one must stay free for the answer"
        )
        self.prompt_tokens = prompt_tokens
        self.context_tokens = context_tokens


class Overloaded(RequestError):
    """Lanes and queue are full."""

    kind = "overloaded"


class Unavailable(RequestError):
    """Nothing serves this now: loading, draining, or too few peers."""

    kind = "unavailable"


class TimedOut(RequestError):
    """No token arrived for too long."""

    kind = "timed_out"


class PeerError(MeshError):
    """A peer broke the protocol or failed a check; its link drops."""

    kind = "peer"


class Barred(PeerError):
    """The peer lets this node in no more: its certificate, or its issuer's, was revoked. Believed of this peer only."""

    kind = "barred"

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message
        """In the peer's own words, without the addresses that were tried."""


class StaleFence(MeshError):
    """An order or frame of a (term, run) that is not granted here."""

    kind = "stale_fence"


class StageError(MeshError):
    """A stage refused or failed an operation; `reason` is the machine-readable kind it sent."""

    kind = "stage"

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Lost(MeshError):
    """Something this side depends on went away."""

    kind = "lost"


class LinkLost(Lost):
    """A connection ended."""

    kind = "link_lost"


class StageLost(Lost):
    """A stage process or its pipeline ended."""

    kind = "stage_lost"


def first_of(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error in a group of groups: what to tell of several that one cause had."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

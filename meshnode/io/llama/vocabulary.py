"""A model's vocabulary in llama.cpp, without its weights: description and tokenizing.

Invariant: nothing here survives an abort of native code, so it runs in a process of its own (app/tokenizer_main).
"""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path
from typing import Any, Final

import msgspec

from meshnode.core.serving.text import Vocabulary
from meshnode.errors import InvalidRequest, ModelError
from meshnode.io.llama.native import LogTap, api, listen, start
from meshnode.io.llama.stack import on_stack

TEXT_BYTES: Final = 4 * 1024 * 1024
"""Of one text: 1,000,000 tokens of English, 5 to 10 s of tokenizing."""
STACK_BYTES: Final = 512 * 1024 * 1024
"""Of the tokenizing thread, as far as it is touched. The regular expressions of some models (deepseek-llm) recurse
about 400 bytes of stack per character of a run: 100,000 times "a" ends a process with the usual 8 MiB."""
TEMPLATE_BYTES: Final = 1024 * 1024
"""The longest chat templates known have 20 KiB."""

_PIECE_BYTES = 4096


class LoadedVocabulary:
    """The vocabulary of one GGUF; lives as long as the process."""

    def __init__(self, path: Path) -> None:
        start()
        options = api.llama_model_default_params()
        options.vocab_only = True
        said = LogTap()
        listen(said)
        try:
            self._model = api.llama_model_load_from_file(str(path).encode(), options)
        finally:
            listen(None)
        if not self._model:
            # Its last complaint only repeats that it failed; the first one names the cause.
            why = f": {said.errors[0].split(': ', 2)[-1]}" if said.errors else ""
            raise ModelError(f"{path.name}: llama.cpp cannot read its vocabulary{why}")
        self._vocab = api.llama_model_get_vocab(self._model)
        self._count = api.llama_vocab_n_tokens(self._vocab)
        if self._count == 0:
            raise ModelError(f"{path.name}: it has no vocabulary")

    def describe(self) -> Vocabulary:
        """Everything the head needs to know, once."""
        known = msgspec.structs.replace(
            tokens_of(self._model),
            bos=api.llama_vocab_bos(self._vocab),
            eos=api.llama_vocab_eos(self._vocab),
            add_bos=api.llama_vocab_get_add_bos(self._vocab),
            chat_template=self._template(),
            fim=(
                api.llama_vocab_fim_pre(self._vocab),
                api.llama_vocab_fim_suf(self._vocab),
                api.llama_vocab_fim_mid(self._vocab),
            ),
        )
        return msgspec.structs.replace(known, fingerprint=_fingerprint(known))

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> tuple[int, ...]:
        """Token ids. InvalidRequest for a text beyond TEXT_BYTES."""
        raw = text.encode("utf-8", "replace")
        if len(raw) > TEXT_BYTES:
            raise InvalidRequest(f"the text has {len(raw)} bytes, at most {TEXT_BYTES} are tokenized")
        try:
            return on_stack(STACK_BYTES, lambda: self._tokenize(raw, add_special, parse_special))
        except ValueError:
            raise InvalidRequest("the text cannot be tokenized") from None

    def _tokenize(self, raw: bytes, add_special: bool, parse_special: bool) -> tuple[int, ...]:
        # No token is shorter than a byte, apart from the few that are added at the ends and, in some vocabularies,
        # a space before every part between special tokens.
        room = 2 * len(raw) + 64
        ids = (api.llama_token * room)()
        count = api.llama_tokenize(self._vocab, raw, len(raw), ids, room, add_special, parse_special)
        if count < 0:
            raise ValueError("a text has more tokens than twice its bytes")
        return tuple(ids[:count])

    def _template(self) -> str:
        raw = api.llama_model_chat_template(self._model, None) or b""
        if len(raw) > TEMPLATE_BYTES:
            raise ModelError(f"the chat template has {len(raw)} bytes, at most {TEMPLATE_BYTES} are read")
        return raw.decode("utf-8", "replace")


def tokens_of(model: Any) -> Vocabulary:
    """What the tokens of a loaded llama.cpp model say, and which end an answer; nothing else of it."""
    vocab = api.llama_model_get_vocab(model)
    count = api.llama_vocab_n_tokens(vocab)
    pieces = tuple(_piece(vocab, token, written=False) for token in range(count))
    unshown = (token for token in range(count) if not pieces[token])
    markers = {token: text for token in unshown if (text := _piece(vocab, token, written=True))}
    return Vocabulary(
        pieces, markers, frozenset(filter(lambda token: api.llama_vocab_is_eog(vocab, token), range(count)))
    )


def _piece(vocab: Any, token: int, *, written: bool) -> bytes:
    buffer = ctypes.create_string_buffer(_PIECE_BYTES)
    size = api.llama_token_to_piece(vocab, token, buffer, _PIECE_BYTES, 0, written)
    if size < 0:
        buffer = ctypes.create_string_buffer(-size)
        size = api.llama_token_to_piece(vocab, token, buffer, -size, 0, written)
    return buffer.raw[:size]


def _fingerprint(known: Vocabulary) -> str:
    """Sets and maps in the order of their ids, so that equal vocabularies give equal digests."""
    ends = (known.bos, known.eos, known.add_bos, known.chat_template)
    parts = (known.pieces, sorted(known.markers.items()), sorted(known.end), ends)
    return hashlib.sha256(msgspec.msgpack.encode(parts)).hexdigest()

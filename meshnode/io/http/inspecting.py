"""`/props` and `/slots` in llama-server's shape, for its web page and for programs that watch it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from meshnode.errors import Unavailable
from meshnode.io.http.answer import json_response
from meshnode.io.http.backend import ServedModel
from meshnode.wire.sampling import Sampling


class InspectingRoutes:
    """What llama-server tells of itself, of a model served here."""

    def __init__(self, build: str) -> None:
        self._build = build

    async def props(self, model: ServedModel, query: Mapping[str, str]) -> Response:
        """GET props."""
        vocabulary = model.vocabulary
        settings = {"id": 0, "n_ctx": model.context, "is_processing": False, "params": _parameters()}
        return json_response(
            {
                "default_generation_settings": settings,
                "total_slots": model.statistics().lanes,
                "model_alias": model.id,
                # The path of the file is nobody's business; its name is the model's.
                "model_path": model.id,
                "modalities": {"vision": False, "audio": False},
                "chat_template": vocabulary.chat_template,
                "bos_token": vocabulary.written(vocabulary.bos).decode("utf-8", "replace"),
                "eos_token": vocabulary.written(vocabulary.eos).decode("utf-8", "replace"),
                "build_info": self._build,
            }
        )

    async def slots(self, model: ServedModel, query: Mapping[str, str]) -> Response:
        """GET slots: as many entries as lanes; how many are busy is known, not for whom."""
        now = model.statistics()
        if query.get("fail_on_no_slot") and now.lanes_busy >= now.lanes:
            raise Unavailable("no slot is available")
        return json_response(
            [
                {"id": lane, "n_ctx": model.context, "is_processing": lane < now.lanes_busy, "params": _parameters()}
                for lane in range(now.lanes)
            ]
        )


def _parameters() -> dict[str, Any]:
    """The defaults, by llama-server's names."""
    usual = Sampling()
    return {
        "n_predict": -1,
        "seed": 2**32 - 1,
        "temperature": usual.temperature,
        "top_k": usual.top_k,
        "top_p": usual.top_p,
        "min_p": usual.min_p,
        "typical_p": usual.typical_p,
        "repeat_last_n": usual.penalty_window,
        "repeat_penalty": usual.repeat_penalty,
        "presence_penalty": usual.presence_penalty,
        "frequency_penalty": usual.frequency_penalty,
    }

"""The server's description in OpenAPI 3.1, with the schema of a question made of the types that check it."""

from typing import Any

from .. import __version__
from .protocol import IGNORED, MESSAGE_REFUSED, REFUSED
from .settings import Settings
from .wire import ChatBody

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REASONS = {
    400: "a mistake in the request",
    401: "the key is missing or wrong",
    404: "no such model",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is not application/json",
    421: "the server does not answer to this host name",
    429: "the queue is full; Retry-After says when to come again",
    500: "an error inside the server",
    503: "the server is about to stop",
    504: "the request took too long",
}
_EVENTS = "server-sent events whose data is a chat.completion.chunk each, or an error, at the end [DONE]"
_SECONDS = {"type": "number", "minimum": 0, "description": "seconds"}
_COUNT = {"type": "integer", "minimum": 0}
_NAME = {"parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]}
_STAGES = ("queue", "preprocess", "vision_encoding", "prepare_embeddings", "prefill", "decode", "time_to_first_token")


def document(settings: Settings) -> dict[str, Any]:
    """The whole of /openapi.json."""
    secured: dict[str, Any] = {"security": [{"key": []}]} if settings.api_key is not None else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "onevision-edge", "version": __version__, "description": "OpenAI's chat API over a bundle"},
        "paths": {
            "/": _get("The page", _content("text/html", {"type": "string"}), ()),
            "/health": _get("Whether the server takes questions", _object("Health"), (503,)),
            "/openapi.json": _get("This document", _object("Any"), ()),
            "/metrics": _get("Metrics for Prometheus", _content("text/plain", {"type": "string"}), (401,), secured),
            "/v1/models": _get("The model", _object("Models"), (401,), secured),
            "/v1/models/{name}": _get("The model", _object("Model"), (401, 404), secured | _NAME),
            "/v1/chat/completions": {"post": _chat() | secured},
        },
        "components": {
            "schemas": _schemas(settings),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _schemas(settings: Settings) -> dict[str, Any]:
    body = ChatBody.model_json_schema(ref_template="#/components/schemas/{model}")
    types = body.pop("$defs")
    body["properties"] |= {name: {} for name in IGNORED} | _neutral(REFUSED)
    body["properties"]["model"] = {"enum": [settings.model_name, None]}
    types["Message"]["properties"] |= _neutral(MESSAGE_REFUSED)
    return types | {
        "ChatBody": body,
        "ChatCompletion": _completion(),
        "Error": _ERROR,
        "Any": {"type": "object"},
        "Health": {"type": "object", "required": ["status"], "properties": {"status": {"const": "ok"}}},
        "Model": _model(settings),
        "Models": _models(),
    }


def _neutral(refused: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {name: {"enum": list(values)} for name, values in refused.items()}


def _model(settings: Settings) -> dict[str, Any]:
    limits = {"type": "object", "additionalProperties": _COUNT}
    properties = {"id": {"const": settings.model_name}, "object": {"const": "model"}, "onevision_edge": limits}
    return {"type": "object", "required": list(properties), "properties": properties}


def _models() -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["object", "data"],
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
        },
    }


def _completion() -> dict[str, Any]:
    choice = {
        "type": "object",
        "required": ["index", "message", "finish_reason", "logprobs"],
        "properties": {
            "index": _COUNT,
            "message": {
                "type": "object",
                "required": ["role", "content"],
                "properties": {"role": {"const": "assistant"}, "content": {"type": "string"}},
            },
            "finish_reason": {"enum": ["stop", "length"]},
        },
    }
    properties = {
        "id": {"type": "string"},
        "object": {"const": "chat.completion"},
        "created": _COUNT,
        "model": {"type": "string"},
        "choices": {"type": "array", "minItems": 1, "items": choice},
        "usage": _usage(),
    }
    return {"type": "object", "required": list(properties), "properties": properties}


def _usage() -> dict[str, Any]:
    details = ("cached_tokens", "image_tokens", "cached_image_tokens")
    rate = {"type": ["number", "null"], "description": "of the decode stage"}
    return {
        "type": "object",
        "required": ["prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details", "timings"],
        "properties": {
            **dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _COUNT),
            "prompt_tokens_details": {"type": "object", "properties": dict.fromkeys(details, _COUNT)},
            "timings": {
                "type": "object",
                "properties": dict.fromkeys(_STAGES, _SECONDS) | {"tokens_per_second": rate},
            },
        },
    }


def _chat() -> dict[str, Any]:
    answer = _object("ChatCompletion") | _content("text/event-stream", {"description": _EVENTS})
    return {
        "summary": "Answer a conversation about images",
        "operationId": "chat",
        "requestBody": {"required": True, "content": _object("ChatBody")},
        "responses": {"200": {"description": "the answer, whole or in server-sent events", "content": answer}}
        | _errors(400, 401, 404, 408, 413, 415, 421, 429, 500, 503, 504),
    }


def _get(summary: str, content: dict[str, Any], errors: tuple[int, ...], rest: Any = None) -> dict[str, Any]:
    responses = {"200": {"description": "done", "content": content}} | _errors(421, *errors)
    return {"get": {"summary": summary, "responses": responses} | (rest or {})}


def _errors(*statuses: int) -> dict[str, Any]:
    return {str(status): {"description": _REASONS[status], "content": _object("Error")} for status in statuses}


def _object(schema: str) -> dict[str, Any]:
    return _content("application/json", {"$ref": f"#/components/schemas/{schema}"})


def _content(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {kind: {"schema": schema}}

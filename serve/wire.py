"""The body of /v1/chat/completions as types, of which the JSON schema in /openapi.json is made."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

# An image of one black pixel.
_PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


class Wire(BaseModel):
    """A JSON object of known names and strict types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Text(Wire):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageUrl(Wire):
    """Where an image is: a data URL, or an address on a host that the server allows."""

    url: Annotated[str, Field(min_length=1, examples=[_PIXEL])]
    detail: Literal["auto", "low", "high"] | None = None  # of no effect: max_pixels says how fine an image is read


class Image(Wire):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(Wire):
    """The frames of a video as data URLs of images of one size, in order."""

    url: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class Video(Wire):
    """A video."""

    type: Literal["video_url"]
    video_url: VideoUrl


def _part_kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in ("text", "image_url", "video_url") else None


def _content_kind(value: Any) -> str | None:
    return "<string>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else None


Part = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[Image, Tag("<image_url>")] | Annotated[Video, Tag("<video_url>")],
    Discriminator(
        _part_kind,
        custom_error_type="part",
        custom_error_message='must be an object with "type": "text", "image_url" or "video_url"',
    ),
]
Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[Part], Field(min_length=1), Tag("<parts>")],
    Discriminator(_content_kind, custom_error_type="content", custom_error_message="must be text or a list of parts"),
]


class Message(Wire):
    """One turn of the conversation; developer is another name of system. Images are the user's to send."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None  # of no effect


class StreamOptions(Wire):
    """What a stream holds beside the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # of no effect


class JsonSchema(Wire):
    """A JSON schema and its name."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Wire):
    """What the answer must be: text, any JSON object, JSON of a schema, or what a regular expression matches."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None


Tokens = Annotated[int, Field(ge=1)] | None
Penalty = Annotated[float, Field(ge=-2, le=2)] | None


class ChatBody(Wire):
    """The body of POST /v1/chat/completions. The last six are not OpenAI's."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: Tokens = None
    max_tokens: Tokens = None
    n: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    response_format: ResponseFormat | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    ignore_eos: bool | None = None
    min_pixels: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_pixels: Annotated[int, Field(ge=1, le=2**31)] | None = None

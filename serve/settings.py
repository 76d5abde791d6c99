"""What a server is told once, at its start."""

from dataclasses import dataclass, fields

from ..errors import OneVisionError


@dataclass(frozen=True, slots=True)
class Settings:
    """Name, key and limits of a server. Limits are those of one request; the tightest error wins, each with its own.

    Raises OneVisionError for a limit that is not above 0, or an empty key.
    """

    model_name: str = "onevision"
    api_key: str | None = None  # what `Authorization: Bearer` must say; None: everybody may ask
    max_images: int = 16
    max_frames: int = 64  # of all its videos
    max_pixels: int = 80_000_000  # of all its images and frames together, as their files' headers say
    max_tokens: int = 4096  # that one answer may have, and the most where a request does not say
    max_choices: int = 8  # answers to one question
    max_body_bytes: int = 32_000_000
    max_open: int = 128  # requests that are read or answered at once, as their bodies are held in memory
    body_seconds: float = 30.0  # for the body to arrive
    request_seconds: float = 600.0  # from the body to the last token, waiting included
    image_hosts: tuple[str, ...] = ()  # "name" or "name:port" from which images may be fetched; none: data URLs alone
    image_seconds: float = 10.0  # for one image to be fetched
    cors_origins: tuple[str, ...] = ()  # "https://name", or "*"; none: pages of other origins are refused
    server_names: tuple[str, ...] = ()  # what the Host header may say; none: anything

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not value > 0:
                raise OneVisionError(f"{field.name} is {value}; it must be above 0")
        if self.api_key is not None and not self.api_key.strip():
            raise OneVisionError("the API key is empty; give one, or none at all")
        if not self.model_name:
            raise OneVisionError("the model's name is empty")

"""Images from hosts that the server's owner allows, without becoming a way into the network behind the server.

The host's name is resolved once, every address it has is checked, and the connection goes to a checked address,
so that a name that resolves differently a second time gains nothing. No proxies, no redirects, no compression.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from ..errors import OneVisionError

Resolve = Callable[[str, int], Awaitable[list[str]]]

_PORTS = {"http": 80, "https": 443}
_AZURE_METADATA = ipaddress.ip_address("168.63.129.16")  # answers virtual machines there, though it looks public
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


async def resolve(host: str, port: int) -> list[str]:
    """Every address of a host, as text."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: not private, loopback, link-local, metadata or multicast.

    An IPv6 address that stands for an IPv4 one (mapped, 6to4, Teredo, NAT64) is public if that is, too.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if not ip.is_global or ip.is_multicast or ip.is_reserved or ip == _AZURE_METADATA:
        return False
    return all(is_public(str(inner)) for inner in _embedded(ip))


def _embedded(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    if isinstance(ip, ipaddress.IPv4Address):
        return []
    inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if ip in _NAT64:
        inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return [address for address in inner if address is not None]


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Fetches images over HTTP from `hosts` ("name" on the scheme's own port, or "name:port")."""

    hosts: tuple[str, ...]
    max_bytes: int
    seconds: float
    resolve: Resolve = resolve
    is_public: Callable[[str], bool] = is_public

    async def __call__(self, url: str) -> bytes:
        """The body of a 200 answer. Raises OneVisionError for every other outcome, without details of the network."""
        parts, host, port = self._allowed(url)
        try:
            async with asyncio.timeout(self.seconds):
                return await self._get(parts, host, port, await self._address(host, port))
        except TimeoutError:
            raise OneVisionError(f"it was not fetched within {self.seconds:g} seconds") from None

    def _allowed(self, url: str) -> tuple[SplitResult, str, int]:
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip(".").lower(), parts.port or _PORTS[parts.scheme]
            host.encode("ascii")
        except (KeyError, ValueError):
            raise OneVisionError("it is not an address of http or https in ASCII") from None
        if parts.username is not None or parts.password is not None:
            raise OneVisionError("an address with a user's name or password is not fetched")
        named = {name.lower() for name in self.hosts}
        if f"{host}:{port}" not in named and not (host in named and port == _PORTS[parts.scheme]):
            raise OneVisionError("images from this host are not allowed; send the image itself as a data URL")
        return parts, host, port

    async def _address(self, host: str, port: int) -> str:
        try:
            addresses = await self.resolve(host, port)
        except (OSError, UnicodeError):
            addresses = []
        if not addresses:
            raise OneVisionError("its host is not found")
        if not all(self.is_public(address) for address in addresses):
            raise OneVisionError("its host has an address inside a private network, which is not fetched from")
        return addresses[0]

    async def _get(self, parts: SplitResult, host: str, port: int, address: str) -> bytes:
        import httpx2

        netloc = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        target = parts._replace(netloc=netloc, fragment="").geturl()
        named = host if port == _PORTS[parts.scheme] else f"{host}:{port}"
        headers = {"Host": named, "Accept": "image/*", "Accept-Encoding": "identity"}
        try:
            async with (
                httpx2.AsyncClient(trust_env=False, follow_redirects=False) as client,
                client.stream("GET", target, headers=headers, extensions={"sni_hostname": host}) as response,
            ):
                return await self._body(response)
        except (httpx2.HTTPError, httpx2.InvalidURL):
            raise OneVisionError("its host gave no proper answer") from None

    async def _body(self, response: Any) -> bytes:
        if response.status_code != 200:
            what = "redirects, which are not followed" if 300 <= response.status_code < 400 else "gave no image"
            raise OneVisionError(f"its host {what} (status {response.status_code})")
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise OneVisionError("its host sent it compressed")
        data = bytearray()
        async for piece in response.aiter_raw():
            data += piece
            if len(data) > self.max_bytes:
                raise OneVisionError(f"it has more than {self.max_bytes} bytes")
        return bytes(data)

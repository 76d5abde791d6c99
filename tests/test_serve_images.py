"""The door for images: data URLs, hosts, what an address resolves to, sizes, and fuzz."""

import asyncio
import base64
import io
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import EXAMPLES, data_url, refused

from onevision_edge.errors import OneVisionError
from onevision_edge.serve.errors import ApiError
from onevision_edge.serve.fetching import Fetcher, is_public
from onevision_edge.serve.images import data_url_bytes, image_pixels, read_pictures, with_files
from onevision_edge.serve.protocol import Picture
from onevision_edge.serve.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


def picture(url: str) -> Picture:
    return Picture(url, "messages[0].content[0].image_url.url")


async def no_fetch(url: str) -> bytes:
    raise AssertionError("nothing is to be fetched")


def read(*urls: str, fetch: Callable[[str], Any] = no_fetch, **changes: Any) -> list[bytes]:
    pictures = [picture(url) for url in urls]
    files = asyncio.run(read_pictures(pictures, Settings(**changes), fetch))
    return [files[p] for p in pictures]


def refusal(*urls: str, **changes: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(*urls, **changes)
    assert caught.value.param == "messages[0].content[0].image_url.url"
    assert caught.value.status == 400
    return caught.value


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def claimed(width: int, height: int) -> bytes:
    """A PNG whose header says another size than its pixels have."""
    import struct
    import zlib

    data = bytearray(png(1, 1))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def test_data_urls_become_bytes() -> None:
    assert read(data_url(png(3, 2)), data_url(png(5, 5))) == [png(3, 2), png(5, 5)]


@pytest.mark.parametrize(
    "url",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "../demo/images/photo.jpg",
        "C:\\x.png",
        "ftp://a.example/x.png",
        "gopher://a",
        "javascript:alert(1)",
        " data:image/png;base64,AA==",
        "",
        "\0",
    ],
)
def test_paths_and_other_addresses_never_pass(url: str) -> None:
    assert refusal(url, image_hosts=("a.example",)).code == "invalid_image_url"


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64", "invalid_image"),
        ("data:image/png;base64,", "invalid_image"),
        ("data:image/png;base64,!!!", "invalid_image"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "invalid_image"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "invalid_image"),
        (data_url(png(30, 20)[:20]), "invalid_image"),
        (data_url(claimed(60_000, 60_000)), "image_too_large"),
        (data_url(claimed(10_001, 10_000)), "image_too_large"),
        ("https://a.example/x.png", "image_url_not_allowed"),
    ],
)
def test_refusals(url: str, code: str) -> None:
    assert refusal(url).code == code


def test_pixels_are_counted_together() -> None:
    assert len(read(data_url(png(10, 10)), data_url(png(10, 10)), max_pixels=200)) == 2
    assert (
        "200 pixels; the limit is 199" in refusal(data_url(png(10, 10)), data_url(png(10, 10)), max_pixels=199).message
    )


def test_messages_get_the_files() -> None:
    one, two = picture("a"), picture("b")
    messages = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "image", "image": one}, {"type": "text", "text": "?"}]},
        {"role": "user", "content": [{"type": "video", "video": [two, one], "nframes": 2}]},
    ]
    assert with_files(messages, {one: b"1", two: b"2"}) == [
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "image", "image": b"1"}, {"type": "text", "text": "?"}]},
        {"role": "user", "content": [{"type": "video", "video": [b"2", b"1"], "nframes": 2}]},
    ]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.100.100.200", False),
        ("168.63.129.16", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("2002:a9fe:a9fe::", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


class Host(BaseHTTPRequestHandler):
    """A host of images with all manners of answering."""

    heard: list[tuple[str, str]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.heard.append((self.path, self.headers["Host"]))
        body, status, headers = png(4, 3), 200, {}
        if self.path == "/redirect":
            status, headers = 302, {"Location": "http://127.0.0.1/"}
        elif self.path == "/missing":
            status = 404
        elif self.path == "/packed":
            headers = {"Content-Encoding": "gzip"}
        elif self.path in ("/large", "/lies", "/endless"):
            body = bytes(100_000)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.path == "/lies":
            self.send_header("Content-Length", "10")
        elif self.path == "/short":
            self.send_header("Content-Length", "100000")
        elif self.path != "/endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/slow":
            threading.Event().wait(1.5)
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def fetcher(port: int, *addresses: str, public: Callable[[str], bool] = lambda address: True) -> Fetcher:
    async def resolve(name: str, port: int) -> list[str]:
        assert name == "images.example"
        return list(addresses or ("127.0.0.1",))

    return Fetcher((f"images.example:{port}", "images.example"), 50_000, 0.5, resolve, public)


def fetched(port: int, path: str, **options: Any) -> bytes:
    return asyncio.run(fetcher(port, **options)(f"http://images.example:{port}{path}"))


def test_fetching_asks_the_checked_address_under_the_hosts_name(host: int) -> None:
    assert fetched(host, "/a.png?b=c#d") == png(4, 3)
    assert Host.heard[-1] == ("/a.png?b=c", f"images.example:{host}")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/redirect", "redirects, which are not followed"),
        ("/missing", "gave no image \\(status 404\\)"),
        ("/packed", "compressed"),
        ("/large", "more than 50000 bytes"),
        ("/endless", "more than 50000 bytes"),
        ("/short", "no proper answer"),
        ("/slow", "not fetched within 0.5 seconds"),
    ],
)
def test_answers_that_are_refused(host: int, path: str, reason: str) -> None:
    with pytest.raises(OneVisionError, match=reason):
        fetched(host, path)


def test_a_length_that_is_too_small_cuts_the_body(host: int) -> None:
    assert fetched(host, "/lies") == bytes(10)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://other.example/a.png", "not allowed"),
        ("http://images.example:22/a.png", "not allowed"),
        ("http://images.example.evil/a", "not allowed"),
        ("http://me@images.example/a", "user's name"),
        ("http://images.example\\@other.example/", "not allowed|not an address|user's name"),
        ("http://127.0.0.1/a", "not allowed"),
        ("http://[::1]/a", "not allowed"),
        ("http://images.example:99999/", "not an address"),
        ("http://\u0131mages.example/", "not an address"),
        ("ftp://images.example/", "not an address"),
        ("http://[images.example/", "not an address"),
    ],
)
def test_addresses_that_are_refused(url: str, reason: str) -> None:
    with pytest.raises(OneVisionError, match=reason):
        asyncio.run(fetcher(80)(url))


@pytest.mark.parametrize("addresses", [("127.0.0.1",), ("93.184.216.34", "10.0.0.1"), ("::ffff:7f00:1",)])
def test_one_private_address_is_enough_to_refuse(addresses: tuple[str, ...]) -> None:
    with pytest.raises(OneVisionError, match="private network"):
        asyncio.run(fetcher(80, *addresses, public=is_public)("http://images.example/a"))


def test_a_host_without_address() -> None:
    async def resolve(name: str, port: int) -> list[str]:
        raise socket.gaierror

    with pytest.raises(OneVisionError, match="not found"):
        asyncio.run(Fetcher(("a.example",), 10, 1.0, resolve)("https://a.example/"))


def test_fetched_images_go_through_the_same_door() -> None:
    async def fetch(url: str) -> bytes:
        if url.endswith("gone"):
            raise OneVisionError("its host is not found")
        return png(6, 6)

    hosts = ("a.example",)
    assert read("https://a.example/x", data_url(png(1, 1)), fetch=fetch, image_hosts=hosts) == [png(6, 6), png(1, 1)]
    assert refusal("https://a.example/gone", fetch=fetch, image_hosts=hosts).code == "image_url_not_fetched"
    assert refusal("https://a.example/x", fetch=fetch, image_hosts=hosts, max_pixels=35).code == "image_too_large"
    asked = ["https://a.example/x"] * 20
    limit = 3 * len(png(6, 6)) + 1
    assert len(read(*asked[:3], fetch=fetch, image_hosts=hosts, max_body_bytes=limit)) == 3
    assert refusal(*asked, fetch=fetch, image_hosts=hosts, max_body_bytes=limit).code == "image_too_large"


FILES = [png(20, 10)]
for form in ("JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
    kept = io.BytesIO()
    Image.new("RGB", (20, 10), (9, 99, 199)).save(kept, form)
    FILES.append(kept.getvalue())


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.sampled_from(FILES) | st.binary(max_size=200), st.data())
def test_any_bytes_are_an_image_or_refused(file: bytes, data: st.DataObject) -> None:
    body = bytearray(file)
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(body)))
        body[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    named = picture(f"data:image/png;base64,{base64.b64encode(bytes(body)).decode()}")
    error = refused(lambda: image_pixels(named, data_url_bytes(named)))
    assert error is None or error.code in ("invalid_image", "image_too_large")


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.text() | st.text().map(lambda text: f"data:{text}") | st.text().map(lambda text: f"http://{text}"))
def test_any_address_is_bytes_or_refused(url: str) -> None:
    error = refused(lambda: read(url))
    assert error is None or error.code in ("invalid_image_url", "invalid_image", "image_url_not_allowed")
    with pytest.raises(OneVisionError):
        asyncio.run(fetcher(80)(f"http://{url}"))

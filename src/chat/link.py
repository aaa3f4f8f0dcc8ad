"""Connections to an OpenAI-compatible server, with the address, key and headers of the `openai` package.

link = Link.open(base_url, key)
response = await link.connections.post(link.url, data=body, **link.settings)
data = await read_response(response)
"""

from __future__ import annotations

import ssl
from base64 import b64encode
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import openai

from src.chat.replies import RetryableError
from src.io.errors import UserError

MAX_RESPONSE_BYTES = 1 << 24


@dataclass(frozen=True, repr=False)
class Link:
    """An aiohttp session with the SDK's key, address and headers; the SDK's own request layers take twice as long.

    settings: keyword arguments of each request
    """

    sdk: openai.AsyncOpenAI
    connections: aiohttp.ClientSession
    url: str
    settings: dict[str, Any]

    async def close(self) -> None:
        await self.connections.close()
        await self.sdk.close()

    @classmethod
    def open(cls, base_url: str | None, key: str) -> Link:
        """Open a session; needs a running event loop. base_url: None for the SDK's default"""
        sdk = openai.AsyncOpenAI(api_key=key, base_url=base_url, max_retries=0)
        headers = {
            "Authorization": f"Bearer {key}",
            "Content-Type": "application/json",
            "OpenAI-Organization": sdk.organization,
            "OpenAI-Project": sdk.project,
        }
        url = f"{str(sdk.base_url).rstrip('/')}/chat/completions"
        # headers are set on each request: those of the session would go to the proxy as well
        request_headers = {name: value for name, value in headers.items() if value}
        settings: dict[str, Any] = {"headers": request_headers, "proxy_headers": {}}
        proxy, proxy_headers = proxy_of(url)
        if proxy:
            settings["proxy"] = proxy
            settings["proxy_headers" if url.startswith("https:") else "headers"] |= proxy_headers
        connections = aiohttp.ClientSession(
            # no limit, as the gate bounds the requests in flight; CA certificates as the environment names them now
            connector=aiohttp.TCPConnector(limit=0, ssl=ssl.create_default_context()),
            timeout=aiohttp.ClientTimeout(),  # none: the client sets one for the whole request
        )
        return cls(sdk, connections, url, settings)


async def read_response(response: aiohttp.ClientResponse) -> bytes:
    """The whole body. Raises RetryableError for one above MAX_RESPONSE_BYTES."""
    data = bytearray()
    async for part in response.content.iter_any():
        data += part
        if len(data) > MAX_RESPONSE_BYTES:
            response.close()
            raise RetryableError("malformed_body", billed=True, detail="too long")
    return bytes(data)


def check_address(base_url: str) -> None:
    """Raise UserError for an invalid address, or one with a password."""
    try:
        parts = urlsplit(base_url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        (parts.hostname or "").encode("idna")
    except ValueError:
        valid, parts = False, None
    if not valid or parts is None:
        raise UserError(f"base_url must begin with http:// or https:// and name a host, got {base_url!r}")
    if parts.username or parts.password:
        raise UserError("base_url must not hold a name or a password; the key goes into the variable of key_env")


def proxy_of(url: str) -> tuple[str, dict[str, str]]:
    """The environment's proxy for an address, without its password, and the headers for it; "" where there is none."""
    parts, proxies = urlsplit(url), getproxies()
    address = proxies.get(parts.scheme) or proxies.get("all")
    if not address or proxy_bypass(parts.netloc):
        return "", {}
    proxy, headers = urlsplit(address if "://" in address else f"http://{address}"), {}
    if proxy.username:
        credentials = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {b64encode(credentials.encode()).decode()}"
    return proxy._replace(netloc=proxy.netloc.rpartition("@")[2]).geturl(), headers

"""Connections to an OpenAI-compatible server: address, key and headers are those of the `openai` package.

link = Link.open(base_url, key)
response = await link.connections.post(link.url, data=body, **link.settings)
data = await body_of(response)
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

from src.chat.replies import Trouble
from src.io.errors import UserError

LONGEST_BODY = 1 << 24  # bytes of a response


@dataclass(frozen=True, repr=False)
class Link:
    """Connections with the key, the address and the headers of the SDK, whose request layers take twice as long.

    settings: of each request
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
        """In a running event loop. base_url: as for the SDK, which knows a default"""
        sdk = openai.AsyncOpenAI(api_key=key, base_url=base_url, max_retries=0)
        headers = {
            "Authorization": f"Bearer {key}",
            "Content-Type": "application/json",
            "OpenAI-Organization": sdk.organization,
            "OpenAI-Project": sdk.project,
        }
        url = f"{str(sdk.base_url).rstrip('/')}/chat/completions"
        # headers of the session would go to the proxy too
        sent = {name: value for name, value in headers.items() if value}
        settings: dict[str, Any] = {"headers": sent, "proxy_headers": {}}
        proxy, through = proxy_of(url)
        if proxy:
            settings["proxy"] = proxy
            settings["proxy_headers" if url.startswith("https:") else "headers"] |= through
        connections = aiohttp.ClientSession(
            # as many as the gate lets in, and the certificates that the environment names now
            connector=aiohttp.TCPConnector(limit=0, ssl=ssl.create_default_context()),
            timeout=aiohttp.ClientTimeout(),  # `_send` has one of its own, for the whole request
        )
        return cls(sdk, connections, url, settings)


async def body_of(found: aiohttp.ClientResponse) -> bytes:
    """All of a response. Raises Trouble for one that does not end."""
    data = bytearray()
    async for part in found.content.iter_any():
        data += part
        if len(data) > LONGEST_BODY:
            found.close()
            raise Trouble("malformed_body", billed=True, why="too long")
    return bytes(data)


def check_address(base_url: str) -> None:
    """Raise UserError for an address that none can be."""
    try:
        parts = urlsplit(base_url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        (parts.hostname or "").encode("idna")
    except ValueError:
        whole, parts = False, None
    if not whole or parts is None:
        raise UserError(f"base_url must begin with http:// or https:// and name a host, got {base_url!r}")
    if parts.username or parts.password:
        raise UserError("base_url must not hold a name or a password; the key goes into the variable of key_env")


def proxy_of(url: str) -> tuple[str, dict[str, str]]:
    """The proxy that the environment names for an address, without its password, and the headers for it; "": none."""
    parts, proxies = urlsplit(url), getproxies()
    found = proxies.get(parts.scheme) or proxies.get("all")
    if not found or proxy_bypass(parts.netloc):
        return "", {}
    proxy, headers = urlsplit(found if "://" in found else f"http://{found}"), {}
    if proxy.username:
        told = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {b64encode(told.encode()).decode()}"
    return proxy._replace(netloc=proxy.netloc.rpartition("@")[2]).geturl(), headers

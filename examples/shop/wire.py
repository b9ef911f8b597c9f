"""What does a stranger see on a port of the shop?

The certificate that is really presented, by a handshake of Python's own ssl (nothing of meshlib takes part, so it
can't flatter itself), and whether somebody without a certificate gets an answer. It doesn't speak the protocols
behind the handshake.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

PATIENCE = 5.0


async def serial_of(address: str, identity: Path, server_name: str, roots: str | None = None) -> str:
    """The serial number that `address` presents, verified against `roots` (PEM; by default our own bundle).

    Raises OSError (ssl.SSLError is one) if nobody answers, or with a certificate that these roots don't vouch for.
    """
    context = ssl.create_default_context(cadata=roots or (identity / "bundle.pem").read_text())
    context.load_cert_chain(identity / "svid.pem", identity / "key.pem")
    context.set_alpn_protocols(["h2", "http/1.1"])
    async with asyncio.timeout(PATIENCE):
        _, writer = await connect(address, context, server_name)
        writer.transport.abort()
    return str(writer.get_extra_info("peercert")["serialNumber"]).lower()


async def answers_strangers(address: str, server_name: str) -> str:
    """ "" if a caller without certificate is turned away, otherwise the beginning of what it was told."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # a stranger doesn't care who answers
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await connect(address, context, server_name)
            writer.write(f"GET /items/7 HTTP/1.1\r\nHost: {server_name}\r\n\r\n".encode())
            answer = await reader.read(100)  # in TLS 1.3 the refusal arrives after the handshake
            writer.transport.abort()
    except (OSError, TimeoutError):
        return ""
    return answer.decode(errors="replace")


async def connect(address: str, context: ssl.SSLContext, server_name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port), ssl=context, server_hostname=server_name)

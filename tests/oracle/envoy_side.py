"""How is Envoy asked, quickly? Plain HTTP/1.1 over one kept-alive socket, many requests in one write.

Envoy takes pipelined requests of a connection one after the other, so that the sequence is the same as of single requests, without
a turn of three processes for each.
"""

from __future__ import annotations

import json
import select
import socket
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

BATCH = 64


class Client:
    """One connection to a listener whose clusters are named by the header x-cluster."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def send(self, cluster: str, method: str = "GET", **fields: str) -> None:
        """Without waiting for the answer. The fields are headers: `x_key="a"` is `x-key: a`."""
        self.socket.sendall(_request(cluster, method, fields))

    def receive(self) -> tuple[int, str]:
        """(status, body); the body of a backend is its address."""
        while (end := self.buffer.find(b"\r\n\r\n")) < 0:
            self._more()
        head = self.buffer[:end].decode("latin-1").lower()
        size = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
        while len(self.buffer) < end + 4 + size:
            self._more()
        body, self.buffer = self.buffer[end + 4 : end + 4 + size], self.buffer[end + 4 + size :]
        return int(head.split(" ")[1]), body.decode()

    def has_answer(self) -> bool:
        return bool(select.select([self.socket], [], [], 0)[0])

    def call(self, cluster: str, method: str = "GET", **fields: str) -> tuple[int, str]:
        self.send(cluster, method, **fields)
        return self.receive()

    def all(self, cluster: str, calls: Iterable[dict[str, str]]) -> list[tuple[int, str]]:
        """The answers to calls in turn, one for each set of headers."""
        requests, answers = [_request(cluster, "GET", fields) for fields in calls], []
        for start in range(0, len(requests), BATCH):
            batch = requests[start : start + BATCH]
            self.socket.sendall(b"".join(batch))
            answers += [self.receive() for _ in batch]
        return answers

    def order(self, cluster: str, count: int) -> list[str]:
        """To which endpoints so many calls go, in turn."""
        answers = self.all(cluster, [{}] * count)
        assert Counter(status for status, _ in answers) == {200: count}
        return [body for _, body in answers]

    def close(self) -> None:
        self.socket.close()

    def _more(self) -> None:
        data = self.socket.recv(65536)
        assert data, "envoy closed the connection"
        self.buffer += data


def _request(cluster: str, method: str, fields: dict[str, str]) -> bytes:
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    size = "content-length: 0\r\n" if method == "POST" else ""
    return f"{method} / HTTP/1.1\r\nhost: oracle\r\nx-cluster: {cluster}\r\n{size}{more}\r\n".encode()


def health(admin: int, cluster: str) -> dict[str, bool]:
    """By address: whether Envoy counts it as healthy."""
    status = json.load(urllib.request.urlopen(f"http://127.0.0.1:{admin}/clusters?format=json", timeout=5))
    found: dict[str, bool] = {}
    for one in status["cluster_statuses"]:
        for host in one.get("host_statuses", []) if one["name"] == cluster else []:
            at, health = host["address"]["socket_address"], host["health_status"]
            is_out = health.get("failed_outlier_check", False) or health.get("eds_health_status") == "UNHEALTHY"
            found[f"{at['address']}:{at['port_value']}"] = not is_out
    return found


def until(is_so: Callable[[], Any], seconds: float = 10.0) -> float:
    """Wait until something holds; returns when that was seen (ejections are passed to Envoy's main thread, not done at once)."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "envoy did not come to it"
        time.sleep(0.005)
    return time.monotonic()

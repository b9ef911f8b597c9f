"""What goes over the cable between the two nodes? Run on one of them by test_two_nodes: listens at the interface itself.

`python -m tests.chaos.node_cable WORD …` prints `ready`, and at TERM one line of JSON: the frames and bytes that went by, and how often
each of the words stood in them.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading

ALL = 0x0003  # ETH_P_ALL


def main(*words: str) -> None:
    is_told = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: is_told.set())
    seen, frames, size = dict.fromkeys(words, 0), 0, 0
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL)) as plug:
        plug.bind(("cable", 0))
        plug.settimeout(0.1)
        print("ready", flush=True)
        while not is_told.is_set():
            try:
                frame = plug.recv(65536)
            except TimeoutError:
                continue
            frames, size = frames + 1, size + len(frame)
            for word in words:
                seen[word] += frame.count(word.encode())
    print("result", json.dumps({"frames": frames, "bytes": size, "seen": seen}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Which scenarios are there, and which numbers and words belong to them?

They are those of gRPC's description of its interoperability tests, so that peers of other languages expect the same. The scenarios
themselves are written twice, since the two kinds of grpcio's clients have different shapes: scenarios_aio.py and scenarios_sync.py.
"""

from __future__ import annotations

SCENARIOS = (
    *("empty_unary", "large_unary", "client_streaming", "server_streaming", "ping_pong", "empty_stream"),
    *("cancel_after_begin", "cancel_after_first_response", "timeout_on_sleeping_server"),
    *("status_code_and_message", "special_status_message", "unimplemented_method", "unimplemented_service"),
    "custom_metadata",
)

LARGE_REQUEST, LARGE_RESPONSE = 271828, 314159
REQUEST_SIZES, RESPONSE_SIZES = (27182, 8, 1828, 45904), (31415, 9, 2653, 58979)
TIMEOUT = 0.001
# What grpcio says, with the mesh and without it, where the deadline comes at a bad moment: INTERNAL in the middle of an aio write (one
# call in a hundred), CANCELLED if the server's clock fires first and it resets the stream, as grpc-go's does (one call in six on a
# connection that stands). Such a call proves nothing and is made again; one that always ends so fails.
BAD_MOMENTS, MOMENTS = ("INTERNAL", "CANCELLED"), 20
INITIAL = ("x-grpc-test-echo-initial", "test_initial_metadata_value")
TRAILING = ("x-grpc-test-echo-trailing-bin", b"\xab\xab\xab")
# The code is UNKNOWN.
STATUS = (2, "test status message")
SPECIAL_STATUS = (2, "\t\ntest with whitespace\r\nand Unicode BMP \u263a and non-BMP \U0001f608\t\n")


def same(expected: object, actual: object, what: str) -> None:
    """Raise AssertionError with words of its own: the scenarios run outside of pytest as well."""
    if expected != actual:
        raise AssertionError(f"{what}: expected {_short(expected)}, seen {_short(actual)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}… ({len(text)} characters)"

"""THE OUTBOUND WAY: how does a call of the application reach an endpoint?

    way.py        the way, from top to bottom
    pool.py       which connection can be used again
    loop.py       the caller's event loop moves the bytes
    thread.py     the calling thread moves the bytes
    http.py       the face for httpx
    grpc.py       the face for grpc and grpc.aio
    function.py   the face for any function: `mesh.guard`

What only some calls need stands beside the way: a second attempt beside the first (`race.py`), strategies of tenacity
(`patience.py`), a streamed body that is sent again (`replay.py`), a fallback (`stand_in.py`). Its mirror is `meshlib.server`.
"""

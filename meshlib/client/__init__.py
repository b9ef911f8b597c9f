"""THE OUTBOUND WAY: how does a call of the application reach an endpoint?

    way.py      the way, from top to bottom
    pool.py     which connection can be used again
    loop.py     the caller's event loop moves the bytes
    thread.py   the calling thread moves the bytes
    http.py     the face for httpx
    grpc.py     the face for grpc and grpc.aio

Its mirror is `meshlib.server`.
"""

"""How does a call get into the application?

`way.py` is THE INBOUND WAY, the mirror of `client/way.py`. `asgi.py`, `wsgi.py` and `grpc.py` are its faces: they translate between
a server's interface and the way. `door.py` decides about connections: TLS or plain, and who stands outside; `uvicorn.py` and
`gunicorn.py` put it in front of those servers, the one per event loop, the other per thread. `serve.py` starts them. Nothing here
is imported before it is used: the servers are an extra.
"""

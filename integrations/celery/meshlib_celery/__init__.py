"""How do tasks of Celery belong to the mesh?

    install(mesh)              once per process, in the module of the Celery application: for those who send, and for workers
    sender()                   in a task: who sent it, proved by a signature; None if nothing is proved
    claimed_sender()           who the message says that it is from: for logs
    @sender_required("web")    below @app.task: the task fails unless one of these has proved that they sent it

The broker is not the mesh: whoever can write into it can write any header. So a message is signed with the key of its sender's identity,
and judged with the roots that connections are judged with. Trace context travels along; a deadline doesn't, since a task isn't cut by that
of the request that queued it. Telemetry is flushed before a worker's process ends.

It is written with Celery's signals, and imports only public names of meshlib. It encrypts nothing: who can read the broker reads tasks.
"""

from __future__ import annotations

from .install import install, uninstall
from .run import SenderRefused, claimed_sender, sender, sender_required

__all__ = ["SenderRefused", "claimed_sender", "install", "sender", "sender_required", "uninstall"]
__version__ = "0.1.0"

"""Who gives the processes of this node their identities, and carries calls for those who ask it to?

The node agent, a daemon: `meshlib agent run`. One per machine, for those who want the keys of their services in one place, languages
without meshlib served by the SPIFFE Workload API, or mutual TLS outside of their process. Nothing needs it: a service that loses its
agent goes on with what it has, and calls directly.

    run.py          puts the parts together; signals, readiness, reload, drain
    sockets.py      opens the UNIX sockets, or takes those that systemd has opened
    attest.py       who is at the other end? What the kernel says, never what the caller says
    acceptor.py     accept, attest, hand on
    entries.py      which identities are for which caller? None, on doubt
    issue.py        the identities of all entries, and their rotation; authorities.py knows who vouches for them
    workload.py     the SPIFFE Workload API, in the words of messages.py, over grpc.py
    data.py         the delegated data path: what the native proxy is told, and whose connections it gets
    admin.py        how is the agent? For its own user and a few others

A connection's way is accept → attest → entries → workload or data, and there is no other way in. The daemon stands on top of the
library: nothing in it is imported by a process that has no agent.
"""

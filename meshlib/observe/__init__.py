"""What happened, and why?

    observer.py     the one face that both ways see
    trace.py        W3C Trace Context, always            spans.py     OpenTelemetry's spans, where an SDK is configured
    prometheus.py   all numbers as text, read on demand  names.py     what each number is called and means
    exposition.py   how they are written                 exporter.py  the listener that serves them
    edges.py        which edges are private; alerts      redact.py    what must never be read in a log
    traffic.py      who called what, written down        least.py     the least that allows it
    explain.py      the story of one call, for people    choice.py    why this endpoint, and not another
    text.py         numbers and tables for people

It is outside everything, so that refusals are seen too. The core counts; nothing here is on a call's path but its
trace.
"""

from __future__ import annotations

from .observer import Observer

__all__ = ["Observer"]

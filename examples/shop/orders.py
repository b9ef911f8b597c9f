"""What does a Flask service look like that never charges a customer twice?

`POST /orders` writes the order, and the answer under its `Idempotency-Key`, in one transaction; the same key gives
the same answer and nothing is done again. That is the usual contract of payment APIs, and it is the service's part in
a safe retry: no client can make up for it. A request without a key is executed as often as it comes. After the commit
the customer's receipt goes out, which takes some 60 ms, as a mail provider's API does; so there is a moment when the
order exists and the caller doesn't know it.

All processes of the service share one SQLite file. It has no rule that a purchase may stand in it once only: the demo
counts afterwards how often each one was really executed.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from typing import Any

from flask import Flask, Response, request

import meshlib

DATABASE = os.environ["ORDERS_DATABASE"]
VERSION = os.environ.get("ORDERS_VERSION", "v1")
RECEIPT_SECONDS = 0.06

SCHEMA = """
CREATE TABLE IF NOT EXISTS orders (
    id INTEGER PRIMARY KEY, purchase TEXT NOT NULL, item INTEGER NOT NULL, version TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
"""

app = Flask(__name__)
of_thread = threading.local()


@app.post("/orders")
def place() -> Response:
    purchase: dict[str, Any] = request.get_json()
    body, is_new = execute(purchase, request.headers.get("Idempotency-Key"))
    if is_new:
        send_receipt(purchase)
    return Response(body, status=201 if is_new else 200, content_type="application/json")


@app.get("/items/<int:item>")
def show(item: int) -> dict[str, Any]:
    return {"item": item, "price": 5 + item % 90, "version": VERSION}


def execute(purchase: dict[str, Any], key: str | None) -> tuple[str, bool]:
    """The answer, and whether the order was executed now. Order and answer are committed together or not at all."""
    db = database()
    db.execute("BEGIN IMMEDIATE")
    try:
        if key and (known := db.execute("SELECT body FROM answers WHERE key = ?", (key,)).fetchone()):
            db.execute("ROLLBACK")
            return str(known[0]), False
        row = (purchase["purchase"], purchase["item"], VERSION)
        order = db.execute("INSERT INTO orders (purchase, item, version) VALUES (?, ?, ?)", row).lastrowid
        body = json.dumps({"order": order, "purchase": purchase["purchase"], "version": VERSION})
        if key:
            db.execute("INSERT INTO answers (key, body) VALUES (?, ?)", (key, body))
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return body, True


def send_receipt(purchase: dict[str, Any]) -> None:
    """Stands for the call to a mail provider, the only thing here that isn't done for real."""
    time.sleep(RECEIPT_SECONDS)


def database() -> sqlite3.Connection:
    """This thread's connection: SQLite's own rule is one connection for each thread."""
    if not hasattr(of_thread, "connection"):
        connection = sqlite3.connect(DATABASE, timeout=10, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(SCHEMA)
        of_thread.connection = connection
    found: sqlite3.Connection = of_thread.connection
    return found


app = meshlib.Mesh.load().wsgi(app)

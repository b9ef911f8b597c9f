"""A service on another host, reduced to its identity: enrols, renews, and says in one line whatever changes. Run by test_two_hosts."""

from __future__ import annotations

import logging
import sys
import time

from meshlib.secure import IdentityStore
from meshlib.secure.enrol import EnrolledSource


def main(url: str, state: str, token: str, service: str) -> None:
    logging.disable()
    spiffe_id = f"spiffe://shop.internal/ns/default/sa/{service}"
    source = EnrolledSource(url, state, service, "shop.internal", spiffe_id, token=token)
    store = IdentityStore(source, mode="enforce")
    store.on_change(lambda identity: print(f"identity {identity.serial} until {identity.not_after}", flush=True))
    told = ""
    while True:
        store.refresh(time.monotonic())
        # The store's own judgement is by seconds; a test has none to lose.
        store._due = 0.0
        fault = f"{type(store.last_error).__name__}: {store.last_error}" if store.last_error else ""
        if fault != told:
            print(fault or "well again", flush=True)
            told = fault
        time.sleep(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])

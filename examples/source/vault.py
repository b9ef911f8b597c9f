"""Where does a service's identity come from? From a store of secrets."""

import time

from meshlib.secure import Parts, Secret, prove


class VaultSource:
    def __init__(self, read, spiffe_id):
        self.read, self.spiffe_id = read, spiffe_id
        self.last = (b"", None)

    def load(self):  # asked each second; the same object as long as nothing changes
        chain, key, bundle = self.read()
        parts = Parts(chain, Secret(key), bundle)
        digest, identity = self.last
        if parts.digest != digest:
            identity = prove(parts, self.spiffe_id, time.time(), last=identity)
            self.last = parts.digest, identity
        return identity

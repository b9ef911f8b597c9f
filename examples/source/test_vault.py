"""Is the store of secrets a source of identities that one can stand up with?"""

from vault import VaultSource

from meshlib.testing import check_identity_source


class Vault:
    def __init__(self, spiffe_id):
        self.spiffe_id, self.parts = spiffe_id, (b"", b"", b"")

    def publish(self, *parts):
        self.parts = parts

    def source(self):
        return VaultSource(lambda: self.parts, self.spiffe_id)

    def close(self):
        pass


def test_the_vault_conforms():
    check_identity_source(Vault)

"""Does the folder conform to what is asked of every source, and does the check find one that doesn't?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from meshlib.secure import (
    FolderSource,
    Identity,
    files,
)
from meshlib.testing import check_identity_source
from meshlib.testing import identity as conformance


def test_folder_source_conforms(tmp_path: Path) -> None:
    """To all that is asked of every source."""

    class World:
        def __init__(self, spiffe_id: str) -> None:
            self.folder = tmp_path / str(len(list(tmp_path.iterdir())))
            (self.folder / "checked").mkdir(parents=True, mode=0o700)

        def publish(self, chain: bytes, key: bytes, bundle: bytes) -> None:
            parts = [("bundle.pem", bundle, 0o644), ("key.pem", key, 0o600), ("svid.pem", chain, 0o644)]
            files.write(self.folder / "checked", parts)

        def source(self) -> FolderSource:
            return FolderSource(self.folder, "checked", conformance.TRUST_DOMAIN, conformance.SPIFFE_ID)

        def close(self) -> None:
            pass

    assert check_identity_source(World) == [rule.__name__ for rule in conformance.RULES]


BREAKS: dict[str, Callable[[Identity, list[Identity]], Identity]] = {
    "a_good_identity_is_answered_whole": lambda now, _: dataclasses.replace(now, serial="01"),
    "an_unchanged_identity_is_the_same_object": lambda now, _: dataclasses.replace(now),
    "a_new_certificate_is_seen": lambda _, seen: seen[0],
    "a_changed_bundle_is_seen": lambda now, seen: seen[0] if now.chain == seen[0].chain else now,
    "no_thread_gets_half_of_a_pair": lambda now, seen: dataclasses.replace(now, key=seen[max(0, len(seen) - 2)].key),
}


@pytest.mark.parametrize("rule", BREAKS)
def test_conformance_finds_a_source_that_breaks_a_rule(tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these sources has one fault, and is found by the rule that is made for it."""
    monkeypatch.setattr(conformance, "RULES", [each for each in conformance.RULES if each.__name__ == rule])

    class Broken(FolderSource):
        def load(self) -> Identity:
            now = super().load()
            if not hasattr(self, "seen") or self.seen[-1] is not now:
                self.seen = [*getattr(self, "seen", []), now]
            return BREAKS[rule](now, self.seen)

    class World:
        def __init__(self, spiffe_id: str) -> None:
            self.folder = tmp_path / "out"
            (self.folder / "checked").mkdir(parents=True, mode=0o700)

        def publish(self, chain: bytes, key: bytes, bundle: bytes) -> None:
            parts = [("bundle.pem", bundle, 0o644), ("key.pem", key, 0o600), ("svid.pem", chain, 0o644)]
            files.write(self.folder / "checked", parts)

        def source(self) -> FolderSource:
            return Broken(self.folder, "checked", conformance.TRUST_DOMAIN, conformance.SPIFFE_ID)

        def close(self) -> None:
            pass

    with pytest.raises(AssertionError, match=rule):
        check_identity_source(World, patience=0.5)

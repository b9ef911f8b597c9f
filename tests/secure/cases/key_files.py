"""What may the file of a key be like? Area key_files.

Keys lie in real folders with real modes and owners, and are read by the sources that a service reads them with: its own folder, and what
somebody has mounted for it. A file that changes for the worse is met by the store that has a good identity in force.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from meshlib.errors import IdentityError, KeyFileError
from meshlib.secure import FolderSource, IdentityStore, files
from tests.secure.cases import ground
from tests.secure.cases.case import Answer, Case, not_understood


def key_files(case: Case) -> Answer:
    """A key and what is wrong with its file."""
    given, words = case.given, case.prose
    if "key_mode" in given or "mode" in given:
        return _mode(str(given.get("key_mode", given.get("mode"))), words)
    if "race" in given:
        return _race(words)
    if "path" in given or "allow-listed" in words:
        return _listed(words)
    if "tmp" in given or "dir_mode" in given or "folder" in given or "directory" in words:
        return _open_folder(words)
    if "symlink" in words or "link" in given:
        return _replaced(lambda key: _as_link(key))
    if "fifo" in words or "pipe" in words:
        return _replaced(_as_pipe)
    if "device" in words or "/dev/" in words:
        return _replaced(lambda key: (key.unlink(), os.mknod(key, stat.S_IFCHR | 0o600, os.makedev(1, 3))))
    if any(word in words for word in ("owner", "owned", "belongs", "uid", "another user", "other user")):
        return _replaced(lambda key: os.chown(key, 65534, 65534))
    if any(word in words for word in ("expired", "mismatch", "does not match", "wrong key", "other key", "not match", "another cert", "replace", "empty", "truncat", "encrypted", "garbage", "older", "wrong trust", "trust domain")):  # fmt: skip
        return _rotated(words)
    if any(word in words for word in ("huge", "large", "gib", "mib")):
        return _replaced(lambda key: key.write_bytes(b"x" * 2_000_000))
    if any(word in words for word in ("umask", "write", "created", "temp")):
        return _created()
    if any(word in words for word in ("inherit", "cloexec", "fork", "exec")):
        return _inherited()
    if "swap" in words or "core" in words:
        return {"not_supported"}
    raise not_understood(case)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder with an identity of the service, for this test alone."""
    folder = Path(tempfile.mkdtemp(dir=ground.home())) / "identities"
    shutil.copytree(ground.home() / "identities", folder)
    for service in folder.iterdir():
        service.chmod(0o755)
        (service / "key.pem").chmod(0o600)
    folder.chmod(0o755)
    yield folder


def _source(folder: Path) -> FolderSource:
    return FolderSource(folder, ground.SERVICE, ground.TRUST_DOMAIN, f"spiffe://td/ns/default/sa/{ground.SERVICE}")


def _refused(folder: Path) -> bool:
    try:
        _source(folder).load()
    except (KeyFileError, IdentityError):
        return True
    return False


def _mode(mode: str, words: str) -> Answer:
    """A key with this mode, in our own folder and where somebody mounts it for us."""
    number = int(mode.removeprefix("0o"), 8)
    is_foreign = any(word in words for word in ("other group", "foreign group", "another group"))
    with _folder() as folder:
        own = folder / ground.SERVICE
        key = own / "key.pem"
        if is_foreign:
            os.chown(key, os.geteuid(), 54321)
        key.chmod(number)
        is_refused = _refused(folder)
        is_mounted_refused = _is_mount_refused(own)
    if any(word in words for word in ("fsgroup", "mounted", "kubernetes", "docker", "own group")):
        return {"refuse", "reject"} if is_mounted_refused else {"accept", "allow"}
    # There is no mode in which it would do, so that it is as strict as can be.
    return {"refuse", "reject", "fatal in strict", "fatal_in_strict"} if is_refused else {"accept", "allow"}


def _is_mount_refused(folder: Path) -> bool:
    from meshlib.secure.mounted import MountedSource

    try:
        MountedSource(
            folder / "svid.pem", folder / "key.pem", folder / "bundle.pem", f"spiffe://td/ns/default/sa/{ground.SERVICE}"
        ).load()
    except (KeyFileError, IdentityError):
        return True
    return False


def _race(words: str) -> Answer:
    if "symlink" in words or "link" in words.split():
        return _replaced(_as_link)
    if any(word in words for word in ("half", "partial", "truncat", "torn", "written")):
        return _rotated("truncated")
    if any(
        word in words
        for word in ("pair", "key then cert", "between", "cert and key", "different", "generation", "mixed", "separately")
    ):
        return _rotated("mismatch")
    return _single_open()


def _single_open() -> Answer:
    """The file is exchanged for a link to another one right after it was opened: what was opened is what is judged and read."""
    with _folder() as folder:
        own = folder / ground.SERVICE
        key, opened, looked = own / "key.pem", [], []
        real_open, real_stat, here = os.open, os.stat, threading.get_ident()

        def is_ours(path: Any) -> bool:
            # Other threads look at keys of their own.
            return str(path).endswith("key.pem") and threading.get_ident() == here

        def spied_open(path: Any, *more: Any, **named: Any) -> int:
            if is_ours(path):
                opened.append(path)
                fd = real_open(path, *more, **named)
                # Now somebody exchanges it.
                key.unlink()
                key.symlink_to("/etc/hostname")
                return fd
            return real_open(path, *more, **named)

        def spied_stat(path: Any, *more: Any, **named: Any) -> Any:
            if is_ours(path):
                looked.append(path)
            return real_stat(path, *more, **named)

        content = key.read_bytes()
        with mock.patch("os.open", spied_open), mock.patch("os.stat", spied_stat), mock.patch("os.lstat", spied_stat):
            with files.folder(own) as fd:
                found = bytes(files.read_secret(fd, own, "key.pem"))
    return {"single_open"} if found == content and len(opened) == 1 and not looked else {"opened_again"}


def _rotated(words: str) -> Answer:
    """A good identity is in force; then the files become what the case says."""
    from meshlib.secure.ca import CertificateAuthority

    with _folder() as folder:
        own = folder / ground.SERVICE
        store = IdentityStore(_source(folder), mode="enforce")
        store.refresh(0.0)
        before = store.current
        assert before is not None
        other = CertificateAuthority.open(ground.home() / "ca")
        if "expired" in words:
            made = CertificateAuthority.open(ground.home() / "ca", clock=lambda: time.time() - 7200).issue(ground.SERVICE, 3600)
            (own / "svid.pem").write_bytes(made.chain)
            (own / "key.pem").write_bytes(made.key)
        elif "trust" in words:
            made = CertificateAuthority.create(None, "other").issue(ground.SERVICE)
            (own / "svid.pem").write_bytes(made.chain)
            (own / "key.pem").write_bytes(made.key)
        elif "empty" in words:
            (own / "svid.pem").write_bytes(b"")
        elif any(word in words for word in ("truncat", "half", "partial")):
            for name in ("svid.pem", "key.pem"):
                content = (own / name).read_bytes()
                (own / name).write_bytes(content[: len(content) // 2])
        elif "garbage" in words or "encrypted" in words:
            (own / "key.pem").write_bytes(b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
        else:
            (own / "key.pem").write_bytes(other.issue(ground.SERVICE).key)
        store.refresh(1.0)
        after = store.current
        is_kept = after is before and store.last_error is not None
        at_start = _refused(folder)
    return {"keep_last_good", "reject", *({"refuse"} if at_start else set())} if is_kept else {"taken"}


def _replaced(change: Any) -> Answer:
    """Something else than a key of ours lies under the key's name."""
    with _folder() as folder:
        change(folder / ground.SERVICE / "key.pem")
        begun = time.monotonic()
        is_refused = _refused(folder)
        is_quick = time.monotonic() - begun < 2
    return {"refuse", "reject"} if is_refused and is_quick else {"accept"}


def _as_link(key: Path) -> None:
    there = key.with_name("elsewhere.pem")
    key.rename(there)
    key.symlink_to(there)


def _as_pipe(key: Path) -> None:
    key.unlink()
    os.mkfifo(key, 0o600)


def _open_folder(words: str) -> Answer:
    """A folder in which everybody can make and exchange files: for a key, for what we write, and for what is private to a process."""
    with _folder() as folder:
        own = folder / ground.SERVICE
        own.chmod(0o777)
        reads = _refused(folder)
        writes = False
        try:
            files.write(own, [("key.pem", b"x", 0o600)])
        except KeyFileError:
            writes = True
        makes = False
        try:
            files.make_private(own)
        except KeyFileError:
            makes = True
    fresh = Path(tempfile.mkdtemp(dir=ground.home())) / "run"
    files.make_private(fresh)
    is_private = stat.S_IMODE(fresh.stat().st_mode) == 0o700
    return {"refuse", "reject", "refuse_to_start"} if reads and writes and makes and is_private else {"accept"}


def _listed(words: str) -> Answer:
    """A file that the configuration names and whose content would be sent away."""
    with tempfile.TemporaryDirectory() as folder:
        allowed = Path(folder) / "tokens"
        allowed.mkdir(mode=0o700)
        (allowed / "token").write_text("t")
        (allowed / "token").chmod(0o600)
        outside = Path(folder) / "secret"
        outside.write_text("s")
        outside.chmod(0o600)
        (allowed / "link").symlink_to(outside)
        good = bytes(files.read_listed(allowed / "token", [allowed])) == b"t"
        refused = 0
        for path in (outside, allowed / "link", allowed / ".." / "secret", Path("/etc/passwd")):
            try:
                files.read_listed(path, [allowed])
            except KeyFileError:
                refused += 1
    return {"allow-listed directory", "refuse", "reject"} if good and refused == 4 else {"read"}


def _created() -> Answer:
    """What we write ourselves: made anew and private from its first moment, whatever the umask says."""
    old = os.umask(0)
    try:
        folder = Path(tempfile.mkdtemp(dir=ground.home())) / "made"
        files.make_private(folder)
        files.write(folder, [("key.pem", b"x", 0o600)])
        mode = stat.S_IMODE((folder / "key.pem").stat().st_mode)
    finally:
        os.umask(old)
    return {"0600", "private", "mode_0600", "refuse"} if mode == 0o600 else {oct(mode)}


def _inherited() -> Answer:
    """No descriptor of a key is left for a child."""
    with _folder() as folder:
        before = set(os.listdir("/proc/self/fd"))
        _source(folder).load()
        after = set(os.listdir("/proc/self/fd"))
    return {"closed", "cloexec", "not_inherited"} if len(after) <= len(before) else {"open"}

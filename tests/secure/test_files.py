"""Is a file believed only if nobody else can have read or changed it, by whatever way it was handed over?"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshlib.errors import KeyFileError
from meshlib.secure import files
from meshlib.secure.files import Secret

NOBODY = 12345
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "mount"
    made.mkdir(mode=0o755)
    return made


def put(folder: Path, name: str, content: bytes = b"content", mode: int = 0o600) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    (folder / name).chmod(mode)
    return folder / name


def mounted(folder: Path, name: str) -> Secret:
    with files.mount(folder) as mount:
        return mount.read_secret(name)


def plain(folder: Path, name: str) -> Secret:
    with files.folder(folder) as fd:
        return files.read_secret(fd, folder, name, may_group=True)


BOTH = pytest.mark.parametrize("read", [mounted, plain])
Read = Callable[[Path, str], Secret]

# ---------------------------------------------------------------------------------------------------- who may read a key


@BOTH
def test_key_may_be_readable_by_our_own_group(folder: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Kubernetes' fsGroup and Docker secrets with a gid make it: root's file, our supplementary group, 0440."""
    path = put(folder, "key", mode=0o440)
    monkeypatch.setattr(os, "getegid", lambda: 4242)
    monkeypatch.setattr(os, "getgroups", lambda: [4243, path.stat().st_gid])
    assert read(folder, "key") == b"content"


@BOTH
@pytest.mark.parametrize("mode", [0o440, 0o640, 0o040])
def test_key_readable_by_another_group_is_refused(folder: Path, read: Read, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the error says what to write in Kubernetes and in Docker."""
    put(folder, "key", mode=mode)
    monkeypatch.setattr(os, "getegid", lambda: 4242)
    monkeypatch.setattr(os, "getgroups", lambda: [4242, 4243])
    with pytest.raises(KeyFileError, match=rf"may be opened by other users .*mode {mode:04o}") as caught:
        read(folder, "key")
    for word in ("chmod 600", "defaultMode: 0400", "fsGroup", "Docker", "uid"):
        assert word in caught.value.hint


@BOTH
@pytest.mark.parametrize("mode", [0o444, 0o644, 0o604, 0o660, 0o620, 0o650, 0o601, 0o610, 0o602, 0o777])
def test_key_open_to_more_than_reading_by_our_group_is_refused(folder: Path, read: Read, mode: int) -> None:
    """Nobody else may read it, and our group may not write it, nor anything else."""
    put(folder, "key", mode=mode)
    with pytest.raises(KeyFileError, match=rf"may be opened by other users .*mode {mode:04o}"):
        read(folder, "key")


def test_key_of_a_ca_is_its_owners_alone(folder: Path) -> None:
    """Where nobody asked for it, no group may read."""
    put(folder, "root.key", mode=0o440)
    with files.folder(folder) as fd, pytest.raises(KeyFileError, match="mode 0440"):
        files.read_secret(fd, folder, "root.key")


@BOTH
@AS_ROOT
def test_file_of_another_user_is_refused(folder: Path, read: Read) -> None:
    """Whoever owns it can change it."""
    os.chown(put(folder, "key"), NOBODY, -1)
    with pytest.raises(KeyFileError, match=f"belongs to user {NOBODY}"):
        read(folder, "key")


@BOTH
def test_file_is_judged_by_what_was_opened(folder: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """One open: whoever swaps the file between a look and the reading changes nothing, since there is no look at the path."""
    put(folder, "key")
    put(folder, "evil", b"evil", 0o644)
    real, opened = os.open, []

    def swap(path: Any, flags: int, *more: Any, **named: Any) -> int:
        fd = real(path, flags, *more, **named)
        if path == "key":
            opened.append(path)
            os.rename(folder / "evil", folder / "key")
        return fd

    monkeypatch.setattr(os, "open", swap)
    assert (read(folder, "key"), opened) == (b"content", ["key"])
    with pytest.raises(KeyFileError, match="mode 0644"):
        put(folder, "evil", b"evil", 0o644)
        read(folder, "key")


# ---------------------------------------------------------------------------------------------------- through a mount


def turn(folder: Path, moment: str, **contents: bytes) -> None:
    """What Kubernetes does: a new folder, and one rename that turns ..data to it."""
    for name, content in contents.items():
        put(folder / moment, name, content, 0o440)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    (folder / "..data_tmp").symlink_to(moment)
    (folder / "..data_tmp").rename(folder / "..data")


def test_links_are_followed_inside_the_mount(folder: Path) -> None:
    """A name, ..data, the folder of that moment; also up and down again, as long as it stays inside."""
    turn(folder, "..2024_01", key=b"one")
    (folder / "..2024_01" / "up").symlink_to("../..2024_01/./key")
    (folder / "other").symlink_to("..data/up")
    assert [mounted(folder, name) for name in ("key", "other", "..data/key")] == [b"one"] * 3


def test_files_of_one_reading_are_of_one_moment(folder: Path) -> None:
    """The link is turned between the two reads: both come from where it led first."""
    turn(folder, "..2024_01", cert=b"one", key=b"one")
    with files.mount(folder) as mount:
        first = mount.read_public("cert")
        turn(folder, "..2024_02", cert=b"two", key=b"two")
        assert (first, mount.read_secret("key")) == (b"one", b"one")
    with files.mount(folder) as mount:
        assert (mount.read_public("cert"), mount.read_secret("key")) == (b"two", b"two")


@pytest.mark.parametrize("target", ["/etc/hostname", "../outside", "..data/../../outside", "../mount/key", "inner/../../outside"])
def test_link_that_leads_out_of_the_mount_is_refused(folder: Path, target: str) -> None:
    """Also one that would come back in: on the way out, somebody else decides."""
    put(folder.parent, "outside")
    put(folder, "key")
    put(folder, "inner/x")
    turn(folder, "..2024_01", data=b"x")
    (folder / "link").symlink_to(target)
    with pytest.raises(KeyFileError, match="link leads to no file|leads out of its folder") as caught:
        mounted(folder, "link")
    assert "out of its folder" in str(caught.value)


@pytest.mark.parametrize(
    ("links", "reason"),
    [
        ({"link": "link"}, "leads to no file"),
        ({"link": "other", "other": "link"}, "leads to no file"),
        ({"link": "nowhere"}, "does not exist"),
        ({"link": "inner"}, "not a regular file"),
        ({"link": "."}, "leads to no file"),
        ({"link": "inner/.."}, "leads to no file"),
        ({"link": "key/x"}, "can't be opened: Not a directory"),
        ({f"l{n}": f"l{n + 1}" for n in range(60)} | {"link": "l0", "l60": "key"}, "leads to no file"),
    ],
)
def test_link_that_leads_to_no_file_is_refused(folder: Path, links: dict[str, str], reason: str) -> None:
    """In circles, nowhere, to a folder, or over too many stations."""
    put(folder, "key")
    put(folder, "inner/x")
    for name, target in links.items():
        (folder / name).symlink_to(target)
    with pytest.raises(KeyFileError, match=reason):
        mounted(folder, "link")


@AS_ROOT
@pytest.mark.parametrize("part", ["key", "..data", "..2024_01"])
def test_every_part_of_the_way_belongs_to_us_or_to_root(folder: Path, part: str) -> None:
    """Whoever owns a link or a folder on the way chooses what is read."""
    turn(folder, "..2024_01", key=b"one")
    os.chown(folder / part, NOBODY, -1, follow_symlinks=False)
    with pytest.raises(KeyFileError, match=f"belongs to user {NOBODY}"):
        mounted(folder, "key")


@pytest.mark.parametrize("part", [".", "..2024_01"])
@pytest.mark.parametrize(("mode", "is_good"), [(0o775, False), (0o757, False), (0o1777, True), (0o3777, True), (0o2755, True)])
def test_folder_open_to_others_counts_where_they_cannot_swap(folder: Path, part: str, mode: int, is_good: bool) -> None:
    """Kubernetes mounts Secrets in a folder of mode 1777: with the sticky bit only the owner can move what is his."""
    turn(folder, "..2024_01", key=b"one")
    (folder / part).chmod(mode)
    if is_good:
        assert mounted(folder, "key") == b"one"
    else:
        with pytest.raises(KeyFileError, match=r"may be changed by other users .*emptyDir"):
            mounted(folder, "key")


@AS_ROOT
def test_file_of_another_user_in_a_sticky_folder_is_refused(folder: Path) -> None:
    """That he could put it there says nothing for it."""
    folder.chmod(0o1777)
    os.chown(put(folder, "key"), NOBODY, -1)
    with pytest.raises(KeyFileError, match=f"belongs to user {NOBODY}"):
        mounted(folder, "key")


@pytest.mark.parametrize("name", ["key", "link"])
def test_folder_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    """With the path, as everywhere."""
    put(tmp_path, "key")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(KeyFileError, match=str(tmp_path / name)):
        mounted(tmp_path / name, "key")


def test_pipe_in_a_mount_is_refused_at_once(folder: Path) -> None:
    """Nobody writes to it, and nobody waits."""
    os.mkfifo(folder / "key", 0o600)
    with pytest.raises(KeyFileError, match="not a regular file"):
        mounted(folder, "key")


def test_reading_leaves_no_descriptor_open(folder: Path) -> None:
    """Neither after a good reading nor after a bad one: it is done each second."""
    turn(folder, "..2024_01", key=b"one")
    (folder / "out").symlink_to("../outside")
    (folder / "open").write_bytes(b"x")
    (folder / "open").chmod(0o666)
    before = len(os.listdir("/proc/self/fd"))
    for name in ("key", "out", "nowhere", "open", "..data") * 3:
        try:
            mounted(folder, name)
        except KeyFileError:
            pass
    assert len(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------------------------------------------- secrets by a path


def test_secret_is_read_from_listed_folders_only(folder: Path, tmp_path: Path) -> None:
    """Whoever can write a configuration must not be able to have any file read, and sent away as a token."""
    put(folder, "token", b"t0ken\n")
    put(tmp_path, "shadow", b"root:x")
    assert files.read_listed(folder / "token", [folder]) == b"t0ken"
    for path in (
        tmp_path / "shadow",
        folder / ".." / "shadow",
        "/etc/passwd",
        "/proc/self/environ",
        "/run/secrets/../../etc/passwd",
    ):
        with pytest.raises(KeyFileError, match="in no folder from which secrets are read"):
            files.read_listed(path, [folder])


def test_link_out_of_a_listed_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    """What counts is where the file is."""
    put(tmp_path, "shadow", b"root:x")
    (folder / "token").symlink_to("../shadow")
    with pytest.raises(KeyFileError, match="in no folder from which secrets are read"):
        files.read_listed(folder / "token", [folder])


def test_secret_of_systemd_is_read_from_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`LoadCredential=` tells it in the environment."""
    put(folder, "token", b"t0ken", 0o400)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    found = files.read_listed(folder / "token")
    assert (found, "t0ken" in repr(found)) == (b"t0ken", False)


@pytest.mark.parametrize("mode", [0o644, 0o604])
def test_listed_secret_that_others_may_read_is_refused(folder: Path, mode: int) -> None:
    """It is as secret as a key."""
    put(folder, "token", mode=mode)
    with pytest.raises(KeyFileError, match="may be opened by other users"):
        files.read_listed(folder / "token", [folder])


# ---------------------------------------------------------------------------------------------------- folders of ours


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o703])
def test_folder_in_which_others_could_put_a_socket_is_none_of_ours(tmp_path: Path, mode: int) -> None:
    """What is ours alone is made with 0700; one that is there is taken only if nobody else can change it."""
    assert stat.S_IMODE(files.make_private(tmp_path / "new" / "run").stat().st_mode) == 0o700
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    with pytest.raises(KeyFileError, match="may be changed by other users"):
        files.make_private(tmp_path / "open")


# ---------------------------------------------------------------------------------------------------- what a disk takes


def test_line_is_appended_whole_however_little_the_disk_takes_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write may take less than it was given; the rest follows."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:7]))
    files.append(folder, "log", b"the first line of the log")
    files.append(folder, "log", b"and the second one")
    assert (folder / "log").read_bytes() == b"the first line of the log\nand the second one\n"


def test_line_for_which_there_is_no_room_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as fits, then nothing: the caller must not go on as if it were written."""
    real, left = os.write, [10]

    def write(fd: int, data: bytes) -> int:
        taken = real(fd, bytes(data)[: left[0]])
        left[0] -= taken
        return taken

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space left"):
        files.append(folder, "log", b"the first line of the log")

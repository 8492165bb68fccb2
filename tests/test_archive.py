"""Archives that mean harm, and archives that are broken: nothing outside, nothing too large, nothing in silence."""

from __future__ import annotations

import stat
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xmc_midx.data import archive as module
from xmc_midx.data.archive import Limits, extract
from xmc_midx.errors import DownloadError, ResourceError
from xmc_midx.types import SilentReporter

pytestmark = pytest.mark.fault("R13")


def write(path: Path, members: list[tuple[str | zipfile.ZipInfo, bytes]]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of duplicates and writes them
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in members:
                file.writestr(name, data, zipfile.ZIP_DEFLATED)
    return path


def unpack(path: Path, limits: Limits | None = None) -> dict[str, str]:
    """Into a directory of its own, deep enough to see what would leave it."""
    target = path.parent / "deep" / "target"
    target.mkdir(parents=True)
    return extract(path, target, reporter=SilentReporter(), limits=limits or Limits())


def special(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = mode << 16
    return info


OUTSIDE = {
    "zip slip": "../../out.txt",
    "zip slip behind a folder": "a/../../out.txt",
    "absolute": "/tmp/xmc-midx-out.txt",
    "drive letter": "C:/out.txt",
    "backslash": "..\\..\\out.txt",
    "double slash": "a//out.txt",
    "dot": "a/./out.txt",
    "control character": "a\nb.txt",
    "symlink": special("link", stat.S_IFLNK | 0o777),
    "device": special("device", stat.S_IFCHR | 0o666),
    "pipe": special("pipe", stat.S_IFIFO | 0o666),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_nothing_leaves_the_directory(case: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", [("good.txt", b"good"), (OUTSIDE[case], b"../../good.txt")])
    with pytest.raises(DownloadError, match="is not unpacked"):
        unpack(path)
    # All is checked before the first byte: not even the good member is there.
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.zip", "deep", "target"]
    assert not Path("/tmp/xmc-midx-out.txt").exists()


@pytest.mark.parametrize(
    "names", [["a.txt", "a.txt"], ["a.txt", "A.TXT"], ["x/a.txt", "x/a.txt"], ["a", "a/b.txt"], ["a.txt", "a.txt/"]]
)
def test_two_members_of_one_name_are_refused(names: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", [(name, b"" if name.endswith("/") else name.encode()) for name in names])
    with pytest.raises(DownloadError, match=r"twice|lies in a file"):
        unpack(path)


def test_bombs_are_refused_before_they_go_off(tmp_path: Path) -> None:
    bomb = write(tmp_path / "bomb.zip", [("zeros", bytes(8 * 2**20))])
    with pytest.raises(DownloadError, match="times its size"):
        unpack(bomb)
    hidden = write(tmp_path / "hidden.zip", [("zeros", bytes(2 * 2**20)), ("x", np.random.default_rng(0).bytes(10**5))])
    (tmp_path / "deep" / "target").rmdir()
    with pytest.raises(DownloadError, match="packed by more than 200 to 1"):
        unpack(hidden)
    (tmp_path / "deep" / "target").rmdir()
    with pytest.raises(DownloadError, match="unpacks to 2,197,152 bytes, more than the limit of 9"):
        unpack(hidden, Limits(total_bytes=9))
    (tmp_path / "deep" / "target").rmdir()
    with pytest.raises(DownloadError, match="holds 2 members, more than the limit of 1"):
        unpack(hidden, Limits(num_members=1))


def test_members_that_share_bytes_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", [("a", np.random.default_rng(0).bytes(5000)), ("b", b"b")])
    data = bytearray(path.read_bytes())
    second = data.rfind(b"PK\x01\x02")
    data[second + 42 : second + 46] = struct.pack("<I", 0)  # the second member begins where the first does
    path.write_bytes(data)
    with pytest.raises(DownloadError, match="overlap"):
        unpack(path)


def test_a_member_that_lies_about_its_size_stays_within_it(tmp_path: Path) -> None:
    """A directory that promises 1,000 bytes for a stream of a megabyte."""
    path = write(tmp_path / "a.zip", [("a", bytes(2**20))])
    data = bytearray(path.read_bytes())
    central = data.rfind(b"PK\x01\x02")
    data[central + 24 : central + 28] = struct.pack("<I", 1000)
    path.write_bytes(data)
    with pytest.raises(DownloadError, match=r"damaged|no sound zip"):
        unpack(path)
    assert sum(p.stat().st_size for p in (tmp_path / "deep").rglob("a")) <= 1000


def test_a_member_shorter_than_promised_is_refused(tmp_path: Path) -> None:
    """Python's zipfile returns it without a word: its CRC is right."""
    path = write(tmp_path / "a.zip", [("a", b"content")])
    data = bytearray(path.read_bytes())
    central = data.rfind(b"PK\x01\x02")
    data[central + 24 : central + 28] = struct.pack("<I", 9)
    path.write_bytes(data)
    with zipfile.ZipFile(path) as file:
        assert file.read("a") == b"content"
    with pytest.raises(DownloadError, match="damaged: 7 bytes of 9"):
        unpack(path)


def test_every_flipped_byte_and_every_cut_is_found_or_harmless(
    tmp_path: Path, record_property: Callable[[str, int], None]
) -> None:
    """Whatever byte is damaged: the files are those that were packed, or there is an error of ours."""
    content = {"f/train.txt": b"1 2 3\n0 1:1\n", "f/test.txt": b"1 2 3\n"}
    whole = write(tmp_path / "a.zip", list(content.items())).read_bytes()
    damaged = [whole[:n] for n in range(len(whole))]
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        damaged.append(bytes(flipped))
    record_property("count", len(damaged))
    refused = 0
    for number, data in enumerate(damaged):
        case = tmp_path / str(number)
        case.mkdir()
        (case / "a.zip").write_bytes(data)
        try:
            files = unpack(case / "a.zip")
        except DownloadError:
            refused += 1
            continue
        for name in files:
            read = (case / "deep" / "target" / name).read_bytes()
            assert read in content.values()
    assert refused > len(whole) + len(whole) // 2


def test_crc_encryption_and_an_empty_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr("a", b"content")
    good = path.read_bytes()
    path.write_bytes(good.replace(b"content", b"contend"))
    with pytest.raises(DownloadError, match="CRC"):
        unpack(path)
    (tmp_path / "deep" / "target" / "a").unlink()
    (tmp_path / "deep" / "target").rmdir()
    locked = bytearray(good)
    locked[locked.rfind(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(locked)
    with pytest.raises(DownloadError, match="is encrypted"):
        unpack(path)
    (tmp_path / "deep" / "target").rmdir()
    path.write_bytes(b"PK\x05\x06" + bytes(18))
    with pytest.raises(DownloadError, match="holds no file"):
        unpack(path)


def test_a_common_folder_and_litter_are_left_out(tmp_path: Path) -> None:
    members = [
        ("Top/", b""),
        ("Top/a/x.txt", b"x"),
        ("Top/y.txt", b"y"),
        ("__MACOSX/._y", b"z"),
        ("Top/.DS_Store", b"z"),
    ]
    files = unpack(write(tmp_path / "a.zip", members))  # type: ignore[arg-type]
    assert sorted(files) == ["a/x.txt", "y.txt"]
    program = special("run.sh", stat.S_IFREG | 0o4777)
    (tmp_path / "b").mkdir()
    unpack(write(tmp_path / "b" / "b.zip", [(program, b"#!")]))
    assert not (tmp_path / "b" / "deep" / "target" / "run.sh").stat().st_mode & 0o7111


def test_a_disk_without_room_is_told_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.zip", [("a", b"12345")])
    monkeypatch.setattr(module, "free_bytes", lambda directory: 4)
    with pytest.raises(ResourceError, match="need 5 bytes, 4 are free"):
        unpack(path)

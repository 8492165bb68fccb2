"""Downloads: whatever the server does, no bad file under its final name. A loopback server plays Google Drive."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from xmc_midx import load_dataset
from xmc_midx.cli.app import run
from xmc_midx.data import download as module
from xmc_midx.data import drive, fetch, registry
from xmc_midx.data.download import download
from xmc_midx.data.registry import DatasetSpec, DriveIds, Mirror
from xmc_midx.errors import DataError, DownloadError, ResourceError, UsageError
from xmc_midx.types import SilentReporter

pytestmark = pytest.mark.fault("R14")

TRAIN = b"3 4 3\n0,1 0:1 2:0.5\n2 1:1\n0 3:2\n"
TEST = b"1 4 3\n1 0:1\n"
QUOTA = (
    b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>Sorry, too many users have \
viewed or downloaded this file recently.</body></html>"
)

CONFIRM = """<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>
<form id="download-form" action="/confirmed" method="get"><input type="submit" value="Download anyway"/>
<input type="hidden" name="id" value="{id}"><input type="hidden" name="confirm" value="t">
<input type="hidden" name="uuid" value="a-b"></form></body></html>"""


def make_zip(files: dict[str, bytes] | None = None) -> bytes:
    """An archive of the toy set, with a mebibyte that does not compress."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        content = files or {"Toy/toy_train.txt": TRAIN, "Toy/toy_test.txt": TEST, "Toy/README": noise()}
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def noise(size: int = 2**20) -> bytes:
    return np.random.default_rng(5).bytes(size)


ARCHIVE = make_zip()


@dataclass
class Play:
    """How the server answers for one id."""

    body: bytes = ARCHIVE
    status: int = 200
    page: bytes | None = None
    confirm: bool = False
    ranges: bool = True
    etag: str | None = '"one"'
    length: int | None = None
    """Content-Length to claim; None is the right one, -1 none."""
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which the first connections are reset, one for each."""
    pause_s: float = 0.0
    """Between blocks of 64 kB."""
    stall_after: int | None = None
    """Silence for 2 s after so many bytes, in the first connection."""
    requests: list[dict[str, str]] = field(default_factory=list)


class Drive(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plays: dict[str, Play] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    server: Drive

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        play = self.server.plays[query["id"][0]]
        play.requests.append({**self.headers, "path": self.path})
        page = play.page
        if play.confirm and "confirm" not in query:
            page = CONFIRM.format(id=query["id"][0]).encode()
        if page is not None or play.status != 200:
            body = page or b"no"
            self.send_response(play.status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and play.ranges else 0
        if start and play.etag and self.headers.get("If-Range", play.etag) != play.etag:
            start = 0
        size = len(play.body)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Type", "application/octet-stream")
        if play.etag:
            self.send_header("ETag", play.etag)
        if play.length != -1:
            self.send_header("Content-Length", str((play.length or size) - start))
        self.end_headers()
        cut = play.cut_after.pop(0) if play.cut_after else None
        self.send_body(play, start, start + cut if cut is not None else size, reset=cut is not None)

    def send_body(self, play: Play, start: int, end: int, *, reset: bool) -> None:
        for at in range(start, end, 2**16):
            if play.stall_after is not None and at >= play.stall_after:
                play.stall_after = None
                time.sleep(2)
                return
            self.wfile.write(play.body[at : min(at + 2**16, end)])
            time.sleep(play.pause_s)
        if reset:
            self.wfile.flush()
            time.sleep(0.05)  # a reset drops what the client has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Drive]:
    """Drive on the loopback, an empty cache, no waiting between attempts."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XMC_MIDX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "WAIT_S", 0.0)
    with Drive() as drive_server:
        monkeypatch.setattr(drive, "DRIVE", drive_server.url)
        thread = threading.Thread(target=drive_server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield drive_server
        drive_server.shutdown()
        thread.join()


def toy(*ids: str, sha256: str | None = None, **changes: Any) -> DatasetSpec:
    """A set of the registry with an archive under each id."""
    mirrors = [
        Mirror(format="bow", drive=i, sha256=sha256, folder="Toy", train=("toy_train.txt",), test=("toy_test.txt",))
        for i in ids or ("a",)
    ]
    facts = {"num_features": 4, "num_labels": 3, "num_train": 3, "num_test": 1, **changes}
    text = dict.fromkeys(("description", "homepage", "licence", "citation"), "x")
    return DatasetSpec.model_validate({"name": "Toy", **text, **facts, "mirrors": tuple(mirrors)})


def assert_installed(result: module.Download, cache: Path) -> None:
    assert sorted(path.name for path in cache.iterdir()) == ["Toy", "downloads", "hashes.json"]
    assert not [path for path in (cache / "downloads").iterdir() if path.suffix != ".lock"]
    assert (cache / "Toy" / "train.txt").read_bytes() == TRAIN
    assert (cache / "Toy" / "test.txt").read_bytes() == TEST
    assert result.sha256 == hashlib.sha256(ARCHIVE).hexdigest()


def assert_nothing(cache: Path) -> None:
    """Nothing under a final name, nothing unpacked, no hash."""
    assert {path.name for path in cache.iterdir()} <= {"downloads"}
    assert not list((cache / "downloads").glob("*.zip"))


class Log(SilentReporter):
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.bytes: dict[str, int] = {}
        self.stage = ""
        self.rates: list[float] = []

    def start(self, stage: str, total: int | None) -> None:
        self.stage = stage

    def step(self, advance: int = 1, **facts: float) -> None:
        self.bytes[self.stage] = self.bytes.get(self.stage, 0) + advance
        self.rates.extend(facts.values())

    def message(self, text: str) -> None:
        self.messages.append(text)


SHORT = len(ARCHIVE) // 3
GOOD = {
    "plain": Play(),
    "confirmation page": Play(confirm=True),
    "one reset": Play(cut_after=[SHORT]),
    "three resets": Play(cut_after=[SHORT, 0, SHORT]),
    "a reset behind the confirmation": Play(cut_after=[SHORT], confirm=True),
    "resets without Range": Play(cut_after=[SHORT, 2 * SHORT], ranges=False),
    "resets without a validator": Play(cut_after=[SHORT], etag=None),
    "resets with a weak validator": Play(cut_after=[SHORT], etag='W/"one"'),
    "slow": Play(pause_s=0.01),
    "silence": Play(stall_after=SHORT),
    "no length": Play(length=-1),
}


@pytest.mark.parametrize("case", GOOD)
def test_an_archive_arrives_whatever_happens_on_the_way(
    case: str, server: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "silence":
        monkeypatch.setattr(fetch, "TIMEOUT_S", 0.3)
    server.plays["a"] = Play(**{**vars(GOOD[case]), "cut_after": list(GOOD[case].cut_after), "requests": []})
    log = Log()
    assert_installed(download(toy(), reporter=log), tmp_path / "cache")
    assert log.bytes["unpack"] == len(TRAIN) + len(TEST) + 2**20
    assert log.rates and min(log.rates) > 0
    resumed = [request["Range"] for request in server.plays["a"].requests if "Range" in request]
    if case in ("one reset", "three resets", "a reset behind the confirmation", "silence"):
        # Only what was missing came again.
        assert resumed and log.bytes["download"] == len(ARCHIVE)
    if "validator" in case:
        assert not resumed


BAD = {
    "quota page with status 200": (Play(page=QUOTA), "quota is used up"),
    "quota page with status 403": (Play(page=QUOTA, status=403), "quota is used up"),
    "sign-in page": (Play(page=b"<html><title>Sign in - Google</title></html>"), "wants a sign-in"),
    "another page": (Play(page=b"<html><title>Maintenance</title></html>"), r"web page came .*\(Maintenance\)"),
    "403": (Play(status=403), "answers 403"),
    "404": (Play(status=404), "answers 404"),
    "500": (Play(status=500), "answers 500"),
    "longer than sent": (Play(length=len(ARCHIVE) + 9), r"ended after [\d,]+ of [\d,]+ bytes"),
    "shorter than the archive": (Play(length=len(ARCHIVE) - 9), "is no sound zip archive"),
    "cut without a length": (Play(body=ARCHIVE[:-9], length=-1), "is no sound zip archive"),
    "no archive": (Play(body=b"Rar!" * 99), "no zip archive"),
    "empty": (Play(body=b"", etag=None), "no zip archive"),
    "other sizes": (
        Play(body=make_zip({"t/toy_train.txt": b"4 4 3\n", "t/toy_test.txt": TEST})),
        "the registry '3 4 3'",
    ),
    "other files": (Play(body=make_zip({"t/train.txt": TRAIN})), "expected toy_train.txt, toy_test.txt"),
    "no header": (Play(body=make_zip({"toy_train.txt": b"0 1:1\n", "toy_test.txt": TEST})), "expected a header"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_source_leaves_nothing_and_the_next_mirror_serves(case: str, server: Drive, tmp_path: Path) -> None:
    server.plays["a"], reason = BAD[case]
    with pytest.raises(DownloadError, match=reason) as caught:
        download(toy("a"))
    assert_nothing(tmp_path / "cache")
    lines = (caught.value.hint or "").splitlines()
    assert [line[:2] for line in lines] == ["By", "1.", "2.", "3."]
    assert f"{server.url}/file/d/a/view" in lines[1] and "xmc-midx download Toy --from-file" in lines[2]
    server.plays["b"] = Play()
    assert_installed(download(toy("a", "b")), tmp_path / "cache")


def test_a_changed_file_is_not_joined_to_the_old_one(server: Drive, tmp_path: Path) -> None:
    """The first half of one archive and the second of another would be a file of the right length."""
    other = bytearray(ARCHIVE)
    other[100:200] = bytes(100)
    play = server.plays["a"] = Play(body=bytes(other), cut_after=[SHORT] + [0] * 5)
    with pytest.raises(DownloadError, match="connection"):
        download(toy())
    assert [p.stat().st_size for p in (tmp_path / "cache" / "downloads").glob("*.part")] == [SHORT]
    play.body, play.etag, play.cut_after = ARCHIVE, '"two"', []
    assert_installed(download(toy()), tmp_path / "cache")
    assert play.requests[-1]["If-Range"] == '"one"'


def test_a_server_that_ignores_if_range_is_caught_by_its_own_etag(server: Drive, tmp_path: Path) -> None:
    play = server.plays["a"] = Play(body=ARCHIVE[::-1], cut_after=[SHORT] + [0] * 5)
    with pytest.raises(DownloadError):
        download(toy())
    play.body, play.etag, play.cut_after = ARCHIVE, None, []  # any If-Range is answered with 206 now
    original = Handler.send_header

    def send(self: Handler, name: str, value: str) -> None:
        original(self, name, value)
        if name == "Content-Type":
            original(self, "ETag", '"two"')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "send_header", send)
        assert_installed(download(toy()), tmp_path / "cache")


def test_a_wrong_hash_is_refused_and_the_right_one_taken(server: Drive, tmp_path: Path) -> None:
    server.plays["a"] = Play()
    with pytest.raises(DownloadError, match=f"expected {'0' * 64}"):
        download(toy(sha256="0" * 64))
    assert_nothing(tmp_path / "cache")
    assert_installed(download(toy(sha256=hashlib.sha256(ARCHIVE).hexdigest())), tmp_path / "cache")


def test_the_first_hash_is_recorded_and_enforced(server: Drive, tmp_path: Path) -> None:
    server.plays["a"] = Play()
    first = download(toy())
    recorded = tmp_path / "cache" / "hashes.json"
    assert json.loads(recorded.read_text()) == {"drive:a": first.sha256}
    server.plays["a"] = Play(body=make_zip({"toy_train.txt": TRAIN, "toy_test.txt": TEST}))
    with pytest.raises(DownloadError, match=re.escape(str(recorded))):
        download(toy(), directory=tmp_path / "again")
    assert not (tmp_path / "again").exists()
    recorded.write_text("[")
    with pytest.raises(DataError, match=r"hashes\.json: is damaged"):
        download(toy(), directory=tmp_path / "again")


def test_an_old_part_with_a_known_hash_is_given_up_when_it_does_not_fit(server: Drive, tmp_path: Path) -> None:
    play = server.plays["a"] = Play(body=ARCHIVE[::-1], etag=None, cut_after=[SHORT] + [0] * 5)
    spec = toy(sha256=hashlib.sha256(ARCHIVE).hexdigest())
    with pytest.raises(DownloadError):
        download(spec)
    play.body, play.cut_after = ARCHIVE, []
    assert_installed(download(spec), tmp_path / "cache")
    assert "Range" in play.requests[-2] and "Range" not in play.requests[-1]


def test_what_is_there_is_verified_and_damage_is_found_before_use(
    server: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.plays["a"] = Play()
    monkeypatch.setattr(registry, "load_registry", lambda: (toy(),))
    monkeypatch.chdir(tmp_path)
    download(toy())
    again = download(toy())
    assert again.was_there and len(server.plays["a"].requests) == 1
    assert load_dataset("toy").split("train").num_instances == 3
    train = tmp_path / "cache" / "Toy" / "train.txt"
    before = train.stat()
    for damage, reason in (
        (TRAIN[:-6], "has 26 bytes, the download had 32"),
        (TRAIN.replace(b"0.5", b"0.4"), "is not what was downloaded"),
        (None, "is missing"),
    ):
        train.unlink()
        if damage is not None:
            train.write_bytes(damage)
        for use in (load_dataset, download):
            with pytest.raises(DataError, match=reason) as caught:
                use("Toy")
            assert "xmc-midx download Toy" in str(caught.value.hint)
    # A change that keeps size and time is found by the full check.
    train.write_bytes(TRAIN.replace(b"0.5", b"0.4"))
    os.utime(train, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match="is not what was downloaded"):
        download("Toy")


def test_a_file_fetched_by_hand_is_installed_and_held_to_its_hash(server: Drive, tmp_path: Path) -> None:
    by_hand = tmp_path / "Toy dataset.zip"
    by_hand.write_bytes(ARCHIVE)
    result = download(toy(), from_file=by_hand)
    assert_installed(result, tmp_path / "cache")
    assert by_hand.exists() and result.source == str(by_hand)
    by_hand.write_bytes(make_zip({"toy_train.txt": TRAIN, "toy_test.txt": TEST}))
    with pytest.raises(DownloadError, match="its sha256 is"):
        download(toy(), from_file=by_hand, directory=tmp_path / "other")
    by_hand.write_bytes(ARCHIVE[:-1])
    with pytest.raises(DownloadError, match="expected"):
        download(toy(sha256="0" * 64), from_file=by_hand, directory=tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(UsageError, match="is no file"):
        download(toy(), from_file=tmp_path / "none.zip")


FOLDS = {
    "Toy/Toy_data.txt": b"4 4 3\n0,1 0:1 2:0.5\n1 0:1\n2 1:1\n0 3:2\n",
    "Toy/toy_trSplit.txt": b"1 2\n3 3\n4 4\n",
    "Toy/toy_tstSplit.txt": b"2 1\n",
}


def test_an_archive_of_one_file_and_row_numbers_becomes_two_splits(server: Drive, tmp_path: Path) -> None:
    """As the repository has its smallest sets; the first column of the row numbers is the division."""
    by_hand = tmp_path / "Toy.zip"
    by_hand.write_bytes(make_zip(FOLDS))
    result = download(toy(), from_file=by_hand)
    directory = tmp_path / "cache" / "Toy"
    assert (directory / "train.txt").read_bytes() == TRAIN and (directory / "test.txt").read_bytes() == TEST
    assert result.files == ("test.txt", "train.txt") and not list(directory.rglob("*Split*"))
    assert download(toy()).was_there, "the manifest is that of the two files"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("Toy/toy_trSplit.txt", b"1\n3\n5\n", r"toy_trSplit\.txt:3: row 5, expected a number from 1 to 4"),
        ("Toy/toy_trSplit.txt", b"0\n", r"toy_trSplit\.txt:1: row 0, expected"),
        ("Toy/toy_tstSplit.txt", b"\nx\n", r"toy_tstSplit\.txt:2: row x, expected"),
        ("Toy/toy_tstSplit.txt", b"3\n", r"toy_tstSplit\.txt:1: row 3 stands in toy_trSplit\.txt:2 already"),
        ("Toy/Toy_data.txt", b"5 4 3\n0 0:1\n", r"Toy_data\.txt:1: expected a header of three numbers"),
        ("Toy/Toy_data.txt", b"", r"Toy_data\.txt:1: expected a header of three numbers"),
    ],
)
def test_row_numbers_that_divide_nothing_are_refused(
    name: str, text: bytes, message: str, server: Drive, tmp_path: Path
) -> None:
    by_hand = tmp_path / "Toy.zip"
    by_hand.write_bytes(make_zip(FOLDS | {name: text}))
    with pytest.raises(DownloadError, match=message):
        download(toy(), from_file=by_hand, directory=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_offline_fetches_nothing(server: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play = server.plays["a"] = Play()
    with pytest.raises(DownloadError, match="offline"):
        download(toy(), offline=True)
    monkeypatch.setenv("XMC_MIDX_OFFLINE", "1")
    with pytest.raises(DownloadError, match="offline"):
        download(toy())
    assert not play.requests
    monkeypatch.setenv("XMC_MIDX_OFFLINE", "0")
    download(toy())
    assert download(toy(), offline=True).was_there


def test_features_and_labels_in_two_files_and_other_kinds(server: Drive, tmp_path: Path) -> None:
    pair = {
        "S/trn_X_Xf.txt": b"3 4\n",
        "S/trn_X_Y.txt": b"3 3\n",
        "S/tst_X_Xf.txt": b"1 4\n",
        "S/tst_X_Y.txt": b"1 3\n",
    }
    server.plays["a"] = Play(body=make_zip(pair))
    spec = toy().model_copy(update={"mirrors": (), "drive": DriveIds(bow="a", raw="r")})
    assert set(download(spec).files) == {"trn_X_Xf.txt", "trn_X_Y.txt", "tst_X_Xf.txt", "tst_X_Y.txt"}
    server.plays["r"] = Play(
        body=make_zip({"R/trn.raw.json.gz": b"x", "R/tst.raw.json.gz": b"x", "R/lbl.json.gz": b"x"})
    )
    raw = download(spec, kind="raw")
    assert raw.directory == str(tmp_path / "cache" / "Toy.raw")
    assert set(raw.files) == {"trn.json.gz", "tst.json.gz", "lbl.json.gz"}
    with pytest.raises(UsageError, match="knows no bow-v1 archive"):
        download(spec, kind="bow-v1")


def test_maps_and_filter_files_of_an_archive_lie_where_they_are_found(server: Drive, tmp_path: Path) -> None:
    beside = {
        "t/Y.txt": b"a\nb\nc\n",
        "t/Xf.txt": b"w\nx\ny\nz\n",
        "t/filter_labels_test.txt": b"0 1\n",
        "t/filter_labels_train.txt": b"",
        "t/lbl_X_Xf.txt": b"3 4\n\n\n\n",
    }
    server.plays["a"] = Play(body=make_zip({"t/toy_train.txt": TRAIN, "t/toy_test.txt": TEST, **beside}))
    found = download(toy())
    assert {"Y.txt", "Xf.txt", "filter_labels_test.txt", "filter_labels_train.txt"} < set(found.files)
    dataset = load_dataset(found.directory)
    assert dataset.label_names == ("a", "b", "c")
    ignored = dataset.split("test").ignored
    assert ignored is not None and ignored.toarray().tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "test.txt"),
        ("trn_X_Xf.txt", "trn_X_Y.txt", "tst_X_Xf.txt", "tst_X_Y.txt"),
    ],
)
def test_filter_files_are_no_splits(names: tuple[str, ...], server: Drive, tmp_path: Path) -> None:
    bodies = {
        "train.txt": TRAIN,
        "test.txt": TEST,
        "trn_X_Xf.txt": b"3 4\n0:1\n1:1\n2:1\n",
        "trn_X_Y.txt": b"3 3\n0:1\n1:1\n2:1\n",
    }
    bodies |= {"tst_X_Xf.txt": b"1 4\n0:1\n", "tst_X_Y.txt": b"1 3\n1:1\n"}
    archive = {f"t/filter_labels_{split}.txt": b"0 1\n" for split in ("train", "test")}
    by_hand = tmp_path / "by-hand.zip"
    by_hand.write_bytes(make_zip(archive | {f"t/{name}": bodies[name] for name in names}))
    found = download(toy(), from_file=by_hand)
    dataset = load_dataset(found.directory)
    for split in ("train", "test"):
        ignored = dataset.split(split).ignored
        assert ignored is not None and list(zip(*ignored.nonzero(), strict=True)) == [(0, 1)]


def test_what_is_there_is_not_called_another_archive(server: Drive, tmp_path: Path) -> None:
    by_hand, other = tmp_path / "a.zip", tmp_path / "b.zip"
    by_hand.write_bytes(ARCHIVE)
    other.write_bytes(make_zip({"toy_train.txt": TRAIN}))
    assert not download(toy(), from_file=by_hand).was_there
    assert download(toy(), from_file=by_hand).was_there
    with pytest.raises(UsageError, match="is not empty, and did not come of"):
        download(toy(), from_file=other)
    for options in ({"from_file": by_hand}, {"directory": tmp_path / "here"}):
        with pytest.raises(UsageError, match="comes with the package"):
            download("debtags", **options)


def test_each_failure_is_said_once(server: Drive, tmp_path: Path) -> None:
    for name in "ab":
        server.plays[name] = Play(status=404)
    log = Log()
    with pytest.raises(DownloadError) as caught:
        download(toy("a", "b"), reporter=log)
    said = " ".join([*log.messages, str(caught.value)])
    assert said.count("answers 404") == 2
    # Where a later source serves, the error is not there to say it.
    server.plays["b"], log = Play(), Log()
    download(toy("a", "b"), reporter=log)
    assert " ".join(log.messages).count("answers 404") == 1


def test_a_full_disk_is_told_before_the_first_byte(
    server: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.plays["a"] = Play()
    monkeypatch.setattr(fetch, "free_bytes", lambda directory: 1000)
    with pytest.raises(ResourceError, match=f"needs {len(ARCHIVE):,} more bytes, 1,000 are free"):
        download(toy())
    assert_nothing(tmp_path / "cache")


def test_a_confirmation_leads_nowhere_else() -> None:
    def page(action: str, here: str = "https://drive.google.com/uc?id=1") -> str | None:
        text = f'<form id="download-form" action="{action}"><input type=hidden name=id value="1&amp;2"></form>'
        return drive.read_page(text, here).confirmed_url

    assert (
        page("https://drive.usercontent.google.com/download")
        == "https://drive.usercontent.google.com/download?id=1%262"
    )
    assert page("/download?x=1") == "https://drive.google.com/download?x=1&id=1%262"
    for elsewhere in ("https://example.org/x", "http://drive.google.com/x", "file:///etc/passwd", "//evilgoogle.com/"):
        assert page(elsewhere) is None


# ----------------------------------------------------------------- kills, two at once

CHILD = """
import os, signal, sys
from xmc_midx.data import drive, fetch
from xmc_midx.data.download import download
from xmc_midx.data.registry import DatasetSpec
from xmc_midx.types import SilentReporter
drive.DRIVE, fetch.WAIT_S = sys.argv[1], 0.0
class Killer(SilentReporter):
    stage, passed = "", 0
    def start(self, stage, total):
        self.stage, self.passed = stage, 0
        self.reached(0)
    def step(self, advance=1, **facts):
        self.passed += advance
        self.reached(self.passed)
    def message(self, text):
        print(text, flush=True)
    def reached(self, passed):
        if len(sys.argv) > 3 and self.stage == sys.argv[3] and passed >= int(sys.argv[4]):
            if sys.argv[5:] and not globals().get("again"):
                globals()["again"] = True
                return
            os.kill(os.getpid(), signal.SIGKILL)
result = download(DatasetSpec.model_validate_json(sys.argv[2]), reporter=Killer())
print("was there" if result.was_there else "fetched", flush=True)
"""


def child(server: Drive, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, server.url, toy().model_dump_json(), *arguments]
    root = Path(__file__).parents[1]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)})


@pytest.mark.parametrize(
    "point",
    ["download 0", "download 400000", "verify 0", "verify 1048576", "unpack 0", "unpack 400000", "verify 0 second"],
)
def test_after_a_kill_nothing_bad_is_left_and_the_next_download_goes_on(
    point: str, server: Drive, tmp_path: Path
) -> None:
    play = server.plays["a"] = Play()
    with child(server, *point.split()) as killed:
        killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    cache = tmp_path / "cache"
    assert not (cache / "Toy").exists()
    log = Log()
    assert_installed(download(toy(), reporter=log), cache)
    if point == "download 400000":
        resumed = re.fullmatch(r"bytes=(\d+)-", play.requests[-1]["Range"])
        assert resumed and int(resumed[1]) >= 400_000
        assert log.bytes["download"] == len(ARCHIVE) - int(resumed[1])
    if point.startswith(("verify", "unpack")):
        assert len(play.requests) == 1


def test_two_at_once_fetch_one_archive(server: Drive, tmp_path: Path) -> None:
    server.plays["a"] = Play(pause_s=0.1)
    with child(server) as one, child(server) as two:
        texts = [process.communicate(timeout=60)[0] for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0)
    assert sorted(text.splitlines()[-1] for text in texts) == ["fetched", "was there"]
    assert any("another process is downloading it" in text for text in texts)
    assert len(server.plays["a"].requests) == 1


# ----------------------------------------------------------------- the command line


def test_the_command_line_fetches_and_finds_by_name(
    server: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.plays["a"] = Play()
    monkeypatch.setattr(registry, "load_registry", lambda: (toy(),))
    monkeypatch.chdir(tmp_path)
    assert run(["check", "Toy", "--json"]) == 3
    assert "xmc-midx download Toy" in capsys.readouterr().out
    assert run(["check", "Toy", "--download", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"]
    assert run(["download", "toy", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["was_there"] and document["directory"] == str(tmp_path / "cache" / "Toy")
    scores = tmp_path / "scores.txt"
    scores.write_text("1:1.0 0:0.5 2:0.1\n")
    assert run(["evaluate", "-", "toy", "--predictions", str(scores), "--k", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["P@1"] == 1.0


def test_a_failure_says_what_to_do_in_three_lines_and_exits_with_5(
    server: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.plays["a"] = Play(page=QUOTA)
    monkeypatch.setattr(registry, "load_registry", lambda: (toy(),))
    monkeypatch.chdir(tmp_path)
    assert run(["download", "Toy"]) == 5
    lines = capsys.readouterr().err.splitlines()
    assert [line[:2] for line in lines[-3:]] == ["1.", "2.", "3."] and "quota" in lines[-4]
    assert run(["train", "Toy", "--download", "--output", "run", "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "download"
    assert run(["download", "Toy", "--format", "svm"]) == 2
    with contextlib.suppress(FileNotFoundError):
        assert not list((tmp_path / "run").iterdir())

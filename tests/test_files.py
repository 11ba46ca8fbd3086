"""Files of plain data: written whole or not at all, refused where a bit is wrong, and never run."""

import errno
import hashlib
import math
import os
import random
import re
import resource
import signal
import struct
import threading
import time
import warnings
from contextlib import contextmanager

import pytest
import torch
from asserts import refuses

from pyro_flows.infer.machine import files
from pyro_flows.infer.machine.files import read_state, write_state
from pyro_flows.infer.machine.interrupts import interrupts_held_back

READ = {"kind": "kind", "remedy": "delete it"}


def write(path, state):
    write_state(path, state, kind="kind")


def read(path):
    return read_state(path, **READ)


def plain():
    """One of everything."""
    return {
        "numbers": [1, -(10**30), 2.5, -0.0, math.nan, math.inf, True, None],
        "text": ("", "ä\n\ud800", ("nested", [()])),
        3: {None: {}, True: 0, 0.5: "keys that are no strings"},
        "tensors": [
            torch.randn(3, 2).T,
            torch.randn(4, dtype=torch.float64)[::2],
            torch.tensor(7),
            torch.zeros(0, 3),
            torch.randn(5).bfloat16(),
            torch.randn(2, dtype=torch.complex64).conj(),
            torch.tensor([True, False]),
            torch.arange(5, dtype=torch.uint8),
            torch.nn.Parameter(torch.ones(2).half()),
        ],
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        bits = one.detach().resolve_conj().contiguous(), other
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and repr(one) == repr(other)


def test_plain_data_come_back(tmp_path):
    state = plain()
    write(tmp_path / "file", state)
    found = read(tmp_path / "file")
    assert same(state, found)
    assert list(found) == list(state)
    assert not any(tensor.requires_grad for tensor in found["tensors"])
    found["tensors"][0].add_(1)  # owns its memory
    assert same(state, read(str(tmp_path / "file")))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [1, {"b": torch.nn.Linear(1, 1)}]}, r"got Linear at state\['a'\]\[1\]\['b'\]"),
        ({(1, 2): 3}, "keys that are strings or numbers, got tuple at state"),
        ([{1}], r"got set at state\[0\]"),
        (torch.eye(2).to_sparse(), "one of another layout at state"),
    ],
    ids=["module", "key", "set", "sparse"],
)
def test_what_is_not_plain_is_named(state, message, tmp_path):
    write(tmp_path / "file", 1)
    refuses(TypeError, message, write, tmp_path / "file", state)
    assert read(tmp_path / "file") == 1
    assert os.listdir(tmp_path) == ["file"]


# Damage


def test_each_bit_and_each_cut_is_refused(tmp_path):
    path, state = tmp_path / "file", {"a": [1, 2.5, "text"], "b": torch.randn(3)}
    write(path, state)
    whole = path.read_bytes()
    damaged = [whole[:at] for at in range(len(whole))] + [whole + b"\0", whole + whole, bytes(len(whole))]
    damaged += [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    for bad in damaged:
        path.write_bytes(bad)
        refuses(ValueError, r"the kind '.*file' cannot be read: it is .*; delete it", read, path)


def summed(body):
    return body + hashlib.sha256(body).digest()


def test_sound_sums_over_nonsense(tmp_path):
    """As somebody might write them on purpose: words, little memory, and no code."""
    path = tmp_path / "file"
    write(path, {"a": torch.randn(3)})
    body = path.read_bytes()[:-32]
    start = len(files._MAGIC) + 8
    (length,) = struct.unpack_from("<Q", body, start - 8)
    text = body[start : start + length].decode()
    others = {
        '"float32",[3]': ['"float32",[4611686018427387904]', '"float32",[-3]', '"float32",[3.0]', '"float32",[17]'],
        '"float32"': ['"load"', '"nn"', "7", "[]"],
        '"tensor",0': ['"tensor",7', '"tensor"', '"module",0', "[],0", "{},0"],
        '"dict"': ['"list"', '"set"', "null"],
        "[[": ["[" * 5000, "{"],
        '"tensors"': ['"others"'],
    }
    for known, replacements in others.items():
        assert known in text
        for replacement in replacements:
            changed = text.replace(known, replacement).encode()
            path.write_bytes(summed(files._MAGIC + struct.pack("<Q", len(changed)) + changed + body[start + length :]))
            try:
                found = read(path)
            except ValueError as error:
                assert "cannot be read: its contents are not as expected" in str(error)
            else:
                assert isinstance(found, list)  # a dictionary's entries as a list
    for size in (0, 2**40, 2**63):
        path.write_bytes(summed(files._MAGIC + struct.pack("<Q", size) + body[start:]))
        refuses(ValueError, "its contents are not as expected", read, path)


def test_other_kinds_versions_and_parts(tmp_path):
    path = tmp_path / "file"
    write_state(path, {"a": 1, "b": {"c": "text"}}, kind="other", version=3)
    refuses(ValueError, "cannot be read: it is a other; delete it", read, path)
    with pytest.raises(ValueError, match="it is of version 3, and this release reads version 1"):
        read_state(path, kind="other", remedy="")
    found = read_state(path, kind="other", version=3, remedy="", parts={"a": (int, str), "b": {"c": str}})
    assert found == {"a": 1, "b": {"c": "text"}}
    for parts, message in (
        ({"z": int}, "it lacks 'z'"),
        ({"a": str}, "'a' is a int"),
        ({"a": {"c": str}}, "'a' is a int, expected a dict"),
        ({"b": {"d": str}}, "'b' lacks 'd'"),
    ):
        refuses(ValueError, message, read_state, path, kind="other", version=3, remedy="", parts=parts)


# Whole or not at all


@contextmanager
def forked(work):
    """Runs it in a child process, which is killed at the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads that other tests have started
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.full
def test_kills_leave_the_old_file_or_the_new_one(tmp_path):
    """A child writes 1, 2, 3, ... until it is killed; 40 of them, at random moments."""
    path, rand = tmp_path / "file", random.Random(0)
    begun, begins = os.pipe()

    def state(number):
        return {"number": number, "values": torch.full((50_000,), float(number))}

    def work():
        number = 0
        while True:
            number += 1
            write(path, state(number))
            if number == 1:
                os.write(begins, b"x")

    write(path, state(0))
    left = 0
    for _ in range(40):
        with forked(work):
            os.read(begun, 1)  # a busy machine takes its time over a child
            time.sleep(rand.uniform(0.0, 0.03))
        left += len(os.listdir(tmp_path)) > 1
        found = read(path)
        assert same(found, state(found["number"]))
        assert len(os.listdir(tmp_path)) <= 2  # the next writer removes what was left
    assert left, "no kill came amid a write"
    write(path, state(1))
    assert os.listdir(tmp_path) == ["file"]


def test_leftovers_of_the_living_stay(tmp_path, monkeypatch):
    """Another process is in the middle of a write of the same file."""
    path, go, done = tmp_path / "file", os.pipe(), os.pipe()
    write(path, "old")

    def work():
        def pause(number):
            os.write(go[1], b"x")
            os.read(done[0], 1)

        monkeypatch.setattr(files.os, "fsync", pause)
        write(path, "the child's")

    with forked(work):
        os.read(go[0], 1)
        (part,) = [name for name in os.listdir(tmp_path) if name.endswith(".part")]
        write(path, "the parent's")
        files.remove_leftovers(path)
        assert read(path) == "the parent's"
        assert part in os.listdir(tmp_path)
        os.write(done[1], b"xx")  # for the file and for the folder
        os.read(go[0], 1)
    assert read(path) == "the child's"
    assert os.listdir(tmp_path) == ["file"]


def test_leftovers_of_other_files_stay(tmp_path):
    kept = [
        ".file.pt.0123abcd.part",
        ".file.part",
        ".file.0123abcd.part.bak",
        "file.0123abcd.part",
        ".file.zzzzzzzz.part",
    ]
    for name in [*kept, ".file.0123abcd.part"]:
        (tmp_path / name).touch()
    write(tmp_path / "file", 1)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "file"])


def test_threads_that_write_the_same_file(tmp_path):
    path, failed = tmp_path / "file", []
    write(path, [0, torch.zeros(1000)])

    def work(number):
        try:
            for _ in range(20):
                write(path, [number, torch.full((1000,), float(number))])
                found, values = read(path)
                assert bool((values == found).all())
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk(tmp_path):
    """The largest file that the system lets this process write is smaller than what is to be written."""
    path, before = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    write(path, "old")
    for size in (0, 10, 5000, 100_000):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            with pytest.raises(OSError, match=r"the kind could not be written \(.*\); the file that was there is unch"):
                write(path, torch.zeros(100_000))
            with pytest.raises(OSError, match="no file was written; make room, or give a path in a folder that"):
                write(tmp_path / "new", torch.zeros(100_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert read(path) == "old"
        assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_errors_of_the_system_keep_their_kind(call, code, tmp_path, monkeypatch):
    write(tmp_path / "file", "old")

    def fails(*args):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, fails)
        with pytest.raises(OSError, match=re.escape(os.strerror(code))) as caught:
            write(tmp_path / "file", "new")
    assert caught.value.errno == code and type(caught.value) is type(OSError(code, ""))
    assert caught.value.filename == str(tmp_path / "file")
    assert read(tmp_path / "file") == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_interruptions_amid_a_write(tmp_path, monkeypatch):
    write(tmp_path / "file", "old")
    for call in ("fsync", "replace", "chmod"):

        def presses(*args):
            os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(files.os, call, presses)
            write(tmp_path / "file", "new")
        assert read(tmp_path / "file") == "old"
        assert os.listdir(tmp_path) == ["file"]


# Places


def test_places_that_are_no_files(tmp_path):
    with pytest.raises(ValueError, match=r"a file in a folder that exists, got .*; make the folder first"):
        write(tmp_path / "nowhere" / "file", 1)
    refuses(ValueError, "which is something else", write, tmp_path, 1)
    refuses(ValueError, "which is something else", write, "/dev/null", 1)
    refuses(ValueError, "which is no file", read, tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "file")
    assert not os.listdir(tmp_path)


def test_modes_links_and_long_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o027)
    try:
        write("file", 1)
    finally:
        os.umask(before)
    assert os.stat("file").st_mode & 0o777 == 0o640  # as any new file
    os.chmod("file", 0o604)
    write("file", 2)
    assert os.stat("file").st_mode & 0o777 == 0o604
    os.mkdir("folder")
    os.symlink("../file", "folder/link")
    write("folder/link", 3)
    assert os.path.islink("folder/link") and read("file") == 3
    assert os.listdir("folder") == ["link"]
    for name in ("ä" * 120, "a [b]*?.pt", ".hidden"):
        write(name, name)
        assert read(name) == name


def test_protected_files_stay(tmp_path, monkeypatch):
    """Root may write everywhere, so the system's answer is put in its place."""
    write(tmp_path / "file", "old")
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    refuses(PermissionError, "the file that was there is unchanged", write, tmp_path / "file", "new")
    assert read(tmp_path / "file") == "old"


# Ctrl-C


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_interruptions_are_held_back():
    passed = []
    with pytest.raises(KeyboardInterrupt), interrupts_held_back():
        press()
        passed.append("the end")
    assert passed == ["the end"]
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="the first"):
        try:
            raise KeyboardInterrupt("the first")
        finally:
            with interrupts_held_back():
                press()
                passed.append("the way out")
    assert passed[1:] == ["the way out"]
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(OSError, match="none but"), interrupts_held_back():
        raise OSError("none but this")
    thread = threading.Thread(target=lambda: passed.append(interrupts_held_back().__enter__()))
    thread.start()
    thread.join()
    assert passed[2:] == [None]
    assert signal.getsignal(signal.SIGINT) is handler


def test_handlers_of_ones_own_are_called():
    calls = []
    before = signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    try:
        with interrupts_held_back():
            press()
            assert not calls
        assert calls == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)

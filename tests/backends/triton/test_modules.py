"""A text becomes one module whatever lies in the folder; what others could have written is refused."""

import inspect
import os
import stat
import subprocess
import sys
import textwrap
import threading

import pytest

import maskflash as mf
from maskflash.backends.triton import modules

SOURCE = '"""A kernel."""\n\n\ndef answer():\n    return 42  # größer als 41\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache in a folder of its own, in a process that has loaded nothing."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(modules.VARIABLE, str(folder))
    monkeypatch.setattr(modules, "_modules", {})
    return folder


def again(monkeypatch):
    """As a new process would find it."""
    monkeypatch.setattr(modules, "_modules", {})
    return modules.load(SOURCE)


def test_a_text_becomes_a_module_whose_source_can_be_read(folder):
    module = modules.load(SOURCE)
    assert module.answer() == 42
    assert modules.load(SOURCE) is module
    assert inspect.getsource(module.answer) == "def answer():\n    return 42  # größer als 41\n"
    (entry,) = folder.iterdir()
    assert entry.read_text(encoding="utf-8") == SOURCE
    assert module.__file__ == str(entry)


def test_a_text_means_what_it_says_alone(folder):
    module = modules.load('def f(x: "i64"): ...\n')  # under this package's `annotations` it would be "'i64'"
    assert module.f.__annotations__ == {"x": "i64"}


def test_another_text_is_another_module(folder):
    other = modules.load(SOURCE.replace("42", "43"))
    assert (modules.load(SOURCE).answer(), other.answer()) == (42, 43)
    assert len(list(folder.iterdir())) == 2


def test_folder_and_files_are_private_whatever_the_umask(folder):
    before = os.umask(0)
    try:
        modules.load(SOURCE)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(entry.stat().st_mode) for entry in folder.iterdir()] == [0o600]


def test_an_entry_is_found_again_and_left_alone(folder, monkeypatch):
    modules.load(SOURCE)
    (entry,) = folder.iterdir()
    before = entry.stat()
    assert again(monkeypatch).answer() == 42
    assert (entry.stat().st_ino, entry.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("content", [b"", SOURCE[:20].encode(), b"\xff\xfe\x00", b"raise SystemExit\n", b"x = (\n"])
def test_a_corrupt_entry_is_never_run_and_made_anew(folder, monkeypatch, content):
    modules.load(SOURCE)
    (entry,) = folder.iterdir()
    entry.write_bytes(content)
    module = again(monkeypatch)
    assert module.answer() == 42
    assert inspect.getsource(module) == SOURCE
    assert entry.read_text(encoding="utf-8") == SOURCE
    assert list(folder.iterdir()) == [entry]


def test_what_runs_is_the_text_at_hand_even_if_the_file_changes_in_between(folder, monkeypatch):
    stored = modules._stored

    def tampered(name, source):
        path = stored(name, source)
        with open(path, "w") as file:
            file.write("def answer():\n    return 'foreign'\n")
        return path

    monkeypatch.setattr(modules, "_stored", tampered)
    module = modules.load(SOURCE)
    assert module.answer() == 42
    assert "foreign" not in inspect.getsource(module.answer)  # which is what Triton compiles


def test_a_text_that_fails_is_not_remembered(folder):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            modules.load("1 / 0\n")
    assert modules._modules == {}


needs_owners = pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners on this system")


@needs_owners
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_to_is_refused(folder, mode):
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(mf.BackendError, match=r"cache may be written by others.*chmod go-w.*MASKFLASH_CACHE_DIR"):
        modules.load(SOURCE)
    assert not list(folder.iterdir())


@needs_owners
def test_the_folders_above_may_be_shared(tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.delenv(modules.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared))
    monkeypatch.setattr(modules, "_modules", {})
    assert modules.load(SOURCE).answer() == 42
    assert len(list((shared / "maskflash").iterdir())) == 1


@needs_owners
def test_an_entry_that_others_may_write_to_is_refused(folder, monkeypatch):
    modules.load(SOURCE)
    (entry,) = folder.iterdir()
    entry.chmod(0o666)
    with pytest.raises(mf.BackendError, match=rf"{entry.name} may be written by others"):
        again(monkeypatch)


@needs_owners
def test_what_belongs_to_somebody_else_is_refused(folder, monkeypatch):
    modules.load(SOURCE)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(mf.BackendError, match="cache belongs to another user"):
        again(monkeypatch)


@needs_owners
def test_an_entry_that_is_a_link_is_refused(folder, tmp_path, monkeypatch):
    modules.load(SOURCE)
    (entry,) = folder.iterdir()
    elsewhere = tmp_path / "elsewhere.py"
    entry.rename(elsewhere)
    entry.symlink_to(elsewhere)
    with pytest.raises(mf.BackendError, match="is a link"):
        again(monkeypatch)


@needs_owners
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_an_entry_that_is_no_file_is_refused(folder, monkeypatch, make):
    modules.load(SOURCE)
    (entry,) = folder.iterdir()
    entry.unlink()
    make(entry, 0o700)
    with pytest.raises(mf.BackendError, match="is no file"):
        again(monkeypatch)


@needs_owners
def test_ones_own_link_to_a_private_folder_will_do(folder, tmp_path):
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    folder.symlink_to(real)
    assert modules.load(SOURCE).answer() == 42
    assert len(list(real.iterdir())) == 1


def blocked_by_a_file(folder, monkeypatch):
    folder.write_text("in the way")


def read_only(folder, monkeypatch):
    folder.mkdir(mode=0o700)

    def refused(*args, **kwargs):  # chmod would not stop root
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(modules.tempfile, "mkstemp", refused)


def homeless(folder, monkeypatch):
    def refused():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(modules.VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(modules.Path, "home", refused)


def full(folder, monkeypatch):
    def refused(draft, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refused)


@pytest.mark.parametrize("trouble", [blocked_by_a_file, read_only, homeless, full])
def test_without_a_folder_kernels_live_in_memory(folder, monkeypatch, trouble):
    trouble(folder, monkeypatch)
    module = modules.load(SOURCE)
    assert module.answer() == 42
    assert inspect.getsource(module.answer).startswith("def answer")
    if folder.is_dir():
        assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_written_but_holds_the_entry_serves(folder, monkeypatch):
    path = modules.load(SOURCE).__file__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules.tempfile, "mkstemp", lambda *a, **k: pytest.fail("written again"))
        assert again(monkeypatch).__file__ == path


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MASKFLASH_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"MASKFLASH_CACHE_DIR": "~/a"}, "/home/me/a"),
        ({"MASKFLASH_CACHE_DIR": "", "XDG_CACHE_HOME": "/b"}, "/b/maskflash"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/maskflash"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/maskflash"),
        ({}, "/home/me/.cache/maskflash"),
    ],
)
def test_where_the_folder_is(monkeypatch, variables, expected):
    for name in ("MASKFLASH_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert str(modules.folder()) == expected


def test_many_threads_make_one_module(folder):
    found = []
    start = threading.Barrier(8)

    def one():
        start.wait()
        found.append(modules.load(SOURCE))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_many_processes_starting_at_once(folder):
    """Eight load the same forty texts at the same moment; each gets all, and only whole entries are left."""
    script = textwrap.dedent("""
        import os, sys
        from maskflash.backends.triton import modules

        wait, go = os.pipe()
        children = []
        for _ in range(8):
            child = os.fork()
            if child == 0:
                os.close(go)
                os.read(wait, 1)  # until the parent closes its end
                for n in range(40):
                    text = f"def answer():\\n    return {n}\\n" + "# padding\\n" * 5000
                    assert modules.load(text).answer() == n
                os._exit(0)
            children.append(child)
        os.close(go)
        sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    entries = list(folder.iterdir())
    assert len(entries) == 40
    assert all(entry.suffix == ".py" and entry.stat().st_size > 50_000 for entry in entries)


def test_what_killed_processes_left_is_removed_some_day(folder):
    folder.mkdir(mode=0o700)
    old, new, other = (folder / name for name in (f"{'ab' * 16}x.tmp", f"{'cd' * 16}y.tmp", "notes.tmp"))
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    modules.load(SOURCE)
    assert (old.exists(), new.exists(), other.exists()) == (False, True, True)


def test_an_entry_of_any_size_is_read_no_further_than_a_kernel_goes(folder, monkeypatch):
    module = modules.load(SOURCE)
    with open(module.__file__, "r+b") as entry:
        entry.truncate(20 << 30)  # a hole: it takes no room
    assert again(monkeypatch).answer() == 42
    assert os.path.getsize(module.__file__) == len(SOURCE.encode())

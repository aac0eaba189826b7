"""A text becomes one module whatever lies in the folder, and a file that says what runs."""

import inspect
import os
import stat
import subprocess
import sys
import textwrap
import threading
import traceback

import pytest

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


@pytest.mark.parametrize("mode", [0o700, 0o777])
def test_a_folder_that_others_may_write_to_serves_since_nothing_is_read(folder, mode):
    folder.mkdir()
    folder.chmod(mode)
    module = modules.load(SOURCE)
    assert module.answer() == 42
    with open(module.__file__, encoding="utf-8") as entry:
        assert entry.read() == SOURCE


def test_a_link_in_the_way_is_replaced_and_not_followed(folder, tmp_path, monkeypatch):
    path = modules.load(SOURCE).__file__
    elsewhere = tmp_path / "elsewhere.py"
    os.rename(path, elsewhere)
    elsewhere.write_text("theirs")
    os.symlink(elsewhere, path)
    assert again(monkeypatch).answer() == 42
    assert not os.path.islink(path)
    assert elsewhere.read_text() == "theirs"


def test_a_folder_in_the_way_is_left_alone(folder, monkeypatch):
    path = modules.load(SOURCE).__file__
    os.unlink(path)
    os.mkdir(path)
    assert again(monkeypatch).answer() == 42
    assert [entry.name for entry in folder.iterdir()] == [os.path.basename(path)]


def test_a_mistake_in_a_kernel_shows_its_line(folder):
    module = modules.load("def divided(x):\n    return 1 / x  # the line\n")
    with pytest.raises(ZeroDivisionError) as caught:
        module.divided(0)
    assert "return 1 / x  # the line" in "".join(traceback.format_exception(caught.value))


def test_the_oldest_of_too_many_goes_and_comes_again(folder, monkeypatch):
    monkeypatch.setattr(modules, "_MOST", 3)
    texts = [SOURCE.replace("42", str(n)) for n in range(5)]
    loaded = [modules.load(text) for text in texts]
    assert len(modules._modules) == 3
    assert [module.__name__ in sys.modules for module in loaded] == [False, False, True, True, True]
    assert [module.answer() for module in loaded] == list(range(5))
    assert modules.load(texts[4]) is loaded[4]
    assert modules.load(texts[0]) is not loaded[0]
    assert inspect.getsource(modules.load(texts[0]).answer).endswith("return 0  # größer als 41\n")


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

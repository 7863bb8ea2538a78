import gzip
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qpeft.atomic import replacing
from qpeft.data.files import numbered_lines, open_text, write_text
from qpeft.errors import FormatError, InputError
from qpeft.provenance import write_provenance


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_what_is_written_is_read(tmp_path, name):
    path = tmp_path / "new" / "folders" / name
    with write_text(path) as file:
        file.write("é\r\n\n二\n")
    with open_text(path) as file:
        assert file.read() == "é\r\n\n二\n"
    assert list(numbered_lines(path)) == [(1, "é"), (3, "二")]
    assert os.listdir(path.parent) == [name]


def test_gzip_is_gzip_and_reproducible(tmp_path):
    for name in ("a.gz", "b.gz"):
        with write_text(tmp_path / name) as file:
            file.write("same")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    # The time of writing, which two quick writes have in common anyway.
    assert (tmp_path / "a.gz").read_bytes()[4:8] == bytes(4)
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == b"same"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"old")

    def fail_half_way() -> None:
        with write_text(path) as file:
            file.write("half")
            file.flush()
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [name]


def test_nothing_stands_there_before_the_end(tmp_path):
    path = tmp_path / "a"
    with write_text(path) as file:
        file.write("half")
        assert not path.exists()
    assert path.read_text() == "half"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with write_text(tmp_path / "link") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_device_is_written_not_replaced():
    with replacing("/dev/null") as path:
        assert path == Path("/dev/null")
    assert Path("/dev/null").is_char_device()


def test_a_pipe_is_written_under_whatever_name_it_has():
    ends = os.pipe()
    with write_text(f"/dev/fd/{ends[1]}") as file:
        file.write("through")
    write_provenance(Path(f"/dev/fd/{ends[1]}"), {"command": "none"})
    os.close(ends[1])
    with os.fdopen(ends[0]) as out:
        assert out.read() == "through"


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize(("redirect", "before"), [(">", ""), (">>", "kept\n")])
def test_what_stdout_is_redirected_to_keeps_what_others_write_there(tmp_path, name, redirect, before):
    target = tmp_path / "all.txt"
    target.write_text("kept\n")
    code = f"""
from pathlib import Path
from qpeft.data.files import write_text
from qpeft.provenance import write_provenance
with write_text({name!r}) as file:
    file.write("ours\\n")
write_provenance(Path({name!r}), {{"command": "rerank"}})
"""
    ours = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    shell = f"{{ echo first; {ours}; {ours}; echo last; }} {redirect} {shlex.quote(str(target))}"
    subprocess.run(["/bin/sh", "-e", "-c", shell], check=True)
    assert target.read_text() == before + "first\nours\nours\nlast\n"
    assert list(tmp_path.iterdir()) == [target]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a folder"), write_text(tmp_path):
        pass
    with pytest.raises(InputError, match="file"), write_text(tmp_path / "file" / "below"):
        pass
    with (
        pytest.raises(InputError, match="/dev/full cannot be written: No space left"),
        write_text("/dev/full") as file,
    ):
        file.write("more than there is room for")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.txt: No such file"), open_text(tmp_path / "none.txt"):
        pass


def test_byte_order_mark_is_no_content(tmp_path):
    path = tmp_path / "a"
    path.write_bytes("\ufeffx\n\ufeffy\n".encode())
    assert list(numbered_lines(path)) == [(1, "x"), (2, "\ufeffy")]
    with open_text(path) as file:
        assert file.readline() == "x\n"


def test_only_newlines_end_lines(tmp_path):
    path = tmp_path / "a"
    path.write_bytes("a\u2028b\x0bc\rd\ne".encode())
    assert list(numbered_lines(path)) == [(1, "a\u2028b\x0bc\rd"), (2, "e")]


def test_wrong_encoding_names_the_line(tmp_path):
    path = tmp_path / "latin"
    path.write_bytes("ok\ncafé\n".encode("latin-1"))
    with pytest.raises(FormatError, match=r"latin:2: not UTF-8"):
        list(numbered_lines(path))
    with pytest.raises(FormatError, match="not UTF-8"), open_text(path) as file:
        file.read()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-12], lambda data: b"not gzip", lambda data: data[:10] + b"?" * 99]
)
def test_damaged_gzip(tmp_path, damage):
    path = tmp_path / "a.gz"
    path.write_bytes(damage(gzip.compress(os.urandom(1000).hex().encode() + b"\n")))
    with pytest.raises(FormatError, match=r"a\.gz: damaged gzip"):
        list(numbered_lines(path))

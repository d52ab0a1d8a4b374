"""Tars as strangers make them: nothing vanishes in silence, nothing takes the run with it."""

import io
import tarfile

import pytest

from datamodules._tar import BadSample, ShardError, index_shard, read_member


def tar_of(*names: str, data: bytes = b"some bytes", **options) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def index(tmp_path):
    def run(content: bytes):
        path = tmp_path / "x.tar"
        path.write_bytes(content)
        return index_shard(path, "the shard")

    return run


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def keys(entries) -> list[str]:
    return [entry.key for entry in entries]


END = bytes(1024)


def test_a_tar_may_end_with_any_number_of_zeros(index):
    whole = tar_of("a.jpg", "b.jpg")
    members = whole[: 4 * 512]
    for zeros in (512, 1024, 10240, 1 << 20):
        assert keys(index(members + bytes(zeros))) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tar_of("a.jpg") + tar_of("b.jpg"), "zeros at byte 1024, data at byte 10240"),
        (
            tar_of("a.jpg")[:1024] + bytes(512) + tar_of("a.jpg", "b.jpg")[1536:],
            "zeros at byte 1024, data at byte 1536",
        ),
        (tar_of("a.jpg")[:1024] + b"x" * 512 + END, "no header at byte 1024"),
        (tar_of("a.jpg")[:1024] + bytes(17 << 20), "goes on for 17825792 bytes after its end at"),
        (tar_of("a.jpg")[:1024], "cut off at its end"),
        (tar_of("a.jpg")[:1300], "cut off at its end"),
        (tar_of("a.jpg", data=b"x" * 2000)[:1024], "cut off inside 'a.jpg'"),
        (b"", "not a readable tar"),
        (b"no tar at all" * 100, "not a readable tar"),
    ],
)
def test_what_is_no_end_is_an_error_that_names_the_place(content, said, index):
    with pytest.raises(ShardError, match=f"^the shard .*{said}"):
        index(content)


def long_name(name: bytes) -> bytes:
    return header("././@LongLink", len(name), tarfile.GNUTYPE_LONGNAME) + name.ljust(512, b"\0")


def pax(text: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header("pax", len(text), kind) + text.ljust(-(-len(text) // 512) * 512, b"\0")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (long_name(b"x.jpg") * 3000 + tar_of("a.jpg"), "long name or pax headers in a row"),
        (pax(b"12 path=x.a\n") * 3000 + tar_of("a.jpg"), "long name or pax headers in a row"),
        (pax(b"12 path=x.a\n", tarfile.XGLTYPE) * 3000 + tar_of("a.jpg"), "headers in a row"),
        (header("n", 1 << 30, tarfile.GNUTYPE_LONGNAME) + END, "header of 1073741824 bytes"),
        (header("n", 1 << 30, tarfile.XHDTYPE) + END, "header of 1073741824 bytes"),
        (header("a.jpg", -512) + END, "negative size"),
        (header("a.jpg", -(6 << 30)) + END, "negative size"),
        (pax(b"14 size=-2048\n") + tar_of("a.jpg"), "negative size"),
        (pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n") + tar_of("a.jpg"), "readable"),
    ],
)
def test_a_crafted_tar_is_an_error_of_this_shard(content, said, index):
    with pytest.raises(ShardError, match=f"^the shard .*{said}"):
        index(content)


def test_a_size_of_eleven_bytes_is_checked_before_it_is_read(index):
    with pytest.raises(ShardError, match="cut off inside"):
        index(header("a.jpg", 1 << 62) + END)
    (entry,) = index(tar_of("a.jpg"))
    with pytest.raises(BadSample, match="more than the limit of 5"):
        read_member(entry.members["jpg"], 5)


def test_a_name_with_a_point_before_it_is_harmless(index, tmp_path):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "a.txt", "sub/b.jpg"):
        (folder / name).write_bytes(b"x")
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        tar.add(folder, ".")  # as `tar -cf y.tar .`
    entries = index((tmp_path / "y.tar").read_bytes())
    assert {(e.key, e.defect, tuple(sorted(e.members))) for e in entries} == {
        ("a", "", ("jpg", "txt")),
        ("sub/b", "", ("jpg",)),
    }
    (up,) = index(tar_of("./../a.jpg"))
    assert "unsafe" in up.defect


def test_members_of_a_sample_lie_in_any_order(index):
    """A file system lists names in an order of its own, and `tar -cf x.tar .` takes that."""
    entries = index(tar_of("b.txt", "a.jpg", "c.jpg", "b.jpg", "a.txt", "a.jpg", "a.json"))
    assert [(e.key, e.defect[:13], sorted(e.members)) for e in entries] == [
        ("b", "", ["jpg", "txt"]),
        ("a", "", ["jpg", "txt"]),
        ("c", "", ["jpg"]),
        ("a", "its key occur", ["jpg", "json"]),
    ]


def test_a_name_that_is_no_text_can_be_stored(index):
    (entry,) = index(
        tar_of("\udcff\udcfe.jpg", format=tarfile.GNU_FORMAT, errors="surrogateescape")
    )
    assert "unprintable" in entry.defect
    (entry.key + entry.defect).encode()


def test_a_sparse_file_is_no_picture(index):
    sparse = header("a.jpg", 10, tarfile.GNUTYPE_SPARSE) + b"some bytes".ljust(512, b"\0") + END
    (entry,) = index(sparse)
    assert "sparse" in entry.defect

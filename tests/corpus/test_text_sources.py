"""Documents: read from every kind of file, each paragraph once, held out whole and always the same ones."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.corpus import text as module
from steelyard.corpus.text import (
    Document,
    docstrings,
    folder_documents,
    joined,
    part_sizes,
    python_documents,
    split_documents,
)

LONG = "This paragraph is long enough to be told from others, since it has over sixty-four characters."


def test_a_folder_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfplain\r\ntext")
    (tmp_path / "sub" / "a.md").write_text("marked")
    (tmp_path / "c.rst.gz").write_bytes(gzip.compress(b"packed"))
    with tarfile.open(tmp_path / "d.tar.gz", "w:gz") as archive:
        for name, data in (("x/y.txt", b"one"), ("x/z.bin", b"\xff"), ("w.md", b"two")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("evil.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (tmp_path / "e.json").write_text("{}")
    found = {document.name: document.text for document in folder_documents(tmp_path)}
    assert found == {
        "b.txt#0": "plain\ntext", "c.rst.gz#0": "packed", "d.tar.gz:x/y.txt#0": "one", "d.tar.gz:w.md#0": "two",
        "sub/a.md#0": "marked",
    }  # fmt: skip
    assert [document.name for document in folder_documents(tmp_path, only=["*.txt"])] == ["b.txt#0"]


def test_a_file_of_many_works_is_cut_where_one_begins(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" = One = \n\nx\n = = Part = = \n = Two = \ny")
    pieces = [document.text for document in folder_documents(tmp_path, boundary=r"(?m)^ = [^=]")]
    assert pieces == [" = One = \n\nx\n = = Part = = \n", " = Two = \ny"]


@pytest.mark.parametrize(
    ("name", "data", "error", "reason"),
    [
        ("a.txt", b"\xff", FormatError, r"a\.txt: is not UTF-8 \(byte 0\)"),
        ("a.txt.gz", b"nothing", FormatError, "not a sound archive"),
        ("a.txt.gz", gzip.compress(b"x" * 100, mtime=0)[:-9], FormatError, "not a sound archive"),
        ("a.tar.gz", gzip.compress(b"x" * 600, mtime=0), FormatError, "not a sound archive"),
        ("a.txt.gz", gzip.compress(b"x" * 2000, mtime=0), FormatError, "holds a text of over 1,000 bytes"),
        ("a.bin", b"", UsageError, "holds no text file"),
    ],
)
def test_bad_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes, error: type, reason: str
) -> None:
    monkeypatch.setattr(module, "MAX_FILE", 1000)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=reason):
        list(folder_documents(tmp_path))


def test_wrong_calls(tmp_path: Path) -> None:
    for call in (
        lambda: list(folder_documents(tmp_path / "none")),
        lambda: list(folder_documents(tmp_path, boundary="(")),
        lambda: list(python_documents(["no_such_package"])),
        lambda: list(python_documents(["os; import evil"])),
    ):
        with pytest.raises(UsageError):
            call()


def test_docstrings_are_parsed_not_run(tmp_path: Path) -> None:
    path = tmp_path / "mod.py"
    path.write_text(
        f'"""{LONG}"""\nraise SystemExit\nclass A:\n    """{LONG} A."""\n    def f(self):\n        """{LONG}"""'
    )
    seen: set[str] = set()
    assert docstrings(path, seen) == f"mod\n\n{LONG}\n\n\nmod.A\n\n{LONG} A."  # f says what the module said
    assert docstrings(path, seen) == ""
    path.write_text("def broken(:")
    assert docstrings(path, set()) == ""


def test_python_itself_has_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stdlib = Path(module.sysconfig.get_paths()["stdlib"])
    files = [stdlib / "heapq.py", stdlib / "json" / "__init__.py", stdlib / "test" / "test_heapq.py"]
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: iter(files))
    found = {document.name: document.text for document in python_documents([])}
    assert "heapq.heappush" not in found["heapq.py"] or "heap" in found["heapq.py"]
    assert "JSON" in found["json/__init__.py"]
    assert not any("test_heapq" in name for name in found)
    assert sum(name.startswith("topic ") for name in found) in (0, *range(50, 200))


def _texts(count: int) -> list[Document]:
    return [
        Document("ab"[number % 2], str(number), f"Document {number} is unlike all the others.\n\n{LONG} {number}")
        for number in range(count)
    ]


def test_a_documents_part_depends_on_its_text_alone() -> None:
    whole = split_documents(_texts(400), validation_share=0.1)
    held_out = {document.text for document in whole.validation}
    assert 20 <= len(held_out) <= 60
    assert held_out.isdisjoint(document.text for document in whole.train)
    assert len(whole.train) + len(held_out) == 400
    some = split_documents(reversed(_texts(200)), validation_share=0.1)
    assert {document.text for document in some.validation} <= held_out
    assert part_sizes(whole.train)["a"]["documents"] + part_sizes(whole.validation)["a"]["documents"] == 200


def test_what_stood_before_is_dropped() -> None:
    texts = _texts(100)
    again = [Document("c", "copy", texts[3].text.upper()), Document("c", "mixed", f"{texts[5].text}\n\nNew. {LONG}!")]
    found = split_documents([*texts, *again, Document("c", "short", "short")], validation_share=0.2)
    kept = {document.name: document.text for document in (*found.train, *found.validation)}
    assert "copy" not in kept
    assert kept["mixed"].endswith(f"New. {LONG}!")
    assert f"{LONG} 5" not in kept["mixed"]
    assert (found.duplicates, found.short, found.paragraphs) == (1, 1, 2)


def test_limits() -> None:
    texts = _texts(100)
    size = len(texts[50].text)
    found = split_documents(texts, validation_share=0.3, limits={"a": 5 * size})
    sizes = [sum(d.source == source for d in (*found.train, *found.validation)) for source in "ab"]
    assert sizes[0] in (4, 5)
    assert sizes[1] == 50
    assert found.over == 50 - sizes[0]
    paragraphs = [f"Paragraph {number}. {LONG}" for number in range(40)]
    cut = split_documents([*texts, Document("c", "long", "\n\n".join(paragraphs))], validation_share=0.3, longest=1000)
    text = next(document.text for document in (*cut.train, *cut.validation) if document.name == "long")
    assert 750 <= len(text) <= 1000
    assert text.endswith(LONG)
    assert joined([Document("", "", "é"), Document("", "", "x")]) == "é\n\nx\n\n".encode()


def test_a_split_without_one_part_is_refused() -> None:
    with pytest.raises(SteelyardError, match="would be held out"):
        split_documents(_texts(2), validation_share=0.001)
    for share in (0.0, 1.0):
        with pytest.raises(UsageError, match="validation_share"):
            split_documents(_texts(2), validation_share=share)

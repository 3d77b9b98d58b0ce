import gzip
import json
import lzma

import numpy as np
import pytest

from altgrad_core.hookspecs import Document, TextSource, TokenSource
from altgrad_data import BinOptions, JsonlOptions, TextOptions
from altgrad_data.bin import TokenFiles
from altgrad_data.jsonl import JsonLines
from altgrad_data.text import TextFiles


def texts(source, split):
    return [document.text for document in source.documents(split)]


# --- text --------------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path):
    """A hundred files of 100 bytes, and one that is not a .txt."""
    for number in range(100):
        folder = tmp_path / "many" / f"{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_text(f"{number:02d} " + "x" * 97)
    (tmp_path / "many" / "notes.md").write_text("not text")
    return tmp_path / "many"


def test_the_tail_of_a_single_file_is_held_out_from_the_start_of_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {number:03d}\n" for number in range(100)))
    source = TextFiles(TextOptions(path=str(tmp_path / "a.txt"), validation_fraction=0.095))
    assert isinstance(source, TextSource)
    (train,), (validation,) = texts(source, "train"), texts(source, "validation")
    assert train.endswith("line 089\n")
    assert validation.startswith("line 090\n")
    assert len(validation) == 90


def test_a_file_without_lines_is_cut_where_the_fraction_says(tmp_path):
    (tmp_path / "a.txt").write_text("a\n" + "é" * 98)
    source = TextFiles(TextOptions(path=str(tmp_path / "a.txt")))
    assert texts(source, "train") == ["a\n" + "é" * 88]
    assert texts(source, "validation") == ["é" * 10]


def test_of_many_files_whole_ones_are_held_out(many):
    source = TextFiles(TextOptions(path=str(many)))
    train, validation = texts(source, "train"), texts(source, "validation")
    assert (len(train), len(validation)) == (90, 10)
    assert len({*train, *validation}) == 100
    assert all(len(text) == 100 for text in [*train, *validation])


def test_names_and_places_do_not_change_what_is_held_out(many, tmp_path):
    before = TextFiles(TextOptions(path=str(many)))
    held = set(texts(before, "validation"))
    many.rename(tmp_path / "moved")
    after = TextFiles(TextOptions(path=str(tmp_path / "moved")))
    assert set(texts(after, "validation")) == held
    assert after.fingerprint() == TextFiles(TextOptions(path=str(tmp_path / "moved"))).fingerprint()


def test_of_few_files_the_tail_of_each_is_held_out(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 100)
    source = TextFiles(TextOptions(path=str(tmp_path)))
    assert texts(source, "train") == ["a" * 90, "b" * 90]
    assert texts(source, "validation") == ["a" * 10, "b" * 10]


def test_of_a_large_file_among_small_ones_the_tail_is_held_out_too(tmp_path):
    (tmp_path / "large.txt").write_text("x" * 1000)
    (tmp_path / "small.txt").write_text("y" * 10)
    source = TextFiles(TextOptions(path=str(tmp_path)))
    assert texts(source, "validation") == ["x" * 100, "y"]


def test_a_file_whose_name_looks_like_a_glob_is_read(tmp_path):
    (tmp_path / "a[1].txt").write_text("0123456789")
    assert texts(TextFiles(TextOptions(path=str(tmp_path / "a[1].txt"))), "validation") == ["9"]


def test_a_validation_path_of_its_own_is_read_whole(tmp_path):
    (tmp_path / "a.txt").write_text("train")
    (tmp_path / "b.txt").write_text("validation")
    source = TextFiles(TextOptions(path=str(tmp_path / "a.txt"), validation=str(tmp_path / "b.txt")))
    assert texts(source, "train") == ["train"]
    assert texts(source, "validation") == ["validation"]


def test_a_glob_picks_files_in_sorted_order(many):
    source = TextFiles(TextOptions(path=f"{many}/**/1?.txt", validation=f"{many}/0/*.txt"))
    assert sorted(text[:2] for text in texts(source, "train")) == [f"1{digit}" for digit in range(10)]
    assert len(texts(source, "validation")) == 34


def test_a_changed_byte_or_fraction_changes_the_fingerprint(many):
    before = TextFiles(TextOptions(path=str(many))).fingerprint()
    assert TextFiles(TextOptions(path=str(many), validation_fraction=0.2)).fingerprint() != before
    (many / "0" / "0.txt").write_text("00 " + "x" * 96 + "y")
    assert TextFiles(TextOptions(path=str(many))).fingerprint() != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"path": "none/a.txt"},
            r"path = 'none/a.txt' \(relative to .*\) does not exist; set path to a text file",
        ),
        ({"path": "none/*.txt"}, r"path = 'none/\*.txt': no file matches it; set path to"),
        ({"path": "empty"}, "path = 'empty': no .txt file is below it"),
        ({"path": "a.txt", "validation": "b.txt"}, "validation = 'b.txt' .* does not exist"),
    ],
)
def test_missing_text_is_an_error_that_names_option_path_and_way_out(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(FileNotFoundError, match=message):
        TextFiles(TextOptions(**options))


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 text: .* position 3"):
        texts(TextFiles(TextOptions(path=str(tmp_path))), "train")


# --- jsonl -------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    def write_lines(*rows, name="a.jsonl"):
        lines = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows).encode()
        opener = {"gz": gzip.open, "xz": lzma.open}.get(name.rsplit(".")[-1], open)
        with opener(tmp_path / name, "wb") as file:
            file.write(lines)
        return str(tmp_path / name)

    return write_lines


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz"])
def test_each_line_is_a_document_with_its_labels(write, name):
    path = write(
        {"text": "é", "labels": [3, 1]}, "", {"text": ["one", "two"], "labels": 2}, {"text": "c"}, name=name
    )
    source = JsonLines(JsonlOptions(path=path, validation=path))
    assert isinstance(source, TextSource)
    expected = [Document("é", (3, 1)), Document("one\ntwo", (2,)), Document("c")]
    assert list(source.documents("train")) == list(source.documents("validation")) == expected


def test_where_the_number_of_labels_is_given_every_object_must_have_some(write):
    path = write({"text": "a", "labels": []}, {"text": "b"})
    source = JsonLines(JsonlOptions(path=path, validation=path, label_count=3))
    assert source.label_count == 3
    with pytest.raises(ValueError, match=r"a.jsonl:2: no key 'labels'; its keys are text: set labels to one"):
        list(source.documents("train"))


def test_other_keys_can_hold_text_and_labels(write):
    path = write({"body": "b", "kind": 4, "text": "no", "labels": [9]})
    source = JsonLines(JsonlOptions(path=path, validation=path, field="body", labels="kind"))
    assert list(source.documents("train")) == [Document("b", (4,))]


def test_a_key_can_say_the_split_and_test_rows_are_left_out(write):
    path = write(*({"text": name, "part": name} for name in ("train", "validation", "test")))
    source = JsonLines(JsonlOptions(path=path, split="part"))
    assert texts(source, "train") == ["train"]
    assert texts(source, "validation") == ["validation"]


def test_without_a_split_a_hash_of_the_text_holds_out_the_fraction(write):
    path = write(*({"text": f"text {number % 2000}"} for number in range(4000)))
    source = JsonLines(JsonlOptions(path=path))
    train, validation = texts(source, "train"), texts(source, "validation")
    assert len(train) + len(validation) == 4000
    assert not set(train) & set(validation)
    assert abs(len(validation) / 4000 - 0.1) < 4 * (0.1 * 0.9 / 2000) ** 0.5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "a.jsonl:2: not JSON"),
        ('{"text": ' + "[" * 100_000, "a.jsonl:2: its JSON is nested too deep"),
        ('"text"', "a.jsonl:2: expected a JSON object, got 'text'"),
        ({"body": "b"}, "a.jsonl:2: no key 'text'; its keys are body: set field to one"),
        ({"text": 3}, "a.jsonl:2: 'text' is 3; expected text"),
        ({"text": "b", "labels": ["x"]}, r"a.jsonl:2: 'labels' is \['x'\]; expected a label's index"),
        ({"text": "b", "labels": True}, "a.jsonl:2: 'labels' is true"),
        ({"text": "b", "labels": -1}, "a.jsonl:2: 'labels' is -1"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(write, row, message):
    source = JsonLines(JsonlOptions(path=write({"text": "fine"}, row)))
    with pytest.raises(ValueError, match=message):
        list(source.documents("train"))


def test_an_unknown_split_is_named_by_file_and_number(write):
    source = JsonLines(JsonlOptions(path=write({"text": "a", "part": "dev"}), split="part"))
    with pytest.raises(
        ValueError, match=r"a\.jsonl:1: 'part' is 'dev'; expected one of train, validation, test"
    ):
        list(source.documents("train"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz"])
def test_a_truncated_archive_is_an_error_that_names_it(write, tmp_path, name):
    path = write({"text": "a"}, {"text": "b"}, name=name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-12])
    with pytest.raises(ValueError, match=f"{name}: damaged after line"):
        list(JsonLines(JsonlOptions(path=path)).documents("train"))


def test_a_missing_or_unsuitable_jsonl_path_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path = '.*none\.jsonl' does not exist; set path to a "):
        JsonLines(JsonlOptions(path=str(tmp_path / "none.jsonl")))
    with pytest.raises(FileNotFoundError, match="is a folder; set path to a "):
        JsonLines(JsonlOptions(path=str(tmp_path)))


def test_the_fingerprint_of_jsonl_follows_content_and_options_and_not_the_path(write):
    one, copy = (
        JsonLines(JsonlOptions(path=write({"text": "a"}, name=name))) for name in ("a.jsonl", "b.jsonl")
    )
    other = JsonLines(JsonlOptions(path=write({"text": "a"}), field="body"))
    assert one.fingerprint() == copy.fingerprint() != other.fingerprint()


# --- bin ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens(tmp_path):
    np.arange(1000, dtype="<u2").tofile(tmp_path / "train.bin")
    np.arange(50000, 50100, dtype="<u2").tofile(tmp_path / "val.bin")
    return tmp_path


def test_token_files_are_mapped(tokens):
    source = TokenFiles(BinOptions(path=str(tokens)))
    assert isinstance(source, TokenSource)
    assert (source.vocab_size, source.loss_floor) == (50257, None)
    assert isinstance(source.tokens("train"), np.memmap)
    assert source.tokens("train").tolist() == list(range(1000))
    assert source.tokens("validation")[0] == 50000


def test_a_changed_token_changes_the_fingerprint(tokens):
    before = TokenFiles(BinOptions(path=str(tokens))).fingerprint()
    np.arange(1, 101, dtype="<u2").tofile(tokens / "val.bin")
    assert TokenFiles(BinOptions(path=str(tokens))).fingerprint() != before


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "holds no val.bin; set path to a folder"),
        (b"", ValueError, "val.bin has 0 bytes; expected uint16"),
        (b"abc", ValueError, "val.bin has 3 bytes; expected uint16"),
    ],
)
def test_a_missing_or_odd_token_file_is_an_error_that_names_it(tokens, content, error, message):
    (tokens / "val.bin").unlink()
    if content is not None:
        (tokens / "val.bin").write_bytes(content)
    with pytest.raises(error, match=message):
        TokenFiles(BinOptions(path=str(tokens)))

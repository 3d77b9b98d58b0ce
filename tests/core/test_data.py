import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice

import attrs
import numpy as np
import pytest
import torch

from altgrad_core import cache_folder, data, preparing, token_cache
from altgrad_core.data import evaluation_batches, training_batch
from altgrad_core.hookspecs import Document, TextSource, TokenSource
from altgrad_core.preparing import prepare


class Texts:
    """A data set of documents that counts how often it is read."""

    def __init__(self, train=("abc", "é"), validation=("xy",), identity="texts"):
        self.texts = {"train": train, "validation": validation}
        self.identity = identity
        self.reads = 0

    def fingerprint(self):
        return self.identity

    def documents(self, split):
        self.reads += 1
        return (Document(text) for text in self.texts[split])


class Numbers:
    """A data set of tokens."""

    def __init__(self, train, validation, vocab_size, loss_floor=None):
        self.splits = {"train": train, "validation": validation}
        self.vocab_size = vocab_size
        self.loss_floor = loss_floor

    def fingerprint(self):
        return f"numbers {self.vocab_size}"

    def tokens(self, split):
        return self.splits[split]


@pytest.fixture
def squares():
    return np.arange(1000, dtype=np.uint16) ** 2 % 997


def only_folder(cache):
    (folder,) = cache.iterdir()
    return folder


def test_the_fakes_satisfy_the_contract():
    assert isinstance(Texts(), TextSource)
    assert isinstance(Numbers([], [], 2), TokenSource)


# --- preparing -------------------------------------------------------------------------------------------


def test_a_document_becomes_its_utf8_bytes_and_one_zero(tmp_path):
    prepared = prepare(Texts(), "tiny", "bytes", tmp_path)
    assert prepared.train.tolist() == [97, 98, 99, 0, 0xC3, 0xA9, 0]
    assert prepared.validation.tolist() == [120, 121, 0]
    assert prepared.train.dtype == np.uint8
    assert (prepared.vocab_size, prepared.loss_floor) == (256, None)
    assert prepared.bytes_per_token == 2 / 3


def test_a_second_call_maps_the_files_and_reads_no_document(tmp_path):
    source = Texts()
    first = prepare(source, "tiny", "bytes", tmp_path)
    again = prepare(source, "tiny", "bytes", tmp_path)
    assert source.reads == 2  # one for each split
    assert isinstance(again.train, np.memmap)
    assert np.array_equal(again.train, first.train)
    assert again.fingerprint == first.fingerprint


def test_it_is_said_before_tokens_are_made_and_only_then(tmp_path):
    source, said = Texts(), []
    for _ in range(2):
        prepare(source, "tiny", "bytes", tmp_path, lambda line: said.append((line, source.reads)))
    message = (
        f"preparing the tokens of 'tiny' by the tokenizer bytes; the next run finds them in {tmp_path}/tiny-"
    )
    ((line, reads),) = said
    assert (line.startswith(message), reads) == (True, 0)


def test_the_cache_folder_is_named_after_the_data_set(tmp_path):
    prepare(Texts(), "tiny", "bytes", tmp_path)
    assert only_folder(tmp_path).name.startswith("tiny-")


def test_another_fingerprint_of_the_source_is_another_cache(tmp_path):
    prepare(Texts(), "tiny", "bytes", tmp_path)
    prepared = prepare(Texts(train=["new"], identity="changed"), "tiny", "bytes", tmp_path)
    assert bytes(prepared.train) == b"new\0"


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    def fingerprint(folder, **changes):
        return prepare(Texts(**changes), "tiny", "bytes", tmp_path / folder).fingerprint

    assert fingerprint("a") == fingerprint("b", identity="other")
    assert fingerprint("a") != fingerprint("c", train=("abd", "é"))
    assert fingerprint("a") != fingerprint("d", train=("abc",), validation=("é", "xy"))


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)],
)
def test_tokens_are_kept_in_the_smallest_type_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    tokens = np.array([0, 5, vocab_size - 1], dtype=np.uint32)
    prepared = prepare(Numbers(tokens, tokens[1:], vocab_size, 1.25), "numbers", "bytes", tmp_path)
    assert prepared.train.dtype == dtype
    assert prepared.train.tolist() == tokens.tolist()
    assert (prepared.vocab_size, prepared.loss_floor, prepared.bytes_per_token) == (vocab_size, 1.25, None)


def test_a_mapped_token_file_is_not_copied(tmp_path):
    np.arange(500, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    source = Numbers(mapped, mapped[400:], 500)
    for _ in range(2):
        prepared = prepare(source, "numbers", "bytes", tmp_path / "cache")
        assert prepared.train is mapped
        assert prepared.validation.tolist() == list(range(400, 500))
    assert [file.name for file in only_folder(tmp_path / "cache").iterdir()] == ["meta.json"]


def test_a_token_outside_the_vocabulary_is_an_error(tmp_path):
    tokens = np.array([1, 7], dtype=np.uint8)
    with pytest.raises(
        ValueError, match=r"'numbers': the train split holds token 7, but vocab_size is 7; set .* to 8"
    ):
        prepare(Numbers(tokens, tokens, 7), "numbers", "bytes", tmp_path)


def test_signed_tokens_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="1-d array of int64; expected 1-d unsigned"):
        prepare(Numbers(np.array([1, 2]), np.array([1, 2]), 7), "numbers", "bytes", tmp_path)


def test_tokens_that_are_no_array_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="the train split is a list; expected 1-d unsigned tokens"):
        prepare(Numbers([1, 2], [1, 2], 7), "numbers", "bytes", tmp_path)


@pytest.mark.parametrize(("split", "texts"), [("train", []), ("validation", [""])])
def test_a_split_too_short_for_one_target_is_an_error_and_leaves_nothing(tmp_path, split, texts):
    with pytest.raises(ValueError, match=f"data set 'tiny': the {split} split has {len(texts)} tokens"):
        prepare(Texts(**{split: texts}), "tiny", "bytes", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_text_that_utf8_cannot_hold_is_an_error_that_names_the_document(tmp_path):
    with pytest.raises(ValueError, match=r"'tiny': document 2 of train: .*surrogates not allowed"):
        prepare(Texts(train=["fine", "\ud800"]), "tiny", "bytes", tmp_path)


def test_an_unknown_tokenizer_is_an_error_that_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"""expected "bytes", "gpt2", or "bpe:N" .* got 'morse'"""):
        prepare(Texts(), "tiny", "morse", tmp_path)


def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="set ALTGRAD_CACHE to a folder that can be written"):
        prepare(Texts(), "tiny", "bytes", tmp_path / "file")


@pytest.mark.parametrize("damage", ["train.bin", "validation.bin", "meta.json"])
def test_a_truncated_cache_is_rebuilt(tmp_path, damage):
    prepare(Texts(), "tiny", "bytes", tmp_path)
    file = only_folder(tmp_path) / damage
    file.write_bytes(file.read_bytes()[:-1])
    prepared = prepare(Texts(), "tiny", "bytes", tmp_path)
    assert bytes(prepared.train) == "abc\0é\0".encode()
    assert [path.name for path in tmp_path.iterdir()] == [file.parent.name]
    facts = json.loads((file.parent / "meta.json").read_text())["facts"]
    assert facts["lengths"]["train"] == (file.parent / "train.bin").stat().st_size


def test_a_missing_file_of_a_cache_is_written_again(tmp_path):
    prepare(Texts(), "tiny", "bytes", tmp_path)
    (only_folder(tmp_path) / "validation.bin").unlink()
    assert bytes(prepare(Texts(), "tiny", "bytes", tmp_path).validation) == b"xy\0"


def test_no_changed_byte_of_a_cache_is_ever_read(tmp_path):
    prepare(Labeled(), "tiny", "bytes", tmp_path)
    folder = only_folder(tmp_path)
    facts = token_cache.opened(folder).facts
    files = sorted(folder.iterdir())
    assert len(files) == 7
    for file in files:
        written = file.read_bytes()
        for place in range(0, len(written), 5 if file.name == "meta.json" else 1):
            file.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
            found = token_cache.opened(folder)
            # Blanks between what meta.json says may change: they say nothing.
            assert found is None or (found.facts == facts and written[place : place + 1].isspace())
        file.write_bytes(written)


def test_a_cache_with_a_changed_byte_is_written_again(tmp_path):
    prepare(Texts(), "tiny", "bytes", tmp_path)
    (only_folder(tmp_path) / "train.bin").write_bytes("abd\0é\0".encode())
    assert bytes(prepare(Texts(), "tiny", "bytes", tmp_path).train) == "abc\0é\0".encode()
    assert (only_folder(tmp_path) / "train.bin").read_bytes() == "abc\0é\0".encode()


def test_a_disk_without_room_is_an_error_that_names_the_cache(tmp_path):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write prepared tokens .* No space left .* and has room"):
        prepare(Interrupted(full), "tiny", "bytes", tmp_path)
    assert list(tmp_path.iterdir()) == []


class Interrupted(Texts):
    """Something happens after the first document."""

    def __init__(self, happens):
        super().__init__()
        self.happens = happens

    def documents(self, split):
        yield from islice(super().documents(split), 1)
        self.happens()


def test_an_error_of_the_source_leaves_no_half_cache(tmp_path):
    def fail():
        raise RuntimeError("the disk fell out")

    with pytest.raises(RuntimeError, match="fell out"):
        prepare(Interrupted(fail), "tiny", "bytes", tmp_path)
    assert list(tmp_path.iterdir()) == []


def forked(function):
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


def test_a_killed_process_leaves_no_half_cache(tmp_path):
    killed = Interrupted(lambda: os.kill(os.getpid(), signal.SIGKILL))
    process = forked(lambda: prepare(killed, "tiny", "bytes", tmp_path))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert only_folder(tmp_path).name.startswith(".tiny-")  # its unfinished folder
    assert bytes(prepare(Texts(), "tiny", "bytes", tmp_path).validation) == b"xy\0"


def test_what_a_killed_process_left_is_deleted_a_day_later(tmp_path):
    prepare(Texts(), "tiny", "bytes", tmp_path)
    finished = only_folder(tmp_path)
    fresh, old = (finished.with_name(f".{finished.name}.{word}") for word in ("fresh", "old"))
    fresh.mkdir()
    old.mkdir()
    os.utime(old, times=(time.time() - 90_000,) * 2)
    (finished / "meta.json").unlink()
    prepare(Texts(), "tiny", "bytes", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {finished.name, fresh.name}


def test_two_processes_that_prepare_one_cache_at_once_both_get_it(tmp_path):
    barrier = multiprocessing.get_context("fork").Barrier(2, timeout=20)
    process = forked(lambda: prepare(Interrupted(barrier.wait), "tiny", "bytes", tmp_path))
    prepared = prepare(Interrupted(barrier.wait), "tiny", "bytes", tmp_path)
    process.join()
    assert process.exitcode == 0
    assert bytes(prepared.train) == b"abc\0"
    assert os.path.samefile(prepared.train.filename, only_folder(tmp_path) / "train.bin")


def test_the_loser_of_the_race_uses_the_winners_files(tmp_path):
    def other_process_wins():
        prepare(Texts(), "tiny", "bytes", tmp_path)

    prepared = prepare(Interrupted(other_process_wins), "tiny", "bytes", tmp_path)
    assert bytes(prepared.train) == "abc\0é\0".encode()
    assert os.path.samefile(prepared.train.filename, only_folder(tmp_path) / "train.bin")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ALTGRAD_CACHE": "/a", "XDG_CACHE_HOME": "/x"}, "/a"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/altgrad"),
        ({"ALTGRAD_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/altgrad"),
    ],
)
def test_the_default_cache_follows_the_environment(monkeypatch, variables, expected):
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("ALTGRAD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder.default_cache()) == expected


def test_prepared_data_is_frozen(tmp_path):
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        prepare(Texts(), "tiny", "bytes", tmp_path).vocab_size = 3


# --- labels ----------------------------------------------------------------------------------------------


class Labeled:
    """A data set of documents with labels."""

    def __init__(self, *labels, label_count=0):
        self.labels = labels or ((2, 0), (), (1,))
        self.label_count = label_count

    def fingerprint(self):
        return f"labeled {self.labels} {self.label_count}"

    def documents(self, split):
        texts = ("ab", "", "c") if split == "train" else ("de", "f", "")
        return (Document(text, labels) for text, labels in zip(texts, self.labels, strict=True))


def test_the_ends_and_labels_of_documents_are_kept(tmp_path):
    for _ in range(2):  # written, then read
        prepared = prepare(Labeled(), "tiny", "bytes", tmp_path)
        train, validation = prepared.train_documents, prepared.validation_documents
        assert train.ends.tolist() == [3, 4, 6]
        assert validation.ends.tolist() == [3, 5, 6]
        assert train.labels.tolist() == validation.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert bytes(prepared.train[train.ends[1] : train.ends[2]]) == b"c\0"


def test_without_labels_no_documents_are_kept(tmp_path):
    prepared = prepare(Labeled((), (), ()), "tiny", "bytes", tmp_path)
    assert (prepared.train_documents, prepared.validation_documents) == (None, None)


def test_a_source_may_say_how_many_labels_there_are(tmp_path):
    prepared = prepare(Labeled((1,), (), (0,), label_count=5), "tiny", "bytes", tmp_path)
    assert prepared.train_documents.labels.shape == (3, 5)
    with pytest.raises(
        ValueError, match="'tiny': document 1 of train has the label 5; the 5 labels are 0 to 4"
    ):
        prepare(Labeled((5,), (), (0,), label_count=5), "tiny", "bytes", tmp_path)


@pytest.mark.parametrize("label", [2_000_000_000, 10**12, 10**30])
def test_a_label_too_large_for_a_matrix_is_refused_by_its_document(tmp_path, label):
    reason = (
        f"'tiny': document 2 of train has the label {label}: .* no more than .* number the labels 0, 1, 2"
    )
    with pytest.raises(ValueError, match=reason):
        prepare(Labeled((2,), (label,), (0,)), "tiny", "bytes", tmp_path)


def test_too_many_labels_are_refused_by_the_option(tmp_path):
    with pytest.raises(ValueError, match=r"'tiny': label_count is 2000000000: .* no more than"):
        prepare(Labeled((2,), (), (0,), label_count=2_000_000_000), "tiny", "bytes", tmp_path)


def test_a_tokenizer_is_told_by_its_name_and_by_what_it_has_learnt(tmp_path, squares):
    long = ("to be or not to be " * 50,)
    other = ("a rose is a rose " * 50,)

    def tokenizer(name, train, validation=("xy",)):
        return prepare(Texts(train, validation, f"{train} {validation}"), "tiny", name, tmp_path).tokenizer

    assert tokenizer("bytes", long) == tokenizer("bytes", other)
    assert tokenizer("bpe:260", long) == tokenizer("bpe:260", long, ("another",))
    assert tokenizer("bpe:260", long) == tokenizer("bpe:260", long)  # from the cache
    kinds = [("bytes", long), ("bpe:260", long), ("bpe:261", long), ("bpe:260", other)]
    assert len({tokenizer(*kind) for kind in kinds}) == len(kinds)
    assert prepare(Numbers(squares, squares, 997), "tiny", "bytes", tmp_path).tokenizer == ""


def test_where_labels_are_said_to_be_documents_are_kept_even_if_none_has_one(tmp_path):
    prepared = prepare(Labeled((), (), (), label_count=2), "tiny", "bytes", tmp_path)
    assert prepared.train_documents.labels.tolist() == [[0, 0]] * 3


def test_another_label_is_another_fingerprint(tmp_path):
    one, other = (prepare(Labeled(first, (), (1,)), "tiny", "bytes", tmp_path) for first in ((1,), (0,)))
    assert np.array_equal(one.train, other.train)
    assert one.fingerprint != other.fingerprint


# --- tokenizers ------------------------------------------------------------------------------------------


@pytest.fixture
def byte_pairs():
    pytest.importorskip("tokenizers")
    return Texts(train=("ab ab ab",), validation=("abab", "é"))


def test_byte_pairs_are_learnt_from_the_training_split_once(tmp_path, byte_pairs):
    prepared = prepare(byte_pairs, "tiny", "bpe:258", tmp_path)
    assert byte_pairs.reads == 3  # the training split twice: to learn, then to encode
    assert prepared.train.dtype == np.uint16
    assert prepared.validation[:3].tolist() == [256, 256, 257]
    assert prepared.vocab_size == 258
    again = prepare(byte_pairs, "tiny", "bpe:258", tmp_path)
    assert byte_pairs.reads == 3
    assert np.array_equal(again.train, prepared.train)
    assert (only_folder(tmp_path) / "tokenizer.json").exists()


def test_bytes_of_text_per_token_count_text_alone_and_every_token(tmp_path, byte_pairs):
    # "abab" and "é" are 4 + 2 bytes; 2 + 2 byte pairs, or 4 + 2 bytes, and an end of each document.
    assert prepare(byte_pairs, "tiny", "bpe:258", tmp_path).bytes_per_token == 6 / 6
    assert prepare(byte_pairs, "tiny", "bytes", tmp_path).bytes_per_token == 6 / 8


def test_another_tokenizer_is_another_cache(tmp_path, byte_pairs):
    for tokenizer in ("bytes", "bpe:257", "bpe:258"):
        prepare(byte_pairs, "tiny", tokenizer, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_training_split_too_small_to_learn_from_leaves_nothing(tmp_path, byte_pairs):
    with pytest.raises(ValueError, match=r"set data\.tokenizer to 'bpe:259' or fewer"):
        prepare(byte_pairs, "tiny", "bpe:4096", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_text_that_utf8_cannot_hold_is_named_before_anything_is_learnt(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=r"'tiny': document 2 of train: .*surrogates not allowed"):
        prepare(Texts(train=["fine", "\ud800"]), "tiny", "bpe:257", tmp_path)


def test_documents_are_tokenized_in_batches_without_a_seam(tmp_path, monkeypatch):
    texts = [f"document {number}" * (number % 5) for number in range(100)]
    source = Texts(train=texts, validation=texts)
    whole = prepare(source, "tiny", "bytes", tmp_path / "whole")
    monkeypatch.setattr(preparing, "BATCH", 50)
    batched = prepare(source, "tiny", "bytes", tmp_path / "batched")
    assert bytes(batched.train) == bytes(whole.train) == b"".join(text.encode() + b"\0" for text in texts)
    assert batched.fingerprint == whole.fingerprint


# A process that prepares data as soon as it is told to.
PREPARE = """
import os, pathlib, signal, sys
from altgrad_core.hookspecs import Document
from altgrad_core.preparing import prepare

class Prose:
    def fingerprint(self):
        return "prose"
    def documents(self, split):
        for number in range(300):
            yield Document(f"{split} {number} held that the court held {number * 7919 % 1000}\\n" * 20)
        if split in sys.argv[2:]:
            os.kill(os.getpid(), signal.SIGKILL)

print("ready", flush=True)
sys.stdin.readline()
prepared = prepare(Prose(), "prose", "bpe:400", pathlib.Path(sys.argv[1]))
print(prepared.fingerprint, len(prepared.train))
"""


def preparing_process(cache, *killed):
    command = [sys.executable, "-c", PREPARE, str(cache), *killed]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_that_learn_and_prepare_at_once_get_the_same_whole_cache(tmp_path):
    pytest.importorskip("tokenizers")
    processes = [preparing_process(tmp_path) for _ in range(2)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    first, second = (process.communicate(timeout=60)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert first == second
    assert token_cache.opened(only_folder(tmp_path)).facts["lengths"]["train"] == int(first.split()[1])


@pytest.mark.parametrize(("split", "left"), [("train", 0), ("validation", 1)])
def test_a_process_killed_in_learning_or_writing_leaves_nothing_that_is_read(tmp_path, split, left):
    pytest.importorskip("tokenizers")
    killed = preparing_process(tmp_path, split)
    killed.communicate("\n", timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("prose-*"))
    assert len(list(tmp_path.glob(".prose-*/train.bin"))) == left
    after = preparing_process(tmp_path)
    out, _ = after.communicate("\n", timeout=60)
    assert after.returncode == 0
    assert token_cache.opened(*tmp_path.glob("prose-*")).facts["fingerprint"] == out.split()[0]


INTERRUPTED = """
import os, pathlib, signal, sys
from altgrad_core.hookspecs import Document
from altgrad_core.preparing import prepare

signal.signal(signal.SIGINT, signal.default_int_handler)  # a command in the background ignores it

class Endless:
    read = 0
    def fingerprint(self):
        return "endless"
    def documents(self, split):
        for self.read in range(1_000_000):
            yield Document(f"document {self.read} of very many")
            if self.read == 1000:
                os.kill(os.getpid(), signal.SIGINT)

source = Endless()
try:
    prepare(source, "endless", "bpe:400", pathlib.Path(sys.argv[1]))
except KeyboardInterrupt:
    print("interrupted", source.read < 999_999)
"""


def test_an_interrupt_while_byte_pairs_are_learnt_does_not_wait_for_the_rest_of_the_text(tmp_path):
    pytest.importorskip("tokenizers")
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "interrupted True\n"
    assert list(tmp_path.iterdir()) == []


# --- training batches ------------------------------------------------------------------------------------

PLACE = {"seed": 1337, "step": 10, "micro_batch": 0}


def test_the_targets_are_the_inputs_one_token_later():
    x, y = training_batch(np.arange(200, dtype=np.uint8), block_size=8, batch_size=5, **PLACE)
    assert x.shape == y.shape == (5, 8)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous()
    assert y.is_contiguous()
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(8))


def test_the_same_place_gives_the_same_batch(squares):
    first = training_batch(squares, block_size=8, batch_size=5, **PLACE)
    again = training_batch(squares, block_size=8, batch_size=5, **PLACE)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("change", [{"seed": 1338}, {"step": 11}, {"micro_batch": 1}])
def test_another_seed_step_or_micro_batch_gives_another_batch(squares, change):
    x, _ = training_batch(squares, block_size=8, batch_size=5, **PLACE)
    other, _ = training_batch(squares, block_size=8, batch_size=5, **{**PLACE, **change})
    assert not any(torch.equal(row, other_row) for row in x for other_row in other)


def test_the_offsets_are_philox_of_seed_step_and_micro_batch():
    # Philox 4x64-10 counts up before each block of four draws (Salmon et al. 2011).
    counter = (10 << 192) + (2 << 128)
    key = (data.TRAINING_STREAM << 64) + 1337
    draws = np.random.Philox(counter=counter, key=key).random_raw(6)
    x, _ = training_batch(
        np.arange(100, dtype=np.uint8), block_size=4, batch_size=6, seed=1337, step=10, micro_batch=2
    )
    assert x[:, 0].tolist() == [int(draw) % 96 for draw in draws]


def test_batches_of_successive_steps_share_no_draws(squares):
    starts = [
        training_batch(squares, block_size=1, batch_size=8, seed=0, step=step, micro_batch=0)[0]
        for step in (1, 2)
    ]
    assert not set(starts[0].flatten().tolist()) & set(starts[1].flatten().tolist())


def test_every_window_that_fits_can_be_drawn():
    x, y = training_batch(np.arange(6, dtype=np.uint8), block_size=2, batch_size=200, **PLACE)
    assert set(x[:, 0].tolist()) == {0, 1, 2, 3}
    assert int(y.max()) == 5


def test_a_batch_leaves_the_global_random_states_alone(squares):
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    training_batch(squares, block_size=8, batch_size=5, **PLACE)
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    assert before[2] == after[2]


def test_a_split_shorter_than_a_window_is_an_error_that_names_the_largest_block_size():
    tokens = np.zeros(8, dtype=np.uint8)
    assert training_batch(tokens, block_size=7, batch_size=2, **PLACE)[0].shape == (2, 7)
    with pytest.raises(
        ValueError, match=r"training split has 8 tokens, fewer than the 9 .*block_size to 7 or less"
    ):
        training_batch(tokens, block_size=8, batch_size=2, **PLACE)
    with pytest.raises(ValueError, match="evaluated split has 8 tokens"):
        evaluation_batches(tokens, block_size=8, batch_size=2, batches=0)


# --- evaluation batches ----------------------------------------------------------------------------------


def starts_of(tokens, **sizes):
    return [x[:, 0].tolist() for x, _ in evaluation_batches(tokens, **sizes)]


def test_zero_batches_read_every_full_window_of_the_split_once():
    tokens = np.arange(24, dtype=np.uint8)  # 23 targets: 5 windows of 4, and 3 targets left out
    batches = list(evaluation_batches(tokens, block_size=4, batch_size=2, batches=0))
    assert [x.shape for x, _ in batches] == [(2, 4), (2, 4), (1, 4)]
    assert torch.cat([x.flatten() for x, _ in batches]).tolist() == list(range(20))
    assert torch.cat([y.flatten() for _, y in batches]).tolist() == list(range(1, 21))


def test_the_last_target_of_a_split_that_fits_exactly_is_read():
    batches = list(evaluation_batches(np.arange(13, dtype=np.uint8), block_size=4, batch_size=8, batches=0))
    assert int(batches[-1][1][-1, -1]) == 12


def test_a_few_batches_are_spread_evenly_over_the_split():
    tokens = np.arange(101, dtype=np.uint8)  # 25 windows of 4
    assert starts_of(tokens, block_size=4, batch_size=2, batches=2) == [[0, 24], [48, 72]]


def test_more_batches_than_there_are_read_the_split_once():
    tokens = np.arange(21, dtype=np.uint8)
    assert starts_of(tokens, block_size=4, batch_size=2, batches=20) == [[0, 4], [8, 12], [16]]


def test_evaluation_windows_do_not_overlap():
    batches = starts_of(np.arange(60_000, dtype=np.uint16), block_size=7, batch_size=3, batches=500)
    starts = [start for batch in batches for start in batch]
    assert len(starts) == 1500
    assert min(np.diff(starts)) >= 7

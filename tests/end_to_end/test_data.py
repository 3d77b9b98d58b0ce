"""Data sets and tokenizers in whole runs: real text, wrong names, no network, damaged caches."""

import json
import math
import os
import pathlib
import re
import socket

import numpy as np
import pytest

from altgrad_core import data_set
from altgrad_core.apps import guarded, run_app
from altgrad_core.experiment_file import load_experiment
from altgrad_core.record import read_lines
from altgrad_core.registry import UsageError

BESIDE = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "eurlex"
SMALL = """
name = "small"
steps = 12
[data]
{data}
[model]
n_layer = 1
n_head = 2
n_embd = 32
block_size = 32
[train]
batch_size = 4
device = "cpu"
warmup_steps = 2
eval_every = 12
eval_batches = 4
log_every = 1
[optimizer]
plugin = "AdamW"
lr = 1e-2
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A token cache of each test's own, which it may damage."""
    monkeypatch.setenv("ALTGRAD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path):
    """Write an experiment file with a [data] table, and return its path."""

    def write(*data: str) -> pathlib.Path:
        path = tmp_path / "small.toml"
        path.write_text(SMALL.format(data="\n".join(data)))
        return path

    return write


@pytest.fixture
def eurlex():
    """The [data] of the EUR-Lex sample: in $ALTGRAD_EURLEX, or beside the repository."""
    folder = pathlib.Path(os.environ.get("ALTGRAD_EURLEX") or BESIDE)
    if not folder.is_dir():
        pytest.skip(f"no EUR-Lex sample at {folder}; set ALTGRAD_EURLEX to its folder")
    return 'plugin = "eurlex"', f"path = {json.dumps(str(folder / 'eurlex_tiny.jsonl'))}"


@pytest.fixture
def command(capsys):
    """Return a function that runs `altgrad-run` and gives its exit code and what it wrote."""

    def command(*arguments):
        code = guarded(run_app, list(map(str, arguments)))
        return code, *capsys.readouterr()

    return command


def test_a_run_says_first_that_it_prepares_tokens_unless_they_are_there(write, command, tmp_path):
    path = write('plugin = "markov"', "tokens = 2000")
    first, again = (command(path, "--out", tmp_path / out, "--set", "steps=1") for out in ("one", "two"))
    assert first[1].startswith("preparing the tokens of 'markov'; the next run finds them in ")
    assert "preparing" not in again[1]
    assert "preparing" in (tmp_path / "one" / "small" / "run" / "log.txt").read_text()


def losses(result):
    return [
        line["train/loss"] for line in read_lines(result.folder / "metrics.jsonl") if "train/loss" in line
    ]


@pytest.mark.parametrize(("tokenizer", "size"), [("bytes", 256), ("bpe:512", 512)])
def test_real_text_trains_under_each_tokenizer_from_a_uniform_guess(
    write, eurlex, tmp_path, tokenizer, size, run
):
    pytest.importorskip("tokenizers")
    result = run(write(*eurlex, f'tokenizer = "{tokenizer}"'), tmp_path / "runs")
    first, *_, last = losses(result)
    assert abs(first - math.log(size)) < 0.2
    assert last < first - 0.1


def test_bits_per_byte_divide_by_the_bytes_of_the_text(write, eurlex, tmp_path, run):
    pytest.importorskip("tokenizers")
    result = run(write(*eurlex, 'tokenizer = "bpe:512"'), tmp_path / "runs")
    rows = map(json.loads, open(eurlex[1].split('"')[1], encoding="utf-8"))  # noqa: SIM115
    text = sum(len(row["text"].encode()) for row in rows if row["split"] == "validation")
    (tokens,) = tmp_path.glob("cache/eurlex-*/validation.bin")
    evaluated = [line for line in read_lines(result.folder / "metrics.jsonl") if "validation/loss" in line][
        -1
    ]
    bits = evaluated["validation/loss"] / math.log(2) * len(np.fromfile(tokens, np.uint16)) / text
    assert evaluated["validation/bits_per_byte"] == pytest.approx(bits, rel=1e-12)


def test_a_second_run_uses_the_cache_and_a_damaged_one_is_made_again(write, eurlex, tmp_path, run):
    pytest.importorskip("tokenizers")
    path = write(*eurlex, 'tokenizer = "bpe:300"')
    first = run(path, tmp_path / "first")
    (tokens,) = tmp_path.glob("cache/eurlex-*/train.bin")
    written = tokens.stat()
    second = run(path, tmp_path / "second")
    assert (tokens.stat().st_ino, tokens.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    content = bytearray(tokens.read_bytes())
    content[len(content) // 2] ^= 1
    tokens.write_bytes(content)
    third = run(path, tmp_path / "third")
    assert tokens.stat().st_ino != written.st_ino
    assert losses(first) == losses(second) == losses(third)


def test_a_wrong_tokenizer_is_found_by_check_at_its_line(command, write, tmp_path):
    code, _, err = command(write('tokenizer = "bpe:abc"'), "--check")
    assert code == 2
    assert err.startswith(
        f'{tmp_path}/small.toml:5: data.tokenizer: expected "bytes", "gpt2", or "bpe:N" with N'
    )


def test_check_counts_the_parameters_of_the_vocabulary_without_learning_it(command, write):
    code, out, _ = command(write('tokenizer = "bpe:4096"'), "--check")
    assert code == 0
    # Embeddings 32 x (4096 + 32), a block 12 x 32 x 32, three LayerNorms' weights.
    assert "tokenizer bpe:4096" in out
    assert f"{32 * (4096 + 32) + 12 * 32 * 32 + 3 * 32:,} parameters" in out


def test_text_too_small_for_the_vocabulary_exits_with_2_and_names_the_largest(command, write, tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("The court held that the court had held.\n" * 50)
    path = write('plugin = "text"', f"path = {json.dumps(str(tmp_path / 'a.txt'))}", 'tokenizer = "bpe:4096"')
    code, _, err = command(path, "--out", tmp_path / "runs")
    assert code == 2
    assert "'bpe:4096': the training split is too small, no more than" in err
    assert "Traceback" not in err


def test_without_a_network_wikitext_exits_with_2_and_names_what_needs_none(
    command, write, tmp_path, monkeypatch
):
    with socket.create_server(("127.0.0.1", 0)) as server:
        hub = f"http://127.0.0.1:{server.getsockname()[1]}"  # nobody listens there any more
    variables = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "", "no_proxy": "127.0.0.1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, _, err = command(write('plugin = "wikitext"'), "--out", tmp_path / "runs")
    assert code == 2
    assert f"the data set 'wikitext' cannot be prepared: no network: {hub} does not answer" in err
    assert 'or take plugin = "licenses"' in err
    assert "Traceback" not in err


def test_without_a_network_gpt2_is_refused_before_a_run_is_made(write, tmp_path, monkeypatch):
    pytest.importorskip("tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    file = load_experiment(write('tokenizer = "gpt2"'))
    with pytest.raises(UsageError, match="tokenizer 'gpt2': no network"):
        data_set.refuse_absent(file, tmp_path / "runs")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            ["plugin = 'text'", "path = 'nope.txt'"],
            "path = 'nope.txt' .* does not exist; set path to a text file",
        ),
        (
            ["plugin = 'bin'", "path = '{folder}'", "vocab_size = 9"],
            "val.bin has 3 bytes; expected uint16 tokens",
        ),
    ],
)
def test_data_that_are_absent_or_odd_exit_with_2_as_those_that_cannot_be_read(
    write, tmp_path, data, reason, capsys
):
    (tmp_path / "train.bin").write_bytes(bytes(40))
    (tmp_path / "val.bin").write_bytes(b"abc")
    path = write(*(line.format(folder=tmp_path) for line in data))
    assert guarded(run_app, [str(path), "--out", str(tmp_path / "runs")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^the data set .* cannot be prepared: .*{reason}", line)

import itertools
import json
import lzma
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from altgrad_core.hookspecs import Document, TextSource
from altgrad_data import EcthrOptions, EurlexOptions, HubOptions
from altgrad_data.hub import articles, ecthr_a, eurlex, wikitext


def lawsuit(number, split=None):
    row = {"text": f"act {number}", "labels": [number % 3, 99], "domain_labels": [number % 2], "other": None}
    return row | ({"split": split} if split else {})


def as_jsonl(path, rows):
    lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    path.write_bytes(lzma.compress(lines) if path.suffix == ".xz" else lines)


def as_parquet(path, rows):
    arrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=2)


def documents(source):
    return {split: list(source.documents(split)) for split in ("train", "validation")}


# --- files -----------------------------------------------------------------------------------------------

PARQUET = (
    "train-00000-of-00002.parquet",
    "train-00001-of-00002.parquet",
    "validation-00000-of-00001.parquet",
)


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (as_parquet, PARQUET),
        (as_jsonl, ("train-0.jsonl", "train-1.jsonl", "validation.jsonl")),
        (as_jsonl, ("eurlex_train_0.jsonl.xz", "eurlex_train_1.jsonl.xz", "eurlex_validation.jsonl.xz")),
    ],
)
@pytest.mark.parametrize("inner", ["", "eurlex"])
def test_a_folder_of_the_hubs_columns_is_read_by_the_names_of_its_files(tmp_path, write, names, inner):
    folder = tmp_path / inner
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        write(folder / name, [lawsuit(10 * number + row) for row in range(3)])
    for other in ("test", "restrain", "trainee"):
        write(folder / names[0].replace("train", other), [lawsuit(90)])
    source = eurlex(EurlexOptions(path=str(tmp_path)))
    assert isinstance(source, TextSource)
    found = documents(source)
    assert found["train"] == [Document(f"act {n}", (n % 3, 99)) for n in (0, 1, 2, 10, 11, 12)]
    assert [document.text for document in found["validation"]] == ["act 20", "act 21", "act 22"]


def test_parquet_and_json_lines_of_the_same_rows_are_the_same_documents(tmp_path):
    rows = [{"text": ["first paragraph", "second é"], "labels": []}, {"text": ["one"], "labels": [3, 0]}]
    sources = []
    for kind, write in (("parquet", as_parquet), ("jsonl", as_jsonl)):
        (tmp_path / kind).mkdir()
        for split in ("train", "validation"):
            write(tmp_path / kind / f"{split}.{kind}", rows)
        sources.append(ecthr_a(EcthrOptions(path=str(tmp_path / kind))))
    assert documents(sources[0]) == documents(sources[1])
    assert documents(sources[0])["train"] == [
        Document("first paragraph\nsecond é"),
        Document("one", (3, 0)),
    ]
    assert [source.label_count for source in sources] == [10, 10]


def test_a_single_file_is_split_by_the_key_that_says_so(tmp_path):
    splits = ("train", "validation", "test", "train")
    as_jsonl(tmp_path / "a.jsonl", [lawsuit(number, split) for number, split in enumerate(splits)])
    found = documents(eurlex(EurlexOptions(path=str(tmp_path / "a.jsonl"))))
    assert [document.text for document in found["train"]] == ["act 0", "act 3"]
    assert [document.text for document in found["validation"]] == ["act 1"]


def test_a_single_file_without_that_key_holds_out_a_tenth_by_a_hash_of_the_text(tmp_path):
    as_jsonl(tmp_path / "a.jsonl", [lawsuit(number) for number in range(2000)])
    found = documents(eurlex(EurlexOptions(path=str(tmp_path / "a.jsonl"))))
    assert len(found["train"]) + len(found["validation"]) == 2000
    assert abs(len(found["validation"]) / 2000 - 0.1) < 4 * (0.1 * 0.9 / 2000) ** 0.5


def test_another_column_can_hold_the_labels(tmp_path):
    as_jsonl(tmp_path / "a.jsonl", [lawsuit(1, "train")])
    source = eurlex(EurlexOptions(path=str(tmp_path / "a.jsonl"), labels="domain_labels"))
    assert list(source.documents("train")) == [Document("act 1", (1,))]
    assert source.label_count == 0


def test_the_number_of_labels_is_that_of_the_hubs_column_or_the_users_word():
    assert (eurlex().label_count, ecthr_a().label_count) == (100, 10)
    assert [EurlexOptions(**given).label_count for given in ({"labels": "domains"}, {"label_count": 21})] == [
        0,
        21,
    ]


def test_the_fingerprint_follows_content_and_column_and_not_the_place(tmp_path):
    for name, rows in (("a", 3), ("b", 3), ("c", 4)):
        as_jsonl(tmp_path / f"{name}.jsonl", [lawsuit(number, "train") for number in range(rows)])
    one, same, longer = (
        eurlex(EurlexOptions(path=str(tmp_path / f"{name}.jsonl"))).fingerprint() for name in "abc"
    )
    column = eurlex(EurlexOptions(path=str(tmp_path / "a.jsonl"), labels="domain_labels")).fingerprint()
    fewer = eurlex(EurlexOptions(path=str(tmp_path / "a.jsonl"), label_count=7)).fingerprint()
    assert one == same
    assert len({one, longer, column, fewer, eurlex().fingerprint(), ecthr_a().fingerprint()}) == 6


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: None, FileNotFoundError, r"path = '.*' does not exist; set path to a folder with"),
        (lambda path: path.mkdir(), FileNotFoundError, "no train file in .*; set path to a folder with"),
        (lambda path: path.write_text(""), ValueError, r"is none of \.parquet, \.jsonl, \.jsonl\.gz"),
    ],
)
def test_a_path_that_holds_no_data_set_is_an_error_that_says_what_is_wanted(tmp_path, make, error, message):
    make(tmp_path / "place")
    with pytest.raises(error, match=message):
        eurlex(EurlexOptions(path=str(tmp_path / "place")))


def test_a_missing_column_names_the_row_and_the_columns_there_are(tmp_path):
    as_jsonl(tmp_path / "a.jsonl", [{"text": "a", "split": "train"}])
    source = eurlex(EurlexOptions(path=str(tmp_path / "a.jsonl")))
    message = r"a\.jsonl:1: no key 'labels'; its keys are text, split: set labels to one"
    with pytest.raises(ValueError, match=message):
        list(source.documents("train"))


def test_a_damaged_parquet_file_is_named(tmp_path):
    for split in ("train", "validation"):
        as_parquet(tmp_path / f"{split}.parquet", [lawsuit(number) for number in range(50)])
    (tmp_path / "train.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train\.parquet: damaged after row 0: .*; download it again"):
        list(eurlex(EurlexOptions(path=str(tmp_path))).documents("train"))


def test_without_pyarrow_parquet_names_what_to_install(tmp_path, monkeypatch):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"read by pyarrow, .* pip install 'altgrad-data\[hub\]'"):
        list(eurlex(EurlexOptions(path=str(tmp_path))).documents("train"))


# --- WikiText --------------------------------------------------------------------------------------------

LINES = [
    *("", " = Valkyria = \n", "", " Text , one . \n", "", " = = Plot = = \n", "", " More . \n"),
    *(" = not a title = \n", "", " = a = b = \n", "", " Other . \n"),
]


def test_lines_are_joined_to_articles_at_their_titles():
    assert list(articles(LINES)) == [
        " = Valkyria = \n Text , one . \n = = Plot = = \n More . \n = not a title = \n",
        " = a = b = \n Other . \n",
    ]


def test_articles_lose_no_line_whatever_comes_first():
    for lines in (LINES, LINES[3:], [" = A = \n", "", " = B = \n"], ["", ""], []):
        assert "".join(articles(lines)) == "".join(lines)


def test_wikitext_in_files_is_its_articles_without_labels(tmp_path):
    for split in ("train", "validation"):
        as_jsonl(tmp_path / f"{split}.jsonl", [{"text": line} for line in LINES])
    found = documents(wikitext(HubOptions(path=str(tmp_path))))
    assert [document.text for document in found["train"]] == list(articles(LINES))
    assert {document.labels for document in found["validation"]} == {()}


# --- the hub ---------------------------------------------------------------------------------------------

ASK = """
import sys, time
from altgrad_data.hub import wikitext
start = time.monotonic()
try:
    print(next(iter(wikitext().documents("train"))))
except ConnectionError as error:
    print(time.monotonic() - start < 15, "datasets" in sys.modules, error)
"""


def ask(folder, endpoint, **variables):
    """Ask for the first article of WikiText in a new process, whose hub and cache are given."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(folder), "HF_ENDPOINT": endpoint, "no_proxy": "127.0.0.1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout


@pytest.fixture
def refusing():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def silent():
    """A hub that lets every connection hang: its queue of one is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, socket.socket() as waiting:
        waiting.connect(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("hub", ["refusing", "silent"])
def test_without_a_network_the_ways_out_are_named_within_a_second(tmp_path, request, hub):
    endpoint = request.getfixturevalue(hub)
    assert ask(tmp_path, endpoint) == (
        f"True False no network: {endpoint} does not answer, and no copy of Salesforce/wikitext "
        f"(wikitext-103-raw-v1) is in {tmp_path}/datasets; set path to a folder of its Parquet files or to a "
        '.jsonl file with the same columns, or take plugin = "licenses", "text", "jsonl", "bin" or "markov", '
        "which need no network\n"
    )


def test_where_offline_is_asked_for_nothing_is_asked(tmp_path, silent):
    assert "is not to be asked, and no copy of" in ask(tmp_path, silent, HF_HUB_OFFLINE="1")


def test_tokens_that_were_prepared_need_no_hub(refusing, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", refusing)
    assert wikitext().fingerprint() == wikitext().fingerprint()


@pytest.fixture
def copied(tmp_path):
    """The hub's own cache on this machine, as `datasets` leaves it after a download of WikiText."""
    pytest.importorskip("datasets")
    parquet_builder = pytest.importorskip("datasets.packaged_modules.parquet.parquet")
    for split in ("train", "validation"):
        as_parquet(tmp_path / f"{split}.parquet", [{"text": f"{split} {line}"} for line in range(2)])
    builder = parquet_builder.Parquet(
        cache_dir=str(tmp_path / "datasets"),
        dataset_name="wikitext",
        config_name="wikitext-103-raw-v1",
        hash="0123456789abcdef",
        data_files={split: str(tmp_path / f"{split}.parquet") for split in ("train", "validation")},
    )
    builder.download_and_prepare()
    place = tmp_path / "datasets" / "Salesforce___wikitext" / "wikitext-103-raw-v1" / "0.0.0"
    place.mkdir(parents=True)
    Path(builder.cache_dir).rename(place / "0123456789abcdef")
    return tmp_path


@pytest.mark.slow
def test_without_a_network_a_copy_on_this_machine_is_used(copied, silent):
    assert ask(copied, silent) == "Document(text='train 0train 1', labels=())\n"


# --- the EUR-Lex sample ----------------------------------------------------------------------------------


def test_the_sample_has_865_and_113_acts_under_100_labels(eurlex_sample):
    source = eurlex(EurlexOptions(path=str(eurlex_sample)))
    found = documents(source)
    assert {split: len(acts) for split, acts in found.items()} == {"train": 865, "validation": 113}
    assert sum(len(act.text.encode()) for act in found["validation"]) == 3_076_651
    acts = [act for split in found.values() for act in split]
    assert all(0 <= label < 100 for act in acts for label in act.labels)
    assert round(sum(len(act.labels) for act in acts) / len(acts), 1) == 5.4


def test_genuine_rows_of_the_hub_are_read(eurlex_sample):
    found = documents(eurlex(EurlexOptions(path=str(eurlex_sample / "lex_glue_eurlex_rows.jsonl"))))
    rows = [json.loads(line) for line in (eurlex_sample / "lex_glue_eurlex_rows.jsonl").open()]
    expected = [Document(row["text"], tuple(row["labels"])) for row in rows if row["split"] != "test"]
    assert sorted(itertools.chain(*found.values()), key=str) == sorted(expected, key=str)

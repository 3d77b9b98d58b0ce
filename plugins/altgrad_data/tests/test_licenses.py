import importlib.metadata
import re
from collections import Counter

import pytest

from altgrad_core.hookspecs import TextSource
from altgrad_data import LicensesOptions
from altgrad_data.licenses import Licenses, family, parse
from altgrad_data.overlap import RUN, copied_share


@pytest.fixture(scope="module")
def licenses():
    return Licenses(LicensesOptions())


@pytest.fixture(scope="module")
def splits(licenses):
    return {split: list(licenses.documents(split)) for split in ("train", "validation")}


def size(documents):
    return sum(len(document.text.encode()) for document in documents)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("gpl-2.0-autoconf", "gpl"),
        ("apl1.1", "apl"),
        ("mit", "mit"),
        ("3com-microcode", "3com"),
        ("x11-lucent", "x"),
        ("bsd-3-clause-sun", "bsd"),
    ],
)
def test_a_family_is_the_key_up_to_its_hyphen_or_first_digit_after_a_letter(key, expected):
    assert family(key) == expected


def test_key_and_category_are_read_from_the_front_matter_and_the_text_is_what_follows():
    front = "---\nkey: some-1.0\nnotes: a note\n    category: no\ncategory: 'Public Domain'\n---\n"
    parsed = parse(front + "\nText\n---\nx\n", "some.LICENSE")
    assert (parsed.key, parsed.category, parsed.text) == ("some-1.0", "Public Domain", "Text\n---\nx")


@pytest.mark.parametrize(
    ("file", "message"),
    [("plain text", "a.LICENSE: does not start"), ("---\nkey: a\n---\ntext", "a.LICENSE: .* no 'category'")],
)
def test_a_file_without_what_is_needed_is_an_error_that_names_it(file, message):
    with pytest.raises(ValueError, match=message):
        parse(file, "a.LICENSE")


def test_licenses_is_a_text_source(licenses):
    assert isinstance(licenses, TextSource)


def test_there_are_ten_categories_in_sorted_order_and_every_text_has_one(licenses, splits):
    assert licenses.categories == (
        "CLA",
        "Commercial",
        "Copyleft",
        "Copyleft Limited",
        "Free Restricted",
        "Patent License",
        "Permissive",
        "Proprietary Free",
        "Public Domain",
        "Source-available",
    )
    labels = Counter(document.labels for split in splits.values() for document in split)
    assert set(labels) == {(index,) for index in range(LicensesOptions.label_count)}


def test_the_mit_license_is_permissive_and_its_front_matter_is_gone(licenses):
    (mit,) = (license for license in licenses.licenses if license.key == "mit")
    assert mit.category == "Permissive"
    assert mit.text.startswith("Permission is hereby granted, free of charge, to any person obtaining\n")
    assert mit.text.endswith("DEALINGS IN THE SOFTWARE.")


def test_about_14_megabytes_are_read_and_no_text_is_empty(splits):
    assert 14.0e6 < size(splits["train"]) + size(splits["validation"]) < 16.0e6
    assert all(document.text.strip() for split in splits.values() for document in split)


def test_8_to_12_percent_of_the_bytes_are_held_out(splits):
    share = size(splits["validation"]) / (size(splits["train"]) + size(splits["validation"]))
    assert 0.08 < share < 0.12


def test_a_family_never_crosses_the_splits(licenses, splits):
    of_text = {license.text: license.family for license in licenses.licenses}
    families = {split: {of_text[one.text] for one in documents} for split, documents in splits.items()}
    assert len(families["validation"]) > 100
    assert not families["train"] & families["validation"]


def test_no_text_is_in_both_splits(splits):
    assert not {document.text for document in splits["train"]} & {
        document.text for document in splits["validation"]
    }


@pytest.mark.parametrize("key", ["qwt-1.0", "mongodb-sspl-1.0", "hpnd-export-us"])
def test_copies_of_well_known_licenses_under_another_name_train(licenses, key):
    assert family(key) not in licenses.validation_families


@pytest.mark.slow
def test_less_than_half_of_each_validation_text_occurs_in_training_texts(splits):
    def runs(text):
        words = re.findall(r"\w+", text.lower())
        return {" ".join(words[at : at + RUN]) for at in range(max(1, len(words) - RUN + 1))}

    known = set().union(*(runs(document.text) for document in splits["train"]))
    for document in splits["validation"]:
        own = runs(document.text)
        assert len(own & known) < 0.5 * len(own)


def test_two_readings_give_the_same_documents_in_the_same_order(licenses, splits):
    assert list(licenses.documents("validation")) == splits["validation"]


def test_the_fingerprint_holds_the_version_of_the_package(licenses):
    assert importlib.metadata.version("licensedcode-data") in licenses.fingerprint()


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(FileNotFoundError, match="pip install licensedcode-data"):
        Licenses()


# --- copied_share ------------------------------------------------------------------------------------------


def words(first, count):
    return " ".join(f"w{number}" for number in range(first, first + count))


def test_a_copy_of_another_owner_is_copied_wholly_and_one_of_the_same_owner_not_at_all():
    texts = [words(0, 30), words(0, 30), words(100, 30), words(100, 30)]
    assert copied_share(texts, ["a", "b", "c", "c"]).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_the_share_counts_runs_of_thirteen_words():
    # 22 words have 10 runs; the first 17 of them, in another text, have 5 of these.
    assert copied_share([words(0, 22), words(0, 17)], ["a", "b"]).tolist() == [0.5, 1.0]


def test_twelve_words_in_common_are_no_copy():
    assert copied_share([words(0, 20), words(8, 40)], ["a", "b"]).tolist() == [0.0, 0.0]


def test_case_and_punctuation_do_not_hide_a_copy():
    assert copied_share(["As is; no WARRANTY!", "as is no warranty"], ["a", "b"]).tolist() == [1.0, 1.0]


def test_the_order_of_words_matters():
    forward = words(0, 13)
    assert copied_share([forward, " ".join(reversed(forward.split()))], ["a", "b"]).tolist() == [0.0, 0.0]

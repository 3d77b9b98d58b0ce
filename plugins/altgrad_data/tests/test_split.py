import hashlib

from altgrad_data.split import held_out


def test_units_are_taken_in_the_order_of_their_hashes_until_the_amount_is_reached():
    sizes = dict.fromkeys("abcdefghij", 10)
    by_hash = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert held_out(sizes, 50) == set(by_hash[:5])
    assert held_out(sizes, 51) == set(by_hash[:6])


def test_a_unit_of_more_than_a_fifth_of_the_amount_is_never_taken():
    sizes = {f"small {number}": 10 for number in range(20)} | {"large": 11}
    chosen = held_out(sizes, 50)
    assert sum(sizes[name] for name in held_out(sizes, 10_000)) == 211
    assert "large" not in chosen
    assert len(chosen) == 5


def test_the_order_of_the_mapping_does_not_matter():
    sizes = {str(number): number % 7 + 1 for number in range(300)}
    assert held_out(sizes, 100) == held_out(dict(reversed(sizes.items())), 100)


def test_units_that_do_not_suffice_are_all_taken():
    assert held_out({"a": 1, "b": 1}, 5.0) == {"a", "b"}

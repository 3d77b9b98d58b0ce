"""The benchmarks: the reference of the exactness table, planted mistakes, and both commands at tiny sizes."""

import fractions
import importlib
import itertools
import json
import math
import pathlib
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

from altgrad_core import kernels
from altgrad_formats.layout import NAMED, Layout

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
NARROW = [name for name, layout in NAMED.items() if layout.bits <= 8]
E4M3 = NAMED["E4M3"]


@pytest.fixture
def benchmark(monkeypatch):
    """Return a function that imports a module of benchmarks/, as its scripts do; forgotten afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    mine = {path.stem for path in FOLDER.glob("*.py")}
    for name in mine & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.fixture
def reference(benchmark):
    return benchmark("reference")


@pytest.fixture
def exactness(benchmark):
    return benchmark("exactness")


@pytest.fixture
def quantize(benchmark):
    return benchmark("quantize")


@pytest.fixture
def wrong_shares(exactness, reference):
    """Return a function (layout, quantizer of an array) -> the classes in which it is wrong, and how much."""
    grid = reference.magnitudes(E4M3)
    tried = reference.inputs(E4M3, 400)

    def shares(quantizer):
        scores = {
            name: exactness.scored(lambda x: torch.from_numpy(quantizer(x.numpy())), name, values, grid)
            for name, values in tried.items()
        }
        return {name: score.wrong / score.tried for name, score in scores.items() if score.wrong}

    return shares


def float32(*values):
    return np.array(values, np.float32)


def bits(values):
    return np.asarray(values, np.float32).view(np.int32).tolist()


# --- the reference ------------------------------------------------------------------------------------


def test_the_reference_lists_a_small_format_as_its_standard_does(reference):
    assert reference.magnitudes(NAMED["E2M1"]).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_the_reference_scales_fixed_point_by_its_bias(reference):
    assert (32 * reference.magnitudes(Layout(0, 3, bias=2))).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("name", "count", "smallest", "largest"),
    [
        ("E0M7", 128, 1 / 128, 127 / 128),
        ("E1M6", 128, 1 / 32, 127 / 32),
        ("E4M3", 127, 2.0**-9, 448.0),
        ("E5M2", 124, 2.0**-16, 57344.0),
        ("E7M0", 128, 2.0**-62, 2.0**64),
    ],
)
def test_the_reference_leaves_out_special_codes(reference, name, count, smallest, largest):
    grid = reference.magnitudes(NAMED[name])
    assert (len(grid), grid[1], grid[-1]) == (count, smallest, largest)


def test_the_reference_sends_ties_to_the_even_code_and_saturates(reference):
    x = float32(17, 19, -17, 2.0**-10, -(2.0**-10), 3 * 2.0**-10, 460, 1e9, -np.inf)
    expected = float32(16, 20, -16, 0.0, -0.0, 2.0**-8, 448, 448, -448)
    assert bits(reference.exact(x, reference.magnitudes(E4M3))) == bits(expected)


def test_without_mantissa_bits_the_exponent_field_is_what_is_even(reference):
    x = float32(0.75, 1.5, 3, 6)  # between the fields 62 and 63, 63 and 64, 64 and 65, 65 and 66
    assert reference.exact(x, reference.magnitudes(NAMED["E7M0"])).tolist() == [0.5, 2, 2, 8]


def test_the_reference_keeps_nan(reference):
    assert np.isnan(reference.exact(float32(np.nan), reference.magnitudes(E4M3))).all()


def nearest_by_fractions(x, grid):
    """Round |x| by looking at every value, in exact arithmetic."""
    target = abs(fractions.Fraction(float(x)))
    distances = [abs(fractions.Fraction(value) - target) for value in grid]
    nearest = [code for code, distance in enumerate(distances) if distance == min(distances)]
    return grid[next((code for code in nearest if code % 2 == 0), nearest[0])]


@pytest.mark.parametrize("name", ["E3M2", "E4M3", "E7M0"])
def test_the_reference_agrees_with_a_search_in_fractions(reference, name):
    grid = reference.magnitudes(NAMED[name])
    tried = reference.inputs(NAMED[name], 32)
    finite = np.concatenate([values for key, values in tried.items() if key not in ("NaN", "infinity")])[::41]
    expected = [nearest_by_fractions(x, grid) for x in finite]
    assert np.abs(reference.exact(finite, grid)).tolist() == expected


@pytest.mark.parametrize("name", NARROW)
def test_values_are_in_the_class_that_they_are_filed_under(reference, name):
    grid, tried = reference.magnitudes(NAMED[name]), reference.inputs(NAMED[name], 400)
    ties = {fractions.Fraction(low + high) / 2 for low, high in itertools.pairwise(grid)}
    near = {abs(fractions.Fraction(float(x))) for x in tried["near tie"]}
    assert {abs(fractions.Fraction(float(x))) for x in tried["tie"]} == ties
    assert not near & ties
    assert (np.abs(tried["overflow"]) > grid[-1]).all()
    assert np.isfinite(tried["overflow"]).all()
    assert (np.abs(tried["normal"]) <= grid[-1]).all()
    assert (reference.exact(tried["signed zero"], grid) == 0).all()


def test_there_are_no_subnormals_without_an_exponent_field(reference):
    assert len(reference.inputs(NAMED["E0M7"], 400)["subnormal"]) == 0


# --- what the table would show of a wrong quantizer ----------------------------------------------------


def test_a_quantizer_like_the_reference_is_wrong_nowhere(reference, wrong_shares):
    assert wrong_shares(lambda x: reference.exact(x, reference.magnitudes(E4M3))) == {}


def test_ties_away_from_zero_show_in_the_class_of_ties(reference, wrong_shares):
    grid = reference.magnitudes(E4M3)

    def quantizer(x):
        rounded = reference.exact(x, grid)
        beyond = reference.exact(np.nextafter(x, np.copysign(np.float32(np.inf), x)), grid)
        is_tie = np.isin(np.abs(x), (grid[:-1] + grid[1:]) / 2)
        return np.where(is_tie, beyond, rounded)

    shares = wrong_shares(quantizer)
    assert set(shares) == {"tie", "signed zero"}  # the first tie should have become a zero
    assert shares["tie"] == pytest.approx(0.5, abs=0.01)


def test_flushed_subnormals_show_in_the_class_of_subnormals(reference, wrong_shares):
    def quantizer(x):
        rounded = reference.exact(x, reference.magnitudes(E4M3))
        return np.where(np.abs(rounded) < 2.0**-6, np.copysign(np.float32(0), x), rounded)

    shares = wrong_shares(quantizer)
    assert {"subnormal", "tie", "near tie"} == set(shares)
    assert shares["subnormal"] > 0.8


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("NaN", lambda x, y: np.where(np.isnan(y), np.float32(448), y)),
        ("signed zero", lambda x, y: y + np.float32(0)),
        ("infinity", lambda x, y: np.where(np.isinf(x), x, y)),
        ("overflow", lambda x, y: np.where((np.abs(x) > 448) & np.isfinite(x), np.float32(0), y)),
        ("normal", lambda x, y: np.where(np.abs(x) == np.float32(20), np.float32(18), y)),
    ],
)
def test_each_mistake_shows_in_its_own_class(reference, wrong_shares, name, mistake):
    grid = reference.magnitudes(E4M3)
    shares = wrong_shares(lambda x: mistake(x, reference.exact(x, grid)))
    assert set(shares) == {name}


def test_a_convention_other_than_saturation_is_named_not_counted_as_an_error(exactness):
    score = exactness.Score(tried=10, wrong=10, became_inf=10)
    assert score.cell("overflow") == "inf"
    assert score.cell("normal") == "100 %"
    assert exactness.Score(tried=10, wrong=10, became_nan=5).cell("overflow") == "50 %, else NaN"


def test_only_nothing_at_all_is_written_as_zero(exactness):
    assert [exactness.share(f) for f in (0, 1e-9, 0.004, 0.5, 0.9999, 1)] == [
        *("0", "< 0.1 %", "0.4 %", "50 %", "> 99 %", "100 %")
    ]


def test_a_mistake_in_large_tensors_alone_is_seen(reference, wrong_shares):
    grid = reference.magnitudes(E4M3)
    shares = wrong_shares(lambda x: reference.exact(x, grid) + np.float32(len(x) > 10_000))
    assert set(shares) == set(reference.CLASSES) - {"NaN"}


def test_a_mistake_in_small_tensors_alone_is_seen(reference, wrong_shares):
    grid = reference.magnitudes(E4M3)
    shares = wrong_shares(lambda x: reference.exact(x, grid) + np.float32(len(x) < 10_000))
    assert set(shares) == set(reference.CLASSES) - {"NaN"}


def test_a_quantizer_that_raises_is_a_cell_that_says_so(exactness, reference):
    def quantizer(x):
        raise ValueError("no NaN, please")

    score = exactness.scored(quantizer, "NaN", float32(np.nan), reference.magnitudes(E4M3))
    assert score.cell("NaN") == "raises"
    assert "no NaN, please" in score.error


# --- our own row, and the peers ------------------------------------------------------------------------


def test_altgrad_is_wrong_nowhere(benchmark, exactness):
    found = benchmark("peers").find_all([])
    rows = exactness.rows(found, exactness.FORMATS, 2000)
    assert [row.format for row in rows] == list(exactness.FORMATS)
    for row in rows:
        assert sum(score.wrong for score in row.classes.values()) == 0, row.format
        assert all(score.tried > 0 for name, score in row.classes.items() if name != "subnormal")


def test_a_peer_is_asked_only_for_formats_that_it_expresses(benchmark):
    (_, casts) = benchmark("peers").find_all(["torch casts"])
    assert casts.call(E4M3, "nearest_even") is not None
    assert casts.call(Layout(4, 3, 7), "nearest_even") is None
    assert casts.call(E4M3, "stochastic") is None


def test_a_peer_that_cannot_be_set_up_is_a_cell_that_says_so(benchmark, exactness):
    def adapter(layout, mode, device):
        raise ImportError("cannot import name 'gone'")

    found = benchmark("peers").Peer(name="changed", module="math", adapter=adapter, settings="")
    (row,) = exactness.rows([benchmark("peers").find(found)], {"E4M3": E4M3}, 40)
    assert set(row.cells()) == {"raises"}


def test_a_missing_peer_is_a_row_with_the_reason(benchmark, exactness):
    peers = benchmark("peers")
    peer = peers.Peer(name="nobody", module="no_such_module", adapter=lambda *_: None, settings="")
    (row,) = exactness.rows([peers.find(peer)], exactness.FORMATS, 10)
    assert row.missing == "No module named 'no_such_module': pip install no_such_module"
    assert row.format is None


def test_an_unknown_peer_is_refused_with_the_names_there_are(benchmark):
    with pytest.raises(SystemExit, match=r"no peer 'qtroch'; there are: altgrad, torch casts, "):
        benchmark("peers").find_all(["qtroch"])


# --- taking turns -------------------------------------------------------------------------------------


def test_a_slow_one_leaves_when_its_time_is_spent(benchmark):
    runs = {"slow": lambda: time.sleep(0.02), "quick": int}
    base, times = benchmark("race").race(int, runs, turns=6, budget=0.03, device="cpu")
    assert (len(base), len(times["slow"]), len(times["quick"])) == (6, 3, 6)


def test_a_ratio_is_the_median_of_the_turns_ratios(benchmark):
    low, middle, high = benchmark("race").ratios([2, 6, 4], [1, 2, 1, 100])
    assert (low, middle, high) == (2.5, 3, 3.5)


def test_quantizing_with_amax_fits_the_largest_magnitude(quantize):
    x = torch.tensor([1.0, 0.3])  # the scale is 256: 76.8 lies between 72 and 80
    seen = quantize.quantize_with_amax(quantize.altgrad.get_format("E4M3"), x)
    assert seen.tolist() == [1.0, 80 / 256]


def test_compilations_are_counted_over_forty_formats_that_have_no_name(benchmark):
    layouts = {format.layout for format in benchmark("compilations").unseen_formats()}
    assert len(layouts) == 40
    assert not layouts & set(NAMED.values())
    assert {min(layout.bits for layout in layouts), max(layout.bits for layout in layouts)} == {5, 16}


def test_what_is_compiled_while_formats_are_used_is_counted(benchmark):
    kernel = torch.compile(lambda x, bits: x * bits, backend="eager", dynamic=False)

    class Format:  # compiles anew for each number of bits
        def __init__(self, bits):
            self.quantize = lambda x, *_, **__: kernel(x, bits)
            self.encode = self.decode = lambda x: x

    kernel(torch.ones(4), 0)
    seen = benchmark("compilations").counted([Format(1), Format(2), Format(3)], torch.ones(4))
    assert (seen["formats"], seen["compiled"], seen["given_up"]) == (3, 3, 0)
    assert seen["compiled_before"] > 0


# --- the commands -------------------------------------------------------------------------------------


def test_exactness_prints_json(exactness, monkeypatch, capsys):
    flags = ["--json", "--peers", "torch casts", "--formats", "E5M2", "E4M3", "--values", "400"]
    monkeypatch.setattr(sys, "argv", ["exactness.py", *flags])
    exactness.main()
    result = json.loads(capsys.readouterr().out)
    assert {"python", "torch", "processor", "date"} <= result["machine"].keys()
    assert [(row["peer"], row["format"]) for row in result["rows"]] == [
        *[("altgrad", "E5M2"), ("altgrad", "E4M3"), ("torch casts", "E5M2"), ("torch casts", "E4M3")]
    ]
    assert all(score["wrong"] == 0 for row in result["rows"][:2] for score in row["classes"].values())
    assert result["rows"][2]["classes"]["overflow"]["became_inf"] > 0


def test_exactness_prints_a_markdown_table(exactness, monkeypatch, capsys):
    flags = ["--markdown", "--peers", "--formats", "E2M1", "E4M3", "--values", "40"]
    monkeypatch.setattr(sys, "argv", ["exactness.py", *flags])
    exactness.main()
    header, rule, row, *_ = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")][1:3] == ["formats", "normal"]
    assert set(rule) == set("|-")
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["altgrad", "E2M1, E4M3", *["0"] * 8]


@pytest.mark.slow
def test_the_command_quantize_prints_every_job_and_its_target():
    flags = ["--elements", "2000", "--parameters", "5000", "--turns", "3", "--threads", "1", "--json"]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "quantize.py"), "--peers", "torch casts", "--formats", "E4M3", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    ours = [row for row in result["rows"] if row["who"] == "altgrad"]
    jobs = ["nearest_even", "stochastic", "encode", "decode", "with amax", "by its table", "50 weights"]
    assert [row["job"] for row in ours] == jobs
    for row in ours:
        assert row["ratio"] > 0
        assert row["met"] == (row["ratio"] <= row["target"])
    theirs = [row["job"] for row in result["rows"] if row["who"] == "torch casts"]
    assert theirs == ["nearest_even", "encode", "decode"]
    assert result["new"]["formats"] == 40


@pytest.fixture
def watching(benchmark, monkeypatch):
    """Return a function (flags) -> what monitors.py prints as JSON, for a model as small as can be."""
    sizes = "--n-layer 1 --n-embd 12 --block-size 8 --batch-size 1 --parameters 5000 --threads 1 --json"

    def run(capsys, flags):
        monkeypatch.setattr(sys, "argv", ["monitors.py", *sizes.split(), *flags.split()])
        before = torch.get_num_threads()
        try:
            benchmark("monitors").main()
        finally:
            torch.set_num_threads(before)
            kernels.disable()  # which a long run of a larger model has enabled
        return json.loads(capsys.readouterr().out)

    return run


def test_monitors_prints_the_share_of_each_that_is_asked_for(watching, capsys):
    result = watching(capsys, "--only flip rank position --turns 3 --step-turns 0")
    rows = {row["monitor"]: row for row in result["shares"]}
    assert {name: row["every"] for name, row in rows.items()} == {"flip": 1, "rank": 100, "position": 100}
    assert all(row["missing"] == "" and row["milliseconds"] is not None for row in rows.values())
    assert math.isfinite(result["share_together"])


def test_monitors_together_cost_what_is_due_as_often_as_it_is(benchmark, monkeypatch):
    """Every step takes a second; looking takes a tenth in each, and a second more in every tenth."""
    monitors = benchmark("monitors")
    watched = types.SimpleNamespace(
        monitors=[types.SimpleNamespace(plugin=types.SimpleNamespace(every=every)) for every in (1, 10)]
    )

    def both(plain, watched, indices, device):
        return [(1.0, 1.1 + (index % 10 == 0)) for index in indices]

    monkeypatch.setattr(monitors, "both", both)
    assert monitors.all_together(None, watched, 3, "cpu") == pytest.approx(0.1 + 1 / 10)


def test_a_monitor_that_cannot_be_measured_is_a_row_that_says_so(watching, capsys):
    result = watching(capsys, "--only wandb --turns 1 --step-turns 0")  # mirrors what others have observed
    (row,) = result["shares"]
    assert (row["monitor"], row["share"], row["missing"]) == ("wandb", None, "it observes no step")
    assert result["share_together"] == 0


@pytest.mark.slow
def test_monitors_prints_every_installed_one_and_multiples_of_adamw(watching, capsys):
    result = watching(capsys, "--turns 3 --step-turns 3")
    assert {"flip", "stall", "descent"} <= {row["monitor"] for row in result["shares"]}
    assert all((row["share"] is None) == bool(row["missing"]) for row in result["shares"])
    raced = {(row["storage"], row["who"]): row for row in result["multiples"]}
    assert len(raced) == 7
    assert ("master", "founding tracker: quantizes twice") in raced
    targets = {who for (_, who), row in raced.items() if row["target"] is not None}
    assert targets == {"flip + stall"}


# --- training ------------------------------------------------------------------------------------------


@pytest.fixture
def training(benchmark, monkeypatch, capsys):
    """Return a function (flags) -> what train.py prints as JSON, for a model as small as can be."""
    sizes = "--n-layer 2 --n-head 1 --n-embd 16 --block-size 8 --threads 1 --turns 3 --json"

    def run(flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *sizes.split(), *flags.split()])
        before = torch.get_num_threads()
        try:
            benchmark("train").main()
        finally:
            torch.set_num_threads(before)
            kernels.disable()  # which a long run of a larger model has enabled
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def nanogpt(tmp_path):
    """A folder whose model.py has upstream's names: this repository's GPT under them."""
    (tmp_path / "model.py").write_text(
        "import types, torch\nfrom altgrad_core import model\n"
        "from altgrad_core.model_options import ModelOptions\n"
        "def GPTConfig(vocab_size, **options):\n"
        "    return types.SimpleNamespace(vocab_size=vocab_size, options=ModelOptions(**options))\n"
        "class GPT(model.GPT):\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config.options, config.vocab_size, torch.Generator())\n"
        "    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):\n"
        "        groups = [{'params': list(self.parameters()), 'weight_decay': weight_decay}]\n"
        "        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)\n"
    )
    return tmp_path


def test_train_races_every_arm_and_upstream_at_every_batch_size(training, nanogpt):
    rows = training(f"--only steps --batch-sizes 1 2 --upstream {nanogpt}")["steps"]
    arms = [
        "unquantized",
        "unquantized, again",
        "upstream nanoGPT",
        "upstream nanoGPT, AdamW fused",
        "weights",
        "weights on the grid",
        "weights, activations, gradients",
    ]
    assert sorted((row["batch_size"], row["who"]) for row in rows) == [
        (n, who) for n in (1, 2) for who in arms
    ]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(8 * row["batch_size"] / row["seconds"])
        assert (row["ratio"] is None) == (row["who"] == "unquantized")
    assert {row["who"]: row["target"] for row in rows if row["target"]} == {
        "weights": 1.1,
        "weights, activations, gradients": 1.5,
        "upstream nanoGPT": 1.0,
    }


def test_a_slower_upstream_meets_its_target_and_a_slower_arm_does_not(benchmark):
    rows = benchmark("train").rows
    slow = {"weights": [2.0, 2.4, 2.2], "upstream nanoGPT": [2.0, 2.4, 2.2]}
    plain, *others = rows([1.0, 1.2, 1.1], slow, batch_size=1, tokens=11, device="cpu")
    assert (plain.who, plain.tokens_per_second, plain.ratio, plain.met) == ("unquantized", 10.0, None, None)
    found = {row.who: (row.ratio, row.tokens_per_second, row.met) for row in others}
    assert found == {"weights": (2.0, 5.0, False), "upstream nanoGPT": (2.0, 5.0, True)}


def test_the_memory_of_quantized_weights_is_one_copy_of_them_and_that_of_stored_ones_none(training):
    rows = {row["who"]: row for row in training("--only memory --batch-sizes 1 --n-embd 48")["memory"]}
    assert len(rows) == 6
    parameters = 2 * 12 * 48**2 + (256 + 8 + 5) * 48
    assert {row["parameters"] for row in rows.values()} == {parameters}
    more = {who: row["extra_per_parameter"] for who, row in rows.items()}
    assert more["weights"] == pytest.approx(4 * 2 * 12 * 48**2 / parameters, abs=0.1)
    assert more["weights on the grid"] == pytest.approx(0, abs=0.1)
    assert 0 < more["weights on the grid, flips"] <= 1.1
    assert rows["unquantized"]["bytes"] > 16 * parameters  # weights, gradients, two moments


def test_the_most_that_was_held_follows_from_allocations(benchmark):
    memory = benchmark("train_memory")
    with memory.silent_profiler() as profiled:
        one = torch.zeros(1000)
        other = torch.zeros(500)
        del one
        other = torch.cat([other, other])
        del other
    assert memory.most_held(profiled) == pytest.approx(6000, abs=100)


@pytest.mark.slow  # nine processes, three of which import torch
def test_train_times_the_commands_and_the_way_to_the_first_step(training, tmp_path):
    path = tmp_path / "e.toml"
    path.write_text(
        "name = 'e'\n[data]\nplugin = 'markov'\ntokens = 4000\n[train]\nbatch_size = 1\neval_batches = 1\n"
        "[model]\nn_layer = 1\nn_head = 1\nn_embd = 16\nblock_size = 8\n"
    )
    rows = {row["command"]: row for row in training(f"--only starts --experiment {path}")["starts"]}
    assert list(rows) == ["altgrad plugins", "altgrad-run --check", "altgrad-run, to the first step"]
    assert rows["altgrad-run, to the first step"]["seconds"] > rows["altgrad plugins"]["seconds"] > 0
    assert [row["target"] for row in rows.values()] == [0.4, 0.4, 6.0]
    assert [row["cpu_seconds"] is None for row in rows.values()] == [False, False, True]


def test_a_run_that_never_gets_to_its_first_step_is_said(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="altgrad-run ended before its first step"):
        benchmark("starting").seconds_to_first_step(tmp_path / "none.toml", "cpu")

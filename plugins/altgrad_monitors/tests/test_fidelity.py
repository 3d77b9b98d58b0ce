"""Fidelity of gradients: hand-computed products, and what a small model makes of them."""

import math

import pytest
import torch

from altgrad_core.extra_pass import extra_passes, gradients, micro_batches
from altgrad_monitors import FidelityOptions
from altgrad_monitors.fidelity import Fidelity, cosine, products, snr_db


def of(g, r):
    return [products(torch.tensor(g).double(), torch.tensor(r).double())]


@pytest.mark.parametrize(
    ("g", "r", "cosines", "decibels"),
    [
        ([3.0, 4.0], [3.0, 4.0], 1.0, math.inf),
        ([0.3, 0.1], [0.3, 0.1], 1.0, math.inf),
        ([6.0, 8.0], [3.0, 4.0], 1.0, 0.0),  # twice as long: the cosine does not see it
        ([-3.0, -4.0], [3.0, 4.0], -1.0, 10 * math.log10(25 / 100)),
        ([4.0, -3.0], [3.0, 4.0], 0.0, 10 * math.log10(25 / 50)),
        ([11.0, 0.0], [10.0, 0.0], 1.0, 20.0),
        ([0.0, 0.0], [3.0, 4.0], math.nan, 0.0),
        ([3.0, 4.0], [0.0, 0.0], math.nan, -math.inf),
        ([0.0, 0.0], [0.0, 0.0], math.nan, math.nan),
        ([math.nan, 4.0], [3.0, 4.0], math.nan, math.nan),
    ],
)
def test_cosine_and_signal_to_noise_ratio_by_hand(g, r, cosines, decibels):
    assert float(cosine(of(g, r))) == pytest.approx(cosines, abs=1e-15, nan_ok=True)
    assert float(snr_db(of(g, r))) == pytest.approx(decibels, nan_ok=True)


def test_layers_together_count_by_the_size_of_their_gradients():
    pair = of([10.0], [10.0]) + of([-1.0], [1.0])
    assert float(cosine(pair)) == pytest.approx((100 - 1) / (100 + 1))
    assert float(snr_db(pair)) == pytest.approx(10 * math.log10(101 / 4))


def test_a_model_that_nothing_quantizes_is_its_own_reference(run_of, observed):
    seen = observed(Fidelity(FidelityOptions()), run_of())
    assert {value for name, value in seen.items() if "/cosine/" in name} == {1.0}
    assert {value for name, value in seen.items() if "/snr_db/" in name} == {math.inf}


def test_the_reference_has_no_autocast(run_of, observed):
    seen = observed(Fidelity(FidelityOptions()), run_of(autocast=True))
    assert 20 < seen["fidelity/snr_db/total"] < 60  # bfloat16 rounds to 8 bits: some 50 dB at each operation


def test_it_compares_the_gradients_of_the_coming_step_at_the_weights_as_they_are(run_of, observed):
    run = run_of("E4M3", "E4M3", "E5M2")
    name = "transformer.h.0.mlp.c_fc.weight"
    batches, parameter = list(micro_batches(run, 6)), [run.model.get_parameter(name)]
    assert len(batches) == 2
    with extra_passes(run) as loss_of:
        (g,) = gradients(loss_of, parameter, batches)
    with extra_passes(run, float32=True) as loss_of:
        (r,) = gradients(loss_of, parameter, batches)
    seen = observed(Fidelity(FidelityOptions()), run, index=6)
    layer = name.removesuffix(".weight")
    expected = torch.nn.functional.cosine_similarity(g.double().flatten(), r.double().flatten(), dim=0)
    assert seen[f"fidelity/cosine/{layer}"] == pytest.approx(float(expected), rel=1e-12)
    ratio = r.double().square().sum() / (g.double() - r.double()).square().sum()
    assert seen[f"fidelity/snr_db/{layer}"] == pytest.approx(10 * math.log10(float(ratio)), rel=1e-9)


def test_fewer_bits_are_less_faithful(run_of, observed):
    fine, coarse = (
        observed(Fidelity(FidelityOptions()), run_of("E4M3", flow, flow))["fidelity/snr_db/total"]
        for flow in ("E4M3", "E5M2")
    )
    assert 10 < coarse < fine - 3  # a bit of mantissa less: twice the error, 6 dB, of what the flows add


def test_weight_and_bias_of_a_layer_are_one(run_of, observed):
    run, layer = run_of("E4M3", model={"bias": True}), "transformer.h.0.mlp.c_fc"
    both = [run.model.get_parameter(f"{layer}.{name}") for name in ("weight", "bias")]
    rows = []
    for float32 in (False, True):
        with extra_passes(run, float32=float32) as loss_of:
            found = gradients(loss_of, both, list(micro_batches(run, 1)))
        rows.append(torch.cat([one.double().flatten() for one in found]))
    seen = observed(Fidelity(FidelityOptions(layers=layer)), run)
    expected = torch.nn.functional.cosine_similarity(*rows, dim=0)
    assert seen[f"fidelity/cosine/{layer}"] == pytest.approx(float(expected), rel=1e-12)
    assert seen[f"fidelity/cosine/{layer}"] == seen["fidelity/cosine/total"]
    assert len(seen) == 4


def test_a_gradient_that_is_not_finite_is_not_called_faithful(run_of, observed):
    run = run_of("E4M3")
    with torch.no_grad():
        run.model.transformer.ln_f.weight[0] = math.nan
    seen = observed(Fidelity(FidelityOptions()), run)
    assert math.isnan(seen["fidelity/cosine/total"])
    assert math.isnan(seen["fidelity/snr_db/total"])


def test_layers_and_types_can_be_chosen(run_of, observed):
    options = FidelityOptions(layers=r".*attn.*", per="type")
    seen = observed(Fidelity(options), run_of("E4M3"))
    assert {name.rpartition("/")[2] for name in seen} == {"attention", "attention_output", "total"}
    assert observed(Fidelity(FidelityOptions(layers="none of them")), run_of("E4M3")) == {}

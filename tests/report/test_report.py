"""Records, figures and report, drawn from results.json alone."""

import copy
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.algebra.fronts import FREE_REFERENCE
from sst_lightning.algebra.safety_tax import NOT_SIGNIFICANT, ZERO_REFERENCE
from sst_lightning.report.figures import (
    _singles,
    all_figures,
    kept_energy,
    plane,
    slug,
    spectrum,
)
from sst_lightning.report.model_card import model_card
from sst_lightning.report.records import check_records, read_records, write_records
from sst_lightning.report.report import headline, log_figures, write_report
from sst_lightning.report.tables import format_entry
from tests.report.synthetic import MODULES, ROWS, records, scores

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def made():
    return records()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Written from what was read back from the file, with names that are awkward in paths."""
    folder = tmp_path_factory.mktemp("report")
    write_records([*records("A6 + A7"), *records("both")], folder / "results.json")
    content = read_records(folder / "results.json")
    assert write_report(content, folder / "out", "A <title>") == folder / "out" / "report.md"
    return folder / "out"


# Records.


def by_model(content, ending):
    (record,) = [r for r in content if r["model"].endswith(ending)]
    return record


def test_metrics_are_what_the_scores_say(made):
    sst = by_model(made, "sst_soft α=1")["metrics"]
    assert sst["attack_refusal_rate"]["value"] == 0.9
    assert sst["attack_refusal_rate"]["n"] == ROWS
    assert sst["over_refusal_rate"]["value"] == 0.1
    assert sst["utility_nll_increase"]["value"] == pytest.approx(0.08)
    assert sst["utility_exact_match"]["value"] == 0.25
    assert sst["utility_contains"]["value"] == 0.5
    assert sst["utility_drop_rate"]["value"] == pytest.approx(0.02 / 0.8)
    assert sst["safety_gain_rate"]["value"] == pytest.approx(8)
    assert sst["safety_tax"]["value"] == pytest.approx(0.02 / 0.8 / 8)
    assert sst["safety_tax_absolute"]["value"] == pytest.approx(0.02 / 0.8)
    assert sst["alignment_drift"]["value"] == pytest.approx(0.1)
    assert "safety_tax" not in by_model(made, "base")["metrics"]


def test_the_comparison_finds_the_fifth(made):
    metrics = by_model(made, "against task_arithmetic")["metrics"]
    assert metrics["cost_ratio_at_equal_refusal"]["value"] == pytest.approx(0.2, rel=1e-6)
    assert metrics["over_refusal_difference_at_equal_refusal"]["value"] < 0


def test_merges_are_tested_against_the_utility_model_and_corrected(made):
    """Refused attacks of 40: 4 by the utility model, 20 or 36 by the merges; all nested."""
    expected = {0.5: binomtest(0, 16).pvalue, 1.0: binomtest(0, 32).pvalue}
    merges = [r for r in made if "alpha" in r["parameters"]]
    p_values = [expected[r["parameters"]["alpha"]] for r in merges]
    harmless = [r["metrics"]["over_refusal_increase"]["p"] for r in merges]
    adjusted = multipletests([*p_values, *harmless], method="holm")[1][:4]
    assert len(merges) == 4
    for record, p, p_holm in zip(merges, p_values, adjusted, strict=True):
        entry = record["metrics"]["attack_refusal_gain"]
        assert (entry["p"], entry["p_holm"]) == pytest.approx((p, p_holm))
    over = by_model(made, "task_arithmetic α=1")["metrics"]["over_refusal_increase"]
    assert over["p"] == pytest.approx(binomtest(0, 10).pvalue)
    assert all("p" not in entry for entry in by_model(made, "base")["metrics"].values())


def test_only_merges_that_nothing_beats_are_on_the_front(made):
    """SST refuses what task arithmetic does, at a fifth of the cost and of the over-refusal."""
    shares = {
        r["model"]: r["metrics"].get("front_probability", {}).get("value")
        for r in made
        if r["method"] != "comparison"
    }
    assert shares == {
        "base": None, "A6": None, "A7": None,
        "A6+A7 sst_soft α=0.5": 1, "A6+A7 sst_soft α=1": 1,
        "A6+A7 task_arithmetic α=0.5": pytest.approx(0, abs=0.01),
        "A6+A7 task_arithmetic α=1": pytest.approx(0, abs=0.01),
    }  # fmt: skip


def test_several_utility_tasks_are_reported_together_and_alone():
    metrics = records("A5+A6+A7", ("a5", "a6"))[0]["metrics"]
    assert {"utility_nll", "utility_a5_nll", "utility_a6_nll"} <= set(metrics)
    assert metrics["utility_nll"]["n"] == 2 * ROWS


def test_attacks_and_their_answers_are_never_quoted(made):
    assert {quote["kind"] for r in made for quote in r.get("generations", [])} == {
        "utility",
        "harmless",
    }
    assert "ATTACK" not in json.dumps(made)


def test_a_gain_that_is_not_significant_is_a_note(made):
    entry = {"value": None, "low": None, "high": None, "n": 9, "note": NOT_SIGNIFICANT}
    assert format_entry(entry, 2) == NOT_SIGNIFICANT
    assert format_entry(None, 2) == "–"
    assert format_entry({"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}, 2) == "0.50 [0.25, 0.75]"
    json.dumps(made, allow_nan=False)
    assert ZERO_REFERENCE != NOT_SIGNIFICANT


def test_records_round_trip(made, tmp_path):
    write_records(made, tmp_path / "results.json")
    assert read_records(tmp_path / "results.json") == json.loads(json.dumps(made))


def drop(key):
    return lambda r: r.pop(key)


def put(*path_and_value):
    *path, last, value = path_and_value

    def change(record):
        for key in path:
            record = record[key]
        record[last] = value

    return change


RATE = ("metrics", "attack_refusal_rate")
FINE = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("model"), "record 1: key 'model'"),
        (drop("metrics"), "key 'metrics'"),
        (put("parameters", []), "key 'parameters' is missing or not a dict"),
        (put(*RATE, {"value": 1}), "needs value, low, high and n"),
        (put(*RATE, "low", float("nan")), "finite"),
        (put(*RATE, "value", "0.5"), "finite numbers"),
        (put(*RATE, "value", None), "all null"),
        (put(*RATE, {"value": None, "low": None, "high": None, "n": 3}), "with a note"),
        (put(*RATE, "n", None), "number of examples"),
        (put(*RATE, "n", -1), "number of examples"),
        (put("model", "base"), "two models 'base'"),
        (put(*RATE, "p", 0.2), "p and p_holm come together"),
        (put(*RATE, {**FINE, "p": 0.2, "p_holm": 0.1}), "p <= p_holm"),
        (put(*RATE, {**FINE, "p": "0", "p_holm": "1"}), "p and p_holm"),
    ],
)
def test_records_that_break_the_schema_are_named(made, tmp_path, change, words):
    content = copy.deepcopy(made)
    change(content[1])
    with pytest.raises(SSTMergeError, match=words):
        write_records(content, tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{}", "[1]", "\xff"])
def test_files_that_are_no_records(tmp_path, content):
    path = tmp_path / "results.json"
    with pytest.raises(SSTMergeError, match=r"results\.json"):
        read_records(path)
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(SSTMergeError, match=r"results\.json"):
        read_records(path)


def test_an_empty_list_is_fine():
    check_records([], "x")


# Report.


def test_markdown_shows_every_figure_of_its_setting_once(report):
    text = (report / "report.md").read_text()
    images = re.findall(r"!\[[^]]*\]\((figures/[^)]+)\)", text)
    assert sorted(images) == sorted(f"figures/{p.name}" for p in (report / "figures").iterdir())
    assert len(images) == 6
    for image in images:
        assert (report / image).read_bytes().startswith(PNG)
    sections = text.split("\n## ")
    assert sections[1].startswith("A6 + A7")
    assert sections[1].count("figures/a6-a7-") == 3


def test_markdown_has_tables_headline_and_provenance(report):
    text = (report / "report.md").read_text()
    assert "| model | utility NLL |" in text
    for name in ("base", "A6 + A7 sst&#95;soft α=1", "both task&#95;arithmetic α=0.5"):
        assert f"| {name} |" in text
    assert "**20 %**" in text
    assert '"seed": 0' in text
    assert "0.90 [" in text


def test_table_marks_rates_that_differ_from_the_utility_models(report):
    lines = (report / "report.md").read_text().splitlines()
    header = next(line for line in lines if line.startswith("| model |")).split(" | ")
    columns = [header.index(name) for name in ("refuses attacks", "over-refusal", "on the front")]

    def cells(model):
        line = next(line for line in lines if line.startswith(f"| A6 + A7 {model} |"))
        return [line.split(" | ")[column] for column in columns]

    attacks, harmless, front = cells("sst&#95;soft α=1")
    assert attacks.endswith("] †")
    assert harmless.endswith("]")
    assert front.startswith("1.00 [")
    assert cells("task&#95;arithmetic α=1")[1].endswith("] †")
    base = next(line for line in lines if line.startswith("| base |"))
    assert "†" not in base
    assert sum("†: differs from the utility model" in line for line in lines) == 2


def test_html_is_one_file_that_fetches_nothing(report):
    page = (report / "report.html").read_text()
    sources = re.findall(r'<img[^>]* src="([^"]+)"', page)
    assert len(sources) == 6
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r'(?:src|href)="?http|@import|<script|<link', page)
    assert "<title>A &lt;title&gt;</title>" in page
    assert page.count("<table>") >= 4


def test_generated_text_is_shown_as_it_is(report):
    page = (report / "report.html").read_text()
    assert "<b>bold" not in page
    assert "<em>Seine" not in page
    cell = "The river &#42;Seine&#42; &#124; &#33;&#91;x&#93;(http://e.x/y.png)"
    assert cell in (report / "report.md").read_text()


def test_headline_says_why_there_is_no_figure(made):
    record = copy.deepcopy(by_model(made, "against task_arithmetic"))
    for entry in record["metrics"].values():
        entry.update(value=None, low=None, high=None, note="undefined (no common range)")
    assert "no common range" in headline(record)


def test_headline_gives_the_difference_where_the_reference_is_free(made):
    record = copy.deepcopy(by_model(made, "against task_arithmetic"))
    record["metrics"]["cost_ratio_at_equal_refusal"] = {
        "value": None,
        "low": None,
        "high": None,
        "n": 3,
        "note": FREE_REFERENCE,
    }
    difference = record["metrics"]["cost_difference_at_equal_refusal"]["value"]
    assert f"{difference:+.3f} nats per token" in headline(record)
    assert FREE_REFERENCE in headline(record)


def test_report_of_one_adapter_alone(tmp_path):
    content = records()[:1]
    text = write_report(content, tmp_path, "T").read_text()
    assert "| base |" in text
    assert "figures/" not in text


def test_two_settings_with_the_same_file_names_are_refused():
    with pytest.raises(SSTMergeError, match="same file names"):
        all_figures([*records("A6+A7"), *records("a6 a7")])
    assert slug("A6 + A7!") == "a6-a7"


def test_tensorboard_has_figures_and_curves(made, tmp_path):
    log_figures(made, tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert len(events.Tags()["images"]) == 3
    (tag,) = [t for t in events.Tags()["scalars"] if "sst_soft/attack_refusal_rate (" in t]
    assert [(e.step, round(e.value, 3)) for e in events.Scalars(tag)] == [(500, 0.5), (1000, 0.9)]


# Figures.


def test_labels_of_models_outside_of_the_plane_are_not_on_top_of_each_other():
    _, axis = plt.subplots()
    axis.set_xlim(0, 1)
    _singles(axis, [("base", 3.0, 0.02), ("A7", 2.0, 0.0), ("A8", 4.0, 0.9)], cut=True)
    heights = {text.get_text(): text.xy[1] for text in axis.texts}
    plt.close()
    expected = {"A7 at 2.00 →": 0.0, "base at 3.00 →": 0.06, "A8 at 4.00 →": 0.9}
    assert heights == pytest.approx(expected)


def test_plane_shows_paired_cost_and_every_model(made):
    axes = plane(made, "A6+A7").axes
    curves = [np.asarray(c[0].get_xdata(), float) for c in axes[0].containers]
    np.testing.assert_allclose(curves[0], [0.04, 0.08], atol=1e-9)
    np.testing.assert_allclose(curves[1], [0.2, 0.4], atol=1e-9)
    texts = [text.get_text() for text in axes[0].texts]
    assert {"A6", "base at 0.90 →", "A7 at 1.50 →"} <= set(texts)
    assert {"base, A6", "A7"} <= {text.get_text() for text in axes[1].texts}
    (star,) = [line for line in axes[0].lines if line.get_marker() == "*"]
    assert star.get_xdata()[0] == pytest.approx(0, abs=1e-9)
    for axis in axes:
        low, high = axis.get_xlim()
        for line in [line for line in axis.lines if line.get_marker() == "*"]:
            assert low < line.get_xdata()[0] < high


def test_kept_energy_is_arranged_by_layer_and_module(made):
    (image,) = kept_energy(made, "A6+A7").axes[0].images
    expected = (np.arange(len(MODULES)) + 1).reshape(4, 2) / 10
    np.testing.assert_allclose(np.asarray(image.get_array()), expected)


def test_spectrum_shows_both_curves(made):
    axis = spectrum(made, "A6+A7").axes[0]
    assert [list(line.get_ydata()) for line in axis.lines[:2]] == [[8.0, 2.0, 0.5], [3.0, 1.5, 0.6]]
    assert spectrum(made[:3], "A6+A7") is None
    assert kept_energy(made[:3], "A6+A7") is None


def test_figures_open_no_window_and_leave_nothing_open(made):
    before = plt.get_fignums()
    all_figures(made)
    assert plt.get_fignums() == before


def test_scores_of_a_shorter_set_are_not_compared():
    assert scores(0, 0.5, 0.5).array(["a5"], "nll").size == 0


def test_model_card_names_the_base_only_if_it_is_a_hub_id():
    recipe = {
        "method": "sst", "parameters": {}, "utility": ["u"], "safety": "s", "base_model": "a/b",
    }  # fmt: skip
    assert model_card(recipe).startswith("---\nbase_model: a/b\n")
    assert "base_model:" not in model_card({**recipe, "base_model": "/local/folder"})

"""The side-by-side table: cells, bars, losses and picture, from made-up rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_rows import row

from tools.bench import plot, tables
from tools.bench.bars import bars, bars_at_four_bits, losses, usage


def test_cells_stand_under_their_headings() -> None:
    headings, (line,) = tables.grid([row("onnxq", "int8", cpu=1.5, perplexity=21.25)])
    assert dict(zip(headings, line, strict=True)) == {
        "model": "minilm",
        "tool": "onnxq",
        "recipe": "int8",
        "s": "3.0",
        "CPU s": "1.5",
        "peak MB": "100",
        "size": "0.40",
        "SNR dB": "20.0",
        "cosine": "0.9900",
        "perplexity": "21.25",
        "loads in ORT": "yes",
        "lint": "3",
        "compiles": "yes",
        "8-bit FLOPs": "90.0 %",
        "attention": "6 of 6 fused",
    }


def test_a_column_in_which_nothing_stands_is_left_out() -> None:
    headings, _ = tables.grid([row("onnxq", "int8"), row("floor", "forward")])
    assert "perplexity" not in headings and "SNR dB" in headings


def cell(made: tables.Row, heading: str) -> str:
    return dict(zip(tables.HEADINGS, tables.cells(made), strict=True))[heading]


def test_what_went_wrong_is_said_in_the_cells() -> None:
    assert cell(row("nncf", "int8", failed="AssertionError"), "loads in ORT") == "fails"
    assert cell(row("nncf", "int8", snr=None), "SNR dB") == "NaN"
    assert cell(row("nncf", "int8", perplexity=None), "perplexity") == "NaN"
    unloaded = row("nncf", "int8", loads="no")
    assert (cell(unloaded, "SNR dB"), cell(unloaded, "loads in ORT")) == ("", "no")
    refused = row("nncf", "int8", share=None)
    assert (cell(refused, "compiles"), cell(refused, "8-bit FLOPs")) == ("no", "0")
    assert cell(row("floor", "forward"), "compiles") == ""
    unread = row("nncf", "int8")
    unread["linted"] = {"findings": None, "reason": "no model"}
    assert cell(unread, "lint") == "?"


def test_attention_that_is_two_products_is_not_fused() -> None:
    made = row("modelopt", "int8")
    made["compiled"]["products"] = {"attention": {"int8 gemms": 4, "fused fp16": 2}}
    assert cell(made, "attention") == "2 of 6 fused"


def test_a_perplexity_beyond_all_bounds_stays_short() -> None:
    assert cell(row("modelopt", "int8", perplexity=1308638840257616384.0), "perplexity") == (
        "1.30864e+18"
    )


def test_exact_outputs_are_infinitely_good() -> None:
    exact = row("onnxq", "int8")
    exact["outputs"]["snr"] = "inf"  # JSON has no number for it
    assert cell(exact, "SNR dB") == "inf"


def test_the_notes_give_every_reason() -> None:
    failed = row("nncf", "int8", failed="AssertionError")
    changed = row("modelopt", "int8", loads="fusion off", share=None)
    changed["input_changed"] = True
    lesser = row("onnxruntime", "int8")
    lesser["compiled"]["missed"] = 30
    lesser["linted"]["severities"] = {"refused": 1, "portability": 2}
    assert tables.notes([row("onnxq", "int8"), failed, changed, lesser]) == [
        "minilm nncf int8 fails: AssertionError",
        "minilm modelopt int8 changed its input file",
        "minilm modelopt int8, ONNX Runtime: no kernel",
        "minilm modelopt int8, sm89: Int32 is no type",
        "minilm onnxruntime int8, sm89: 30 products do not run as the file means them to",
        "minilm onnxruntime int8, lint: 1 refused, 2 portability",
    ]


def test_medians_over_the_rounds() -> None:
    made = row("onnxq", "int8")
    made["runs"] = [{"cpu": c, "peak": 0, "wall": 0} for c in (9.0, 1.0, 2.0)]
    assert usage(made, "cpu") == 2.0


def judged(*rows: tables.Row) -> dict[str, tuple[str, bool | None]]:
    return {bar.what: (bar.measured, bar.reached) for bar in bars(rows)}


def test_bars_hold_us_against_the_best_of_modelopts_recipes() -> None:
    found = judged(
        row("onnxq", "int8", cpu=1.0, peak=100e6, snr=12.0),
        row("modelopt", "int8", cpu=9.0, peak=290e6, snr=3.0),
        row("modelopt", "int8-max", cpu=6.0, peak=1400e6, snr=10.0, share=None),
        row("modelopt", "int8-per-node", cpu=0.1, peak=1.0, failed="AssertionError"),
        row("modelopt", "fp8", cpu=0.1, peak=1.0, snr=90.0),
        row("nncf", "int8", cpu=0.1, peak=1.0, snr=90.0),
        row("modelopt", "int8", model="ppocr", cpu=0.1, peak=1.0, snr=90.0),
    )
    assert found == {
        "minilm int8: CPU time": ("6.0 x less", True),
        "minilm int8: peak memory": ("0.34 x", False),
        "minilm int8: works": (
            "compiles, loads: yes; theirs: compiles, loads: yes | does not compile, loads: yes",
            True,
        ),
        "minilm int8: error": ("SNR 12.0 dB; theirs 10.0", True),
    }


def test_bars_that_are_missed() -> None:
    ours = row("onnxq", "fp8", model="smollm2", cpu=1.0, perplexity=22.0, loads="fusion off")
    theirs = row("modelopt", "fp8", model="smollm2", cpu=4.9, perplexity=21.0)
    found = judged(ours, theirs)
    assert [reached for _, reached in found.values()] == [False, False, False, False]
    assert found["smollm2 fp8: error"][0] == "perplexity 22.000; theirs 21.000; full 20.000"


def test_an_equal_error_is_not_better() -> None:
    found = judged(row("onnxq", "int8", snr=10.0), row("modelopt", "int8", snr=10.0))
    assert found["minilm int8: error"][1] is False


@pytest.mark.parametrize(
    ("ours", "theirs", "reached"), [(30.0, None, True), (None, 30.0, False), (30.0, 30.0, False)]
)
def test_nan_is_the_worst(ours: float | None, theirs: float | None, reached: bool) -> None:
    found = judged(
        row("onnxq", "int8", model="smollm2", perplexity=ours),
        row("modelopt", "int8", model="smollm2", perplexity=theirs),
    )
    assert found["smollm2 int8: error"][1] is reached
    missing = None in (ours, theirs)
    assert ("NaN or not run" in found["smollm2 int8: error"][0]) is missing


def test_a_peer_whose_output_does_not_load_has_no_error_to_beat() -> None:
    theirs = row("modelopt", "int8", loads="no")
    assert judged(row("onnxq", "int8"), theirs)["minilm int8: error"][1] is True


def test_no_bars_without_both_sides() -> None:
    assert bars([row("onnxq", "int8"), row("modelopt", "int8", failed="no")]) == []


def at_four_bits(**figures: float) -> list[tables.Row]:
    """Ours in INT4, each recipe with its SNR, or of SmolLM2 its perplexity."""
    made = []
    for name, value in figures.items():
        model, _, recipe = name.partition("_")
        measure = {"snr": value} if model == "minilm" else {"snr": 9.0, "perplexity": value}
        made.append(row("onnxq", f"int4-{recipe}", model=model, cpu=2.0, **measure))
        made[-1].pop("compiled"), made[-1].pop("linted")
    return made


def test_bars_at_four_bits() -> None:
    """Perplexity 20 in full: rounded to nearest loses ln 1.5, the best ln 1.2, 0.45 of it."""
    rows = at_four_bits(
        minilm_rtn=10.0, minilm_awq=11.0, minilm_gptq=13.4, minilm_best=15.0,
        smollm2_rtn=30.0, smollm2_awq=28.0, smollm2_gptq=26.0, smollm2_best=24.0,
    )  # fmt: skip
    rows += [
        row("modelopt", "int4-awq-lite", snr=14.9, cpu=1.0, failed="it could not fold"),
        row("modelopt", "int4-awq-lite-unfused", snr=14.9, cpu=19.8),
        row("onnxsim", "int4-gptq", model="smollm2", perplexity=23.0),
        row("onnxruntime", "int4-gptq", model="smollm2", failed="stopped"),
    ]
    assert {bar.what: (bar.measured, bar.reached) for bar in bars_at_four_bits(rows)} == {
        "minilm int4-gptq: SNR over int4-rtn's": ("+3.40 dB", False),
        "minilm int4-best: SNR over int4-rtn's": ("+5.00 dB", True),
        "minilm int4-best: error": ("SNR 15.0 dB; theirs 14.9", True),
        "minilm: CPU time of AWQ, against ModelOpt's awq_lite": ("9.9 x less", False),
        "smollm2 int4-best: log perplexity lost, of int4-rtn's": ("0.45", True),
        "smollm2 int4-best: error": ("perplexity 24.000; theirs 23.000; full 20.000", False),
    }
    assert bars_at_four_bits([r for r in rows if r["recipe"] != "int4-rtn"]) == []


def test_a_table_without_compiling_has_no_columns_for_it() -> None:
    rows = at_four_bits(minilm_rtn=10.0)
    headings, _ = tables.grid(rows)
    assert "SNR dB" in headings and not {"lint", "compiles", "8-bit FLOPs"} & set(headings)
    assert losses([*rows, row("onnxsim", "int4-rtn", snr=12.0, share=None, cpu=3.0)]) == [
        "minilm int4-rtn, SNR dB: 10.0; onnxsim int4-rtn 12.0 (does not compile)"
    ]


def test_losses_name_who_is_better_and_whether_that_compiles() -> None:
    rows = [
        row("onnxq", "int8", snr=12.0, size=39, share=0.95),
        row("nncf", "int8-transformer", snr=17.0, size=26, cpu=5.0, share=None),
        row("modelopt", "int8", snr=3.0, size=50, share=1.0, peak=900e6),
        row("onnxsim", "int8-dynamic", snr=99.0, size=1, cpu=0.1, peak=1.0),
        row("onnxsim", "fp8", snr=99.0, size=1, cpu=0.1, peak=1.0),
        row("nncf", "int8", model="smollm2", snr=99.0, size=1, cpu=0.1, peak=1.0),
        row("floor", "forward", cpu=0.1),
    ]
    assert losses(rows) == [
        "minilm int8, file, of the original's size: 0.39; "
        "nncf int8-transformer 0.26 (does not compile)",
        "minilm int8, SNR dB: 12.0; nncf int8-transformer 17.0 (does not compile)",
        "minilm int8, 8-bit share of FLOPs: 0.950; modelopt int8 1.000",
    ]


def test_losses_of_dynamic_recipes_are_to_dynamic_ones() -> None:
    rows = [row("onnxq", "int8-dynamic", snr=12.0), row("onnxsim", "int8-dynamic", snr=13.0)]
    assert losses(rows) == ["minilm int8-dynamic, SNR dB: 12.0; onnxsim int8-dynamic 13.0"]


def test_the_page_has_all_of_it() -> None:
    rows = [row("onnxq", "int8", snr=12.0), row("modelopt", "int8", snr=15.0, loads="fusion off")]
    rows[1]["outputs"]["reason"] = "a | b"
    rows.append(row("modelopt", "int8-max", snr=1.0))
    page = tables.markdown("the command", "the machine", ["onnxq: 1"], rows, bars(rows))
    for expected in (
        "    the command\n",
        "the machine",
        "onnxq: 1",
        "| minilm | onnxq | int8 | 2.0 | 1.0 | 100 | 0.40 | 12.0 | 0.9900 | yes | 3 | yes |",
        "| minilm int8: CPU time | 1.0 x less | >= 5 x less | **no** |",
        "- minilm int8, SNR dB: 12.0; modelopt int8 15.0",
        "- minilm modelopt int8, ONNX Runtime: a | b",
    ):
        assert expected in page
    bar_lines = [line for line in page.splitlines() if line.startswith("| minilm int8")]
    assert len(bar_lines) == 4
    assert {line.replace("\\|", "").count("|") for line in bar_lines} == {5}


def test_the_picture_shows_every_row_and_says_what_is_missing(tmp_path: Path) -> None:
    rows = [
        row("floor", "forward"),
        row("onnxq", "int8", cpu=1.5, snr=12.3),
        row("modelopt", "int8", snr=None, share=None),
        row("nncf", "int8", failed="AssertionError"),
        row("onnxsim", "fp8", loads="no"),
        row("onnxq", "fp8", model="smollm2"),
    ]
    figure = plot.picture(rows)
    assert len(figure.axes) == 2 * 5
    first = [text.get_text() for axis in figure.axes[:5] for text in axis.texts]
    for expected in ("1.5", "12.3", "does not compile", "fails", "NaN", "does not load", "90%"):
        assert expected in first
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [text.get_text() for text in figure.axes[0].texts][3] == "fails"
    assert labels == ["floor forward", "onnxq int8", "modelopt int8", "nncf int8", "onnxsim fp8"]
    plot.draw(rows, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")

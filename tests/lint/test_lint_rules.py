"""Every rule is tripped by its fault and by nothing sound beside it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from lint_cases import look, saved

from onnxq.errors import OnnxqError
from onnxq.linting.finding import Severity
from onnxq.linting.fix import CURES
from onnxq.linting.operators import IMPORTED, WITHOUT_PLUGIN
from onnxq.linting.rules import BY_ID, RULES
from tools.lint_truth.forms import CASES


@pytest.mark.parametrize("name", CASES)
def test_a_form_trips_its_rules_and_no_others(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    found = look(saved(case.model, tmp_path / "m.onnx"), case.target)
    assert {f.rule for f in found.findings} == case.rules
    assert all(f.reason and f.cure and f.node for f in found.findings)


def test_every_rule_has_a_form_that_trips_it_and_many_that_do_not() -> None:
    tripped = [rule for case in CASES.values() for rule in case.rules]
    assert set(tripped) == set(BY_ID)
    assert all(tripped.count(rule) < len(CASES) / 2 for rule in BY_ID)
    assert any(not case.rules for case in CASES.values())


def test_ids_are_stable_words_and_cures_are_announced() -> None:
    assert len(BY_ID) == len(RULES)
    assert all(rule.id == rule.id.lower() and " " not in rule.id for rule in RULES)
    assert {rule.id for rule in RULES if rule.fixable} == set(CURES)


def test_findings_come_worst_first(tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(CASES["com.microsoft::QuickGelu"].model)
    found = look(saved(model, tmp_path / "m.onnx")).findings
    assert [f.severity for f in found] == [Severity.REFUSED, Severity.PORTABILITY]


def test_ignored_rules_and_severities_are_left_out(tmp_path: Path) -> None:
    path = saved(CASES["com.microsoft::QuickGelu"].model, tmp_path / "m.onnx")
    assert [f.rule for f in look(path, ignore=["operator"]).findings] == ["contrib-domain"]
    assert [f.rule for f in look(path, ignore=["portability"]).findings] == ["operator"]
    with pytest.raises(OnnxqError, match="'nonsense', which is no rule"):
        look(path, ignore=["nonsense"])


def test_the_table_of_operators_is_the_parsers() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    parser = trt.OnnxParser(builder.create_network(0), logger)
    schemas = {s.name for s in onnx.defs.get_all_schemas()}
    known = {name for name in schemas if parser.supports_operator(name)}
    assert known - WITHOUT_PLUGIN == IMPORTED & schemas
    assert all(parser.supports_operator(name) for name in IMPORTED | WITHOUT_PLUGIN)

"""Multiple choice on models whose answers are known: each token adds its row to the logits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_models import write
from scipy.stats import binomtest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from onnxq.errors import OnnxqError
from onnxq.evaluate.choice import Choices, choice
from onnxq.evaluate.language import LanguageModel
from onnxq.evaluate.questions import Question, prompt, read_questions, read_shots

# Logits of a token: the sum of the rows of all tokens so far. Small rows: nothing saturates.
SUMMING = """agraph (int64[B,S] input_ids, int64[B,S] attention_mask) => (float[B,S,{V}] logits) {{
    rows = Gather(t, input_ids)  mask = Cast<to = 1>(attention_mask)
    axis = Constant<value = int64[1] {{2}}>()  wide = Unsqueeze(mask, axis)
    seen = Mul(rows, wide)  along = Constant<value = int64 {{1}}>()
    logits = CumSum(seen, along) }}"""
CHARACTERS = sorted(
    set(" ,.:()\nThe following are multiple choice questions with answersABCDxyzw?")
)
ROWS = [
    ("x?", "one", "two", "three", "four", "B"),
    ("y?", "one", "two", "three", "four", "C"),
    ("z?", "one", "two", "three", "four", "A"),
    ("w?", "one", "two", "three", "four", "C"),
]


def csv_file(path: Path, rows: list[tuple[str, ...]]) -> Path:
    path.write_text("".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows))
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return csv_file(tmp_path / "tasks.csv", ROWS)


def words(path: Path) -> Path:
    """' A' is one token, which does not say that a space stood before."""
    known = ["[?]", *"ABCDxyzw:", "Answer", "one", "two", "three", "four"]
    built = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="[?]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.save(str(path))
    return path


def characters(path: Path, merges: list[tuple[str, str]]) -> Path:
    """A token a character, but for merges: ' A' is two tokens where none joins them."""
    pieces = [*CHARACTERS, "?!", *("".join(merge) for merge in merges)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    Tokenizer(models.BPE(vocabulary, merges, unk_token="?!")).save(str(path))
    return path


def ids(tokenizer: Path, text: str) -> list[int]:
    return list(Tokenizer.from_file(str(tokenizer)).encode(text, add_special_tokens=False).ids)


def size(tokenizer: Path) -> int:
    return int(Tokenizer.from_file(str(tokenizer)).get_vocab_size())


def summing(path: Path, table: np.ndarray[Any, Any]) -> Path:
    return write(path, SUMMING.format(V=table.shape[1]), t=table)


def random_table(tokens: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return (0.1 * np.random.default_rng(seed).standard_normal((tokens, tokens))).astype(np.float32)


def by_hand(table: np.ndarray[Any, Any], row: list[int], start: int) -> float:
    """ln p of row[start:], token by token."""
    total = 0.0
    for position in range(start, len(row)):
        logits = table[row[:position]].astype(np.float64).sum(axis=0)
        total += logits[row[position]] - math.log(np.exp(logits).sum())
    return total


def softmax(values: list[float]) -> np.ndarray[Any, Any]:
    exponents = np.exp(np.array(values) - max(values))
    return np.asarray(exponents / exponents.sum())


def test_the_prompt_is_mmlus() -> None:
    shot = Question("1 + 1?", ("1", "2", "3", "4"), 1, "elementary mathematics")
    asked = Question("2 + 2?", ("4", "5", "6", "7"), 0, "elementary mathematics")
    assert prompt(asked, [shot]) == (
        "The following are multiple choice questions (with answers) about elementary mathematics."
        "\n\n1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B"
        "\n\n2 + 2?\nA. 4\nB. 5\nC. 6\nD. 7\nAnswer:"
    )
    bare = Question("2 + 2?", ("4", "5", "6", "7"), 0)
    assert prompt(bare, []).startswith(
        "The following are multiple choice questions (with answers).\n\n2 + 2?\n"
    )


def test_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "high_school_physics_test.csv"
    path.write_bytes(b'\xef\xbb\xbf"A ""b"", c\nd? ",1,2,3,4,D\n\nplain,1,2,3,4, b\n')
    first, second = read_questions(path)
    assert first == Question('A "b", c\nd?', ("1", "2", "3", "4"), 3, "high school physics")
    assert (second.text, second.answer) == ("plain", 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"q,1,2,3,4,A\nq,1,2,3,A\n", "line 2: 5 columns, not 6"),
        (b"question,A,B,C,D,answer\n", "line 1: the answer is 'answer'"),
        (b"q,1,2,3,4,E\n", "the answer is 'E'"),
        (b"q,1,2,3,4,\n", "the answer is ''"),
        (b"\n", "holds no question"),
        (b'q,1,2,3,4,"A\n', "cannot read the questions"),
        (b"\xff\xfe", "cannot read the questions"),
    ],
)
def test_what_is_no_question(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tasks.csv"
    path.write_bytes(content)
    with pytest.raises(OnnxqError, match=message):
        read_questions(path)


def test_known_answers(tmp_path: Path, tasks: Path) -> None:
    """x, y, z, w favour B, C, A, D: three of four are right, and how likely is known."""
    tokenizer = words(tmp_path / "tokenizer.json")
    table = np.zeros((size(tokenizer),) * 2, np.float32)
    for word, letter in ("xB", "yC", "zA", "wD"):
        table[ids(tokenizer, word)[0], ids(tokenizer, letter)[0]] = 2.0
    found = choice(summing(tmp_path / "m.onnx", table), tasks, tokenizer)
    assert (found.questions, found.correct, found.broken) == (4, 3, 0)
    assert found.accuracy == 0.75
    likely, unlikely = math.exp(2) / (math.exp(2) + 3), 1 / (math.exp(2) + 3)
    assert found.confidence == pytest.approx((3 * likely + unlikely) / 4, rel=1e-6)
    assert found.subjects == {"": (4, 3, None)}
    assert "75.0 % (3 of 4)" in found.lines()[0]


@pytest.mark.parametrize(
    ("kind", "merges", "shared"),
    [
        ("words", [], 0),
        ("two tokens", [], 0),
        ("one token", [(" ", "A"), (" ", "B"), (" ", "C"), (" ", "D")], 0),
        ("joined to the colon", [(":", " ")], 1),
        ("one letter in one token", [(" ", "A")], 0),
        ("one letter joined to the colon", [(":", " "), (": ", "A")], 1),
    ],
)
def test_every_tokenizer_is_scored_by_the_whole_continuation(
    tmp_path: Path, tasks: Path, kind: str, merges: list[tuple[str, str]], shared: int
) -> None:
    """Against sums token by token. `shared`: tokens of the prompt that the letters change."""
    path = tmp_path / "tokenizer.json"
    tokenizer = words(path) if kind == "words" else characters(path, merges)
    ours, theirs = (random_table(size(tokenizer), seed) for seed in (0, 1))
    found = choice(
        summing(tmp_path / "m.onnx", ours),
        tasks,
        tokenizer,
        reference=summing(tmp_path / "r.onnx", theirs),
    )
    right, same, divergence, confidence = [], [], [], []
    for question in read_questions(tasks):
        context = prompt(question, [])
        start = len(ids(tokenizer, context)) - shared
        rows = [ids(tokenizer, f"{context} {letter}") for letter in "ABCD"]
        q = softmax([by_hand(ours, row, start) for row in rows])
        p = softmax([by_hand(theirs, row, start) for row in rows])
        right.append(q.argmax() == question.answer)
        same.append(q.argmax() == p.argmax())
        divergence.append((p * np.log(p / q)).sum())
        confidence.append(q[question.answer])
    assert found.correct == sum(right) and found.agreement == np.mean(same)
    assert found.divergence == pytest.approx(np.mean(divergence), rel=1e-4)
    assert found.confidence == pytest.approx(np.mean(confidence), rel=1e-5)


def test_the_model_runs_once_a_question_where_it_can(
    tmp_path: Path, tasks: Path, monkeypatch: Any
) -> None:
    runs, whole = [], LanguageModel.logits

    def counted(self: LanguageModel, tokens: Any, **options: Any) -> Any:
        runs.append(len(tokens))
        return whole(self, tokens, **options)

    monkeypatch.setattr(LanguageModel, "logits", counted)
    for merges, expected in (([], 1), ([(" ", "A")], 2)):
        tokenizer = characters(tmp_path / "tokenizer.json", merges)
        runs.clear()
        choice(summing(tmp_path / "m.onnx", random_table(size(tokenizer))), tasks, tokenizer)
        assert len(runs) == expected * len(ROWS)


def test_paired_difference(tmp_path: Path, tasks: Path) -> None:
    tokenizer = words(tmp_path / "tokenizer.json")
    tables = []
    for pairs in (("xB", "yC", "zA", "wD"), ("xB", "yB", "zB", "wC")):
        table = np.zeros((size(tokenizer),) * 2, np.float32)
        for word, letter in pairs:
            table[ids(tokenizer, word)[0], ids(tokenizer, letter)[0]] = 2.0
        tables.append(table)
    models = [summing(tmp_path / f"{i}.onnx", table) for i, table in enumerate(tables)]
    found = choice(models[0], tasks, tokenizer, reference=models[1])
    assert (found.correct, found.reference_correct, found.agreement) == (3, 2, 0.25)
    gained = np.array([0, 1, 1, -1])  # right, less right of the reference
    assert found.difference == gained.mean()
    assert found.difference_error == pytest.approx(gained.std(ddof=1) / 2, rel=1e-12)
    assert found.subjects == {"": (4, 3, 2)}
    same = choice(models[0], tasks, tokenizer, reference=models[0])
    assert (same.difference, same.difference_error, same.divergence) == (0, 0, 0)
    assert same.agreement == 1
    assert "difference +0.00 +- 0.00 points" in same.lines()[1]


@pytest.mark.parametrize(("right", "questions"), [(0, 4), (3, 4), (4, 4), (95, 281), (1, 1)])
def test_the_interval_is_wilsons(right: int, questions: int) -> None:
    from onnxq.evaluate.shares import wilson

    expected = binomtest(right, questions).proportion_ci(0.95, method="wilson")
    assert wilson(right, questions) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_a_fixed_sequence_is_filled_behind_the_prompt(tmp_path: Path, tasks: Path) -> None:
    tokenizer = characters(tmp_path / "tokenizer.json", [(" ", "A")])
    table = random_table(size(tokenizer))
    free = choice(summing(tmp_path / "free.onnx", table), tasks, tokenizer)
    fixed = SUMMING.replace("B,S", "1,200").format(V=table.shape[1])
    found = choice(write(tmp_path / "fixed.onnx", fixed, t=table), tasks, tokenizer)
    assert found.confidence == pytest.approx(free.confidence, rel=1e-9)
    short = SUMMING.replace("B,S", "1,9").format(V=table.shape[1])
    with pytest.raises(OnnxqError, match=r"\[1, 9\], a window is \[1, "):
        choice(write(tmp_path / "short.onnx", short, t=table), tasks, tokenizer)


def test_nan_logits_are_counted_wrong_and_said(tmp_path: Path, tasks: Path) -> None:
    tokenizer = words(tmp_path / "tokenizer.json")
    table = np.zeros((size(tokenizer),) * 2, np.float32)
    table[ids(tokenizer, "z")[0]] = np.nan
    table[:, ids(tokenizer, "A")[0]] += 0.01
    model = summing(tmp_path / "m.onnx", table)
    found = choice(model, tasks, tokenizer, reference=model)
    assert (found.correct, found.broken) == (0, 1)  # z's answer is A, and NaN
    assert found.agreement == 0.75
    assert any("1 questions are NaN" in line for line in found.lines())
    json.dumps(found.as_dict(), allow_nan=False)


def test_examples(tmp_path: Path, tasks: Path) -> None:
    """Solved examples come before; a question is never its own."""
    tokenizer = words(tmp_path / "tokenizer.json")
    table = random_table(size(tokenizer))
    model = summing(tmp_path / "m.onnx", table)
    found = choice(model, tasks, tokenizer, shots=tasks)
    questions = read_questions(tasks)
    confidence = []
    for question in questions:
        context = prompt(question, [q for q in questions if q is not question])
        assert context.count("Answer: ") == 3
        rows = [ids(tokenizer, f"{context} {letter}") for letter in "ABCD"]
        shares = softmax([by_hand(table, row, len(row) - 1) for row in rows])
        confidence.append(shares[question.answer])
    assert found.confidence == pytest.approx(np.mean(confidence), rel=1e-5)
    assert any("with 4 examples" in note for note in found.notes)


def test_special_tokens_are_the_users_choice(tmp_path: Path, tasks: Path) -> None:
    tokenizer = words(tmp_path / "tokenizer.json")
    built = Tokenizer.from_file(str(tokenizer))
    first = processors.TemplateProcessing(single="w $A", special_tokens=[("w", 8)])
    assert built.token_to_id("w") == 8
    built.post_processor = first
    built.save(str(tokenizer))
    table = random_table(size(tokenizer))
    model = summing(tmp_path / "m.onnx", table)
    for special in (False, True):
        confidence = []
        for question in read_questions(tasks):
            row = [8] * special + ids(tokenizer, prompt(question, []))
            letters = [ids(tokenizer, letter) for letter in "ABCD"]
            shares = softmax([by_hand(table, row + letter, len(row)) for letter in letters])
            confidence.append(shares[question.answer])
        found = choice(model, tasks, tokenizer, special_tokens=special)
        assert found.confidence == pytest.approx(np.mean(confidence), rel=1e-5)
        assert ("no special tokens" in found.notes[0]) is not special


def test_folders_go_by_subject(tmp_path: Path) -> None:
    test, dev = tmp_path / "test", tmp_path / "dev"
    test.mkdir()
    dev.mkdir()
    csv_file(test / "some_law_test.csv", ROWS[:2])
    csv_file(test / "anatomy_test.csv", ROWS[2:])
    csv_file(dev / "some_law_dev.csv", ROWS[3:])
    tokenizer = words(tmp_path / "tokenizer.json")
    model = summing(tmp_path / "m.onnx", random_table(size(tokenizer)))
    found = choice(model, test, tokenizer)
    assert found.subjects is not None and list(found.subjects) == ["anatomy", "some law"]
    assert choice(model, test, tokenizer, limit=1).questions == 2
    with pytest.raises(OnnxqError, match="has no examples on 'anatomy'"):
        choice(model, test, tokenizer, shots=dev)
    csv_file(dev / "anatomy_dev.csv", ROWS[:1])
    law = Question("w?", ("one", "two", "three", "four"), 2, "some law")
    assert read_shots(dev, [law]) == {"some law": [law]}
    with pytest.raises(OnnxqError, match="holds no"):
        choice(model, tmp_path, tokenizer)


def test_a_tokenizer_that_does_not_know_the_letters(tmp_path: Path, tasks: Path) -> None:
    built = Tokenizer(models.WordLevel({"[?]": 0, "x": 1}, unk_token="[?]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.save(str(tmp_path / "tokenizer.json"))
    model = summing(tmp_path / "m.onnx", random_table(2))
    with pytest.raises(OnnxqError, match="does not tell the answers"):
        choice(model, tasks, tmp_path / "tokenizer.json")


def test_lines_without_a_reference() -> None:
    found = Choices(8, 2, 0.1, 0.6, 0.3, notes=("asked so",))
    assert len(found.lines()) == 2 and found.lines()[1] == "note: asked so"

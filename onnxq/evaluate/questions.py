"""Multiple-choice questions in MMLU's file format, and the prompt that MMLU puts them in.

A file is a CSV without a header, a question a row: question, A, B, C, D, letter of the answer.
Named as MMLU names its files (`high_school_physics_test.csv`), it tells its subject.

Source: Hendrycks et al. 2021, "Measuring Massive Multitask Language Understanding", and the code
that came with it; lm-evaluation-harness' task `mmlu` has the same prompt.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxq.errors import OnnxqError
from onnxq.files import refuse_unreadable

LETTERS = "ABCD"
_COLUMNS = 1 + len(LETTERS) + 1
_FORM = "a UTF-8 CSV file without a header"
_HEAD = "The following are multiple choice questions (with answers)"


@dataclass(frozen=True)
class Question:
    """One question; `answer` is an index into `choices`, `subject` is '' where it is not known."""

    text: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""

    def asked(self) -> str:
        """The question, its choices and `Answer:`."""
        rows = (f"{letter}. {c}" for letter, c in zip(LETTERS, self.choices, strict=True))
        return "\n".join((self.text, *rows, "Answer:"))


def prompt(question: Question, shots: Sequence[Question]) -> str:
    """What the model reads: the subject, solved examples, the question up to `Answer:`."""
    about = f" about {question.subject}" if question.subject else ""
    solved = (f"{shot.asked()} {LETTERS[shot.answer]}" for shot in shots)
    return "\n\n".join((f"{_HEAD}{about}.", *solved, question.asked()))


def read_tasks(path: Path, limit: int | None = None) -> list[Question]:
    """The questions of a file, or of every .csv of a folder by name.

    Args:
        limit: the first so many of each file.

    Raises:
        OnnxqError: no such file, no .csv in the folder, or a row that is no question.
    """
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise OnnxqError(f"{path} holds no .csv file", "a file a subject, as MMLU has them")
    return [question for file in files for question in read_questions(file)[:limit]]


def read_shots(path: Path | None, questions: Sequence[Question]) -> dict[str, list[Question]]:
    """Solved examples by subject: those of the file, or of the folder's file on the subject.

    Raises:
        OnnxqError: as `read_questions`; or the folder has no file on a subject.
    """
    subjects = {question.subject for question in questions}
    if path is None or not path.is_dir():
        examples = [] if path is None else read_questions(path)
        return dict.fromkeys(subjects, examples)
    by_subject = {_subject(file): file for file in sorted(path.glob("*.csv"))}
    for subject in sorted(subjects - by_subject.keys()):
        raise OnnxqError(
            f"{path} has no examples on {subject or 'questions without a subject'!r}",
            f"a file such as {(subject or 'subject').replace(' ', '_')}_dev.csv",
        )
    return {subject: read_questions(by_subject[subject]) for subject in subjects}


def read_questions(path: Path) -> list[Question]:
    """The questions of one file.

    Raises:
        OnnxqError: it cannot be read, is empty, or has a row that is no question.
    """
    refuse_unreadable(path, "the questions", _FORM)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            found = [_question(row, path, reader.line_num) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OnnxqError(f"cannot read the questions {path}: {error}", _FORM) from error
    if not found:
        raise OnnxqError(f"{path} holds no question", "rows of: question, A, B, C, D, answer")
    return found


def _question(row: list[str], path: Path, line: int) -> Question:
    where = f"{path}, line {line}"
    if len(row) != _COLUMNS:
        raise OnnxqError(
            f"{where}: {len(row)} columns, not {_COLUMNS}",
            "a row is: question, A, B, C, D, answer; text with commas stands in double quotes",
        )
    letter = row[-1].strip().upper()
    if len(letter) != 1 or letter not in LETTERS:
        raise OnnxqError(
            f"{where}: the answer is {row[-1]!r}", "one of A, B, C, D; and no header line"
        )
    text, *choices = (cell.strip() for cell in row[:-1])
    return Question(text, tuple(choices), LETTERS.index(letter), _subject(path))


def _subject(path: Path) -> str:
    """`high school physics`, of high_school_physics_test.csv; '' of any other name."""
    match = re.fullmatch(r"(.+)_(?:dev|val|test)", path.stem)
    return match[1].replace("_", " ") if match else ""

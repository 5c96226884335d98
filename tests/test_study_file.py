"""The study file: what is refused, with file, line and field, all at once; `--set`; what counts as another question."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sweep.study.file import StudyError, dump_study, read_study, what_changed
from sweep.study.schema import Range, rate_values

STUDIES = sorted((Path(__file__).parents[1] / "studies").glob("*.yaml"))
HEAVY = ("torch", "transformers", "optuna", "mlflow", "datasets", "pandas", "scipy", "matplotlib", "peft")

GOOD = """\
name: small
model: some/model
task: sequence-classification
data:
  source: rows.csv
arms:
  rank: [2, 8]
  alpha_ratio: [1, 2]
  target_modules: [[query, value]]
tune:
  learning_rate: {low: 1.0e-4, high: 1.0e-2, values: 3}
  full_finetuning:
    learning_rate: [1.0e-5, 1.0e-4, 1.0e-3]
train:
  steps: 60
  batch_size: 16
search:
  rungs: [30, 60]
confirm:
  seeds: [1, 2]
  reference: 8
  epsilon: 0.05
"""


def problems_of(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The error lines of a study file, without the path in front."""
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(StudyError) as caught:
        read_study(path, overrides)
    return [line.removeprefix(f"{path}:") for line in caught.value.lines()]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_in_the_repository_loads(path: Path) -> None:
    assert read_study(path).study.list_arms()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_that_was_written_out_reads_as_it_was(path: Path, tmp_path: Path) -> None:
    """The home keeps it so, and every command but run reads it from there."""
    study = read_study(path).study
    again = tmp_path / "study.yaml"
    again.write_text(dump_study(study), encoding="utf-8")
    assert read_study(again).study == study


def test_a_good_file_has_no_problems(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(GOOD)
    study = read_study(path).study
    assert [arm.name for arm in study.list_arms()] == ["r2-ratio1", "r2-ratio2", "r8-ratio1", "r8-ratio2", "full"]
    assert isinstance(study.tune.learning_rate, Range)
    assert rate_values(study.tune.learning_rate) == [1e-4, 1e-3, 1e-2]


def test_patterns_are_arms_and_are_named_where_the_study_varies_them(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(GOOD)
    one = ["arms.rank=[8]", "arms.alpha_ratio=[1]", "arms.full_finetuning=false", "arms.alpha_pattern={key: 3}"]
    names = [arm.name for arm in read_study(path, [*one, "arms.rank_pattern={query: 4}"]).study.list_arms()]
    assert names == ["r8-ratio1"]
    several = [*one, "arms.rank_pattern=[{}, {query: 4, key: 2}]", "arms.method=[lora, rslora]"]
    plain, _, patterned, _ = arms = read_study(path, several).study.list_arms()
    assert [arm.name for arm in arms] == [
        "r8-ratio1-lora",
        "r8-ratio1-rslora",
        "r8-ratio1-lora-query=4+key=2",
        "r8-ratio1-rslora-query=4+key=2",
    ]
    assert (plain.rank_pattern, patterned.rank_pattern) == ((), (("query", 4), ("key", 2)))
    assert plain.alpha_pattern == patterned.alpha_pattern == (("key", 3.0),)
    assert plain.cost_key != patterned.cost_key and plain.group != patterned.group


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("  batch_size: 16", "  batchsize: 16", "16: train.batchsize: unknown key; did you mean batch_size?"),
        ("  epsilon: 0.05", "  epsilon: 0.05\n  colour: 1", "23: confirm.colour: unknown key; known here: seeds,"),
        ("  steps: 60", "  steps: 60\n  steps: 60", "16: train.steps: key appears twice (first on line 15)"),
        ("low: 1.0e-4", "low: 1e-4", "11: tune.learning_rate.low: '1e-4' is text, not a number; write it without"),
        ("[1, 2]\n  target", '[1, "2"]\n  target', "8: arms.alpha_ratio.1: '2' is text, not a number"),
        ("alpha_ratio: [1, 2]", "alpha_ratio: [0, 2]", "8: arms.alpha_ratio.0: input should be greater than 0, not 0"),
        ("alpha_ratio: [1, 2]", "alpha_ratio: [1, -2]", "8: arms.alpha_ratio.1: input should be greater than 0"),
        ("rank: [2, 8]", "rank: [2, 8, 8]", "7: arms.rank: holds a value twice"),
        ("rank: [2, 8]", "rank: [2, 8]\n  method: [lora, lora]", "8: arms.method: holds a value twice"),
        ("  batch_size: 16", "  batch_size: 16\n  betas: [0.9]", "17: train.betas: must be two numbers"),
        (
            "rank: [2, 8]",
            "rank: [2, 8]\n  rank_pattern: [{}, {q: 4}, {}]",
            "8: arms.rank_pattern: holds a pattern twice",
        ),
        (
            "rank: [2, 8]",
            "rank: [2, 8]\n  rank_pattern: {q: 0}",
            "8: arms.rank_pattern.q: input should be greater than",
        ),
        ("rank: [2, 8]", "rank: [2, 8]\n  alpha_pattern: {'q(': 1}", "8: arms.alpha_pattern.q(: 'q(' is no regular"),
        ("rank: [2, 8]", "rank: [2, 8]\n  rank_pattern: 4", "8: arms.rank_pattern: must be a mapping of module names"),
        (
            "rank: [2, 8]",
            "rank: [2, 8]\n  method: [lora, prefix]",
            "6: arms.prefix_length: missing: method prefix needs",
        ),
        ("rank: [2, 8]", "rank: [2, 8]\n  prefix_length: [4]", "8: arms.prefix_length: no method uses it: add prefix"),
        (
            "rank: [2, 8]",
            "rank: [2, 8]\n  method: [prefix]\n  prefix_length: [4]",
            "8: arms.method: prefix alone has no rank to hold the others against",
        ),
        (
            "  full_finetuning:\n",
            "  prefix: {learning_rate: [0.1, 0.2, 0.3]}\n  full_finetuning:\n",
            "12: tune.prefix: no arm has these rates",
        ),
        ("rank: [2, 8]", "rank: [0, 8]", "7: arms.rank.0: input should be greater than or equal to 1, not 0"),
        ("name: small", "name: Small one", "1: name: 'Small one': use lower-case letters, digits and dashes only"),
        ("[[query, value]]", "[query]", "9: arms.target_modules.0: each entry is a list of module-name endings"),
        (
            "[[query, value]]",
            "[[query, value], [value, query]]",
            "9: arms.target_modules: names the same modules twice",
        ),
        ("[[query, value]]", "[[query], [query, query]]", "9: arms.target_modules: names the same modules twice"),
        ("1.0e-4, 1.0e-3]", "1.0e-4, 0.0001]", "13: tune.full_finetuning.learning_rate: holds a learning rate twice"),
        (
            "high: 1.0e-2",
            "high: 1.00001e-4",
            "11: tune.learning_rate: low (0.0001) and high (0.000100001) are",
        ),
        ("[[query, value]]", "[[]]", "9: arms.target_modules.0: list should have at least 1 item"),
        (
            "{low: 1.0e-4, high: 1.0e-2, values: 3}",
            "1.0e-4",
            "11: tune.learning_rate: must be a list of rates, or {low",
        ),
        ("high: 1.0e-2", "high: 1.0e-5", "11: tune.learning_rate: low (0.0001) must be below high (1e-05)"),
        ("1.0e-4, 1.0e-3]", "1.0e-4]", "13: tune.full_finetuning.learning_rate: has 2 values and tune.learning_rate 3"),
        ("rungs: [30, 60]", "rungs: [60, 30]", "17: search: rungs must rise"),
        ("rungs: [30, 60]", "rungs: [30]", "18: search.rungs: the last rung must be train.steps (60), not 30"),
        ("reference: 8", "reference: 16", "21: confirm.reference: rank 16 is not among arms.rank [2, 8]"),
        ("seeds: [1, 2]", "seeds: [0, 2]", "20: confirm.seeds: 0 is search.seed: confirm seeds must be fresh"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "20: confirm.seeds: holds a seed twice"),
        ("source: rows.csv", "source: rows.csv\n  test: 1e-1", "6: data.test: '1e-1' is text, not a number"),
        ("source: rows.csv", "source: rows.csv\n  test: 1.5", "6: data.test: input should be less than 1, not 1.5"),
        ("train:\n  steps: 60\n  batch_size: 16", "train:", "14: train: must hold keys of its own, not None"),
        ("task: sequence-classification", "", "task: missing"),
    ],
)
def test_bad_input_names_line_and_field_and_says_nothing_else(tmp_path: Path, old: str, new: str, line: str) -> None:
    assert GOOD.count(old) == 1
    problems = problems_of(tmp_path, GOOD.replace(old, new))
    ours = [
        problem for problem in problems if problem.lstrip().removeprefix(f"{tmp_path}/study.yaml: ").startswith(line)
    ]
    assert ours, problems
    missing_too = [problem for problem in problems if problem not in ours and not problem.endswith(": missing")]
    assert not missing_too


def test_all_problems_are_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = GOOD.replace("alpha_ratio: [1, 2]", "alpha_ratio: [0]").replace("batch_size: 16", "batch_size: many")
    problems = problems_of(tmp_path, text.replace("rungs: [30, 60]", "rungs: [30]") + "extra: 1\n", "train.clip=0")
    fields = [problem.split(": ")[:2] for problem in problems]
    assert fields == [
        ["--set", "train.clip"],
        ["8", "arms.alpha_ratio.0"],
        ["16", "train.batch_size"],
        ["23", "extra"],
    ]


def test_what_is_not_yaml_and_what_is_not_there_are_told(tmp_path: Path) -> None:
    assert "not YAML" in problems_of(tmp_path, "name: [small\n")[0]
    assert "must be a mapping" in problems_of(tmp_path, "- name\n")[0]
    with pytest.raises(StudyError, match="cannot be read: No such file"):
        read_study(tmp_path / "none.yaml")


def test_set_changes_a_key_and_its_errors_say_so(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(GOOD)
    study = read_study(path, ["train.steps=90", "search.rungs=[30, 90]", "data.text=body"]).study
    assert (study.train.steps, study.rungs, study.data.text) == (90, (30, 90), "body")
    path.write_text(dump_study(study))  # as a study that has run lies in the home, with every default
    resources = read_study(path, ["resources.workers=2"]).study.resources
    assert resources is not None and resources.workers == 2
    assert problems_of(tmp_path, GOOD, "train.clip=1e-3")[0].startswith("--set: train.clip: '1e-3' is text")
    assert problems_of(tmp_path, GOOD, "train.stepps=3") == ["--set: train.stepps: unknown key; did you mean steps?"]
    assert problems_of(tmp_path, GOOD, "steps") == ["--set: 'steps' is not of the form dotted.key=value"]
    assert problems_of(tmp_path, GOOD, "name.first=x") == ["--set: name.first: name holds no keys of its own"]


def test_an_error_found_later_still_knows_its_line(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(GOOD)
    source = read_study(path, ["data.label=topic"])
    error = source.error(("arms.rank", "larger than the layer"), ("data.label", "no such column"), ("model", "unknown"))
    assert error.lines() == [
        f"{path}:7: arms.rank: larger than the layer",
        "--set: data.label: no such column",
        f"{path}:2: model: unknown",
    ]


def test_another_question_is_told_key_by_key_and_storage_may_move(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(GOOD)
    before = dump_study(read_study(path).study)
    assert what_changed(before, dump_study(read_study(path, ["storage=sqlite:///other.db"]).study)) == []
    after = dump_study(read_study(path, ["arms.rank=[2, 4, 8]", "train.clip=2.0"]).study)
    assert what_changed(before, after) == [
        "- arms.rank: [2, 8]",
        "+ arms.rank: [2, 4, 8]",
        "- train.clip: 1.0",
        "+ train.clip: 2.0",
    ]


def test_a_key_that_is_newer_than_the_dump_asks_nothing_new(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(GOOD)
    dump = dump_study(read_study(path).study)
    assert what_changed(dump.replace("  dropout: 0.0\n", ""), dump) == []


def test_a_wrong_file_is_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(GOOD.replace("steps: 60", "steps: -1"))
    script = (
        "import sys\n"
        "from sweep.cli import main\n"
        "sys.argv = ['sweep', 'run', sys.argv[1], '--home', sys.argv[2]]\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted(m for m in sys.modules if m in " + repr(HEAVY) + "))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), str(tmp_path / "home")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert f"{path}:15: train.steps:" in done.stderr
    assert done.stdout.strip() == "[]"
    assert not (tmp_path / "home").exists()

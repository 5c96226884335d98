"""Code that a model brings runs where the study file and the command both say so, and nowhere else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import sweep
from fakes import make_study
from hostile_models import save_model_with_code
from tiny_texts import write_lines

from sweep.study.file import dump_study, what_changed
from sweep.study.home import Home
from sweep.training.locate import locate_model, model_fingerprint

CONFIRM = "--trust-remote-code"
TRUST = ("--set", "trust_remote_code=true")
STUDY = """
name: own
model: {model}
task: causal-lm
data: {{source: {texts}, max_length: 12, validation: 0.2, test: 0.2}}
arms: {{rank: [2, 4], alpha_ratio: [1], target_modules: [[q_proj]], full_finetuning: false}}
tune: {{learning_rate: [1.0e-3]}}
train: {{steps: 2, batch_size: 2, precision: float32}}
confirm: {{seeds: [1, 2], reference: 4, epsilon: 10.0}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    save_model_with_code(folder / "model", folder)
    write_lines(folder / "texts.txt", 60, 0)
    (folder / "own.yaml").write_text(STUDY.format(model=folder / "model", texts=folder / "texts.txt"))
    return folder


@pytest.fixture(scope="module")
def trained(made: Path) -> Path:
    """The folder in which the study has run, both having said so."""
    said = run(made, "run", "own.yaml", *TRUST, CONFIRM)
    assert said.returncode == 0, said.stdout + said.stderr
    assert ran_code(made) == ["ran-model", "ran-tokenizer"]
    return made


def run(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command, before which no code of the model has run."""
    for name in ran_code(place):
        (place / name).unlink()
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(place / "modules"), "OMP_NUM_THREADS": "1"}
    return sweep(*words, cwd=place, typed="y\n" * 9, **environment)  # whoever asks at a prompt is told yes


def ran_code(place: Path) -> list[str]:
    return sorted(path.name for path in place.glob("ran-*"))


def refused(said: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that was wrong usage."""
    assert said.returncode == 2, said.stdout + said.stderr
    (line,) = said.stderr.strip().splitlines()
    return line


def test_without_the_study_s_word_no_code_runs_and_the_field_is_named(made: Path) -> None:
    for words in (("run", "own.yaml"), ("run", "own.yaml", "--dry-run")):
        line = refused(run(made, *words))
        assert line.startswith("own.yaml: trust_remote_code: ") and "--trust-remote-code" in line and "model" in line
        assert ran_code(made) == []


def test_without_the_command_s_word_no_code_runs_and_the_flag_is_named(made: Path) -> None:
    line = refused(run(made, "run", "own.yaml", *TRUST))
    assert line.startswith("trust_remote_code: ") and line.endswith("confirm it with --trust-remote-code")
    assert ran_code(made) == []


def test_the_flag_alone_is_not_enough(made: Path) -> None:
    assert refused(run(made, "run", "own.yaml", CONFIRM)).startswith("--trust-remote-code: study own does not say")
    assert ran_code(made) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("export", "own", "--to", "out"),
        ("latency", "own", "--batch", "1", "--length", "8", "--repeats", "1"),
        ("rank-use", "own"),
        ("run", "own"),
    ],
)
def test_every_command_that_loads_the_base_wants_the_confirmation(trained: Path, words: tuple[str, ...]) -> None:
    assert "--trust-remote-code" in refused(run(trained, *words)) and ran_code(trained) == []
    assert run(trained, *words, CONFIRM).returncode == 0
    assert words[0] == "run" or "ran-model" in ran_code(trained)  # complete: nothing to load


@pytest.mark.slow
def test_a_merged_model_and_an_adapter_of_it_say_how_to_load_them(trained: Path) -> None:
    said = run(trained, "export", "own", "--merge", "--to", "merged", CONFIRM)
    assert said.returncode == 0, said.stderr
    assert (trained / "merged" / "modeling_own.py").exists()
    adapter = Home(trained / ".sweep").study("own").path / "adapter"
    for folder in (adapter, trained / "merged"):
        assert "trust_remote_code=True" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_from_the_registry_it_is_loaded_back_with_its_code_where_that_was_confirmed(trained: Path) -> None:
    said = run(trained, "export", "own", "--to", "registered", "--register", "own", CONFIRM)
    assert said.returncode == 0 and "registered: own, version 1" in said.stdout, said.stdout + said.stderr
    shutil.copytree(trained / "model", trained / "elsewhere")
    load = "import mlflow, sys; found = mlflow.pyfunc.load_model('models:/own/1', model_config=eval(sys.argv[1]))\n"
    load += "print(found.unwrap_python_model().model.base_model.model.config._name_or_path)"
    database = f"sqlite:///{trained}/.sweep/mlflow.db"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": database, "HF_MODULES_CACHE": str(trained / "modules")}
    for given, base in (
        (None, ""),
        ({"trust_remote_code": "yes"}, ""),
        ({"trust_remote_code": True}, "model"),
        ({"trust_remote_code": True, "base": str(trained / "elsewhere")}, "elsewhere"),
    ):
        for name in ran_code(trained):
            (trained / name).unlink()
        command = [sys.executable, "-c", load, repr(given)]
        done = subprocess.run(command, env=environment, input="y\n" * 9, capture_output=True, text=True)
        assert (done.returncode == 0) == bool(base) == bool(ran_code(trained)), done.stderr
        assert not base or done.stdout.splitlines()[-1] == str(trained / base)


@pytest.mark.slow
def test_whoever_wrote_an_adapter_does_not_choose_whose_code_runs(trained: Path) -> None:
    adapter = str(Home(trained / ".sweep").study("own").path / "adapter")
    ask = ("adapters", f"a={adapter}", "--text", "the river")
    assert "trust_remote_code" in refused(run(trained, *ask)) and ran_code(trained) == []
    assert "--base" in refused(run(trained, *ask, CONFIRM)) and ran_code(trained) == []
    said = run(trained, *ask, "--base", str(trained / "model"), CONFIRM)
    assert said.returncode == 0 and ran_code(trained) == ["ran-model", "ran-tokenizer"]


def test_whether_code_may_run_is_part_of_the_question() -> None:
    asked = [dump_study(make_study(trust_remote_code=allowed)) for allowed in (False, True)]
    assert what_changed(*asked) == ["- trust_remote_code: false", "+ trust_remote_code: true"]


def test_code_that_may_run_is_part_of_what_identifies_the_model(made: Path) -> None:
    def prints() -> tuple[str, str]:
        name = str(made / "model")
        return model_fingerprint(locate_model(name)), model_fingerprint(locate_model(name, True))

    code = made / "model" / "modeling_own.py"
    before, text = prints(), code.read_text()
    code.write_text(text + "\n# another line")
    after = prints()
    code.write_text(text)
    assert after[0] == before[0] and after[1] != before[1]

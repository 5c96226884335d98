"""Adapters as MLflow's logged models, and their versions in its registry."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sweep.study.lifeline import temporary_folder
from sweep.tracking.connection import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

SHA = "sweep.adapter_sha256"  # which adapter a logged model or a version holds
CONTENT = ("adapter_config.json", "adapter_model.safetensors")
LARGEST_COMPLETION = 32  # tokens


def log_model(client: MlflowClient, experiment_id: str, run_id: str, adapter: Path) -> str:
    """Log an exported adapter as a model of a run, once; returns its id.

    The base model is not copied: the adapter names it. A model whose upload was cut short is uploaded again.
    """
    from mlflow.entities import LoggedModelOutput

    sha = adapter_sha(adapter)
    found = _find_model(client, experiment_id, run_id, sha)
    if found is not None and found.status == "READY":
        return str(found.model_id)
    if found is None:
        told = json.loads((adapter / "sweep.json").read_text(encoding="utf-8"))
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        params = {
            "base_model": config["base_model_name_or_path"],
            "r": config.get("r"),
            "lora_alpha": config.get("lora_alpha"),
            "learning_rate": told["learning_rate"],
            "seed": told["seed"],
            "steps": told["steps"],
        }
        tags = {SHA: sha, "arm": told["arm"], "trial": told["trial"], "model_fingerprint": told["model_fingerprint"]}
        found = client.create_logged_model(
            experiment_id,
            f"{told['study']}-{alias_of(told['arm'])}",
            run_id,
            {key: str(value) for key, value in tags.items()},
            {key: without_credentials(str(value)) for key, value in params.items() if value is not None},
            "adapter",
        )
    with temporary_folder("sweep-model-") as folder:
        client.log_model_artifacts(found.model_id, str(pack_model(adapter, folder / "model", found.model_id)))
    outputs = client.get_run(run_id).outputs
    if found.model_id not in [output.model_id for output in (outputs.model_outputs if outputs else ())]:
        client.log_outputs(run_id, [LoggedModelOutput(found.model_id, 0)])  # so that the run's page shows it
    client.finalize_logged_model(found.model_id, "READY")
    return str(found.model_id)


def create_version(client: MlflowClient, model_id: str, sha: str, name: str, description: str) -> str:
    """A logged model's version in the registry: a new one, or the one that holds this adapter already."""
    from mlflow.exceptions import MlflowException

    with suppress(MlflowException):  # it is there
        client.create_registered_model(name)
    versions = client.search_model_versions(f"name = '{name}'")
    held = next((version for version in versions if version.tags.get(SHA) == sha), None)
    if held is None:
        model = client.get_logged_model(model_id)
        held = client.create_model_version(  # not by models:/…, which MLflow looks up at whatever server is its default
            name, model.artifact_location, model.source_run_id, {SHA: sha}, description=description, model_id=model_id
        )
    elif held.description != description:
        client.update_model_version(name, held.version, description)
    return str(held.version)


def name_problem(name: str) -> str | None:
    """Why MLflow's registry takes no model of this name, or None."""
    if not name.strip() or name in (".", ".."):
        return "is no name"
    if any(sign in name for sign in "/:'\"") or not name.isprintable():
        return "may hold no slash, colon, quotation mark or control character"
    return None if len(name) <= 250 else "is longer than 250 characters"


def alias_of(arm: str) -> str:
    """An arm's name as an alias: letters, digits, dashes and underscores; with a hash where more than dots must go."""
    dotless = arm.replace(".", "_")
    alias = re.sub(r"[^A-Za-z0-9_-]+", "-", dotless)[:200]
    return alias if alias == dotless else f"{alias.strip('-')}-{hashlib.sha256(arm.encode()).hexdigest()[:6]}"


def adapter_sha(adapter: Path) -> str:
    """What tells adapters apart: base, configuration and weights, those of a prefix below too; not the card."""
    told = json.loads((adapter / "sweep.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(str(told["model_fingerprint"]).encode())
    for path in sorted(path for path in adapter.rglob("*") if path.name in CONTENT):
        digest.update(path.relative_to(adapter).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def pack_model(adapter: Path, to: Path, model_id: str) -> Path:
    """The adapter in a folder that `mlflow.pyfunc` loads: code as text and safetensors, nothing pickled."""
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    told = json.loads((adapter / "sweep.json").read_text(encoding="utf-8"))
    outputs = [ColSpec(DataType.string, "label"), *(ColSpec(DataType.double, label) for label in told["labels"])]
    params = None
    if not told["labels"]:
        outputs = [ColSpec(DataType.string, "text")]
        params = ParamSchema([ParamSpec("max_new_tokens", DataType.integer, LARGEST_COMPLETION)])
    versions = {library: told["versions"][library].partition("+")[0] for library in ("peft", "torch", "transformers")}
    code = Path(__file__).with_name("adapter_model.py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no example to try it on, which would load the base here
        save_model(
            str(to),
            python_model=str(code),
            artifacts={"adapter": str(adapter)},
            signature=ModelSignature(Schema([ColSpec(DataType.string)]), Schema(outputs), params),
            model_config={"base": "", "trust_remote_code": False},  # MLflow passes over what is not named here
            pip_requirements=[f"{library}=={version}" for library, version in versions.items()],
        )
    model = Model.load(str(to))
    model.model_id = model_id
    flavor = model.flavors["python_function"]  # MLflow reads the last part of these paths; the rest tells of this disk
    flavor["model_code_path"], flavor["artifacts"]["adapter"]["uri"] = code.name, adapter.name
    model.save(str(to / "MLmodel"))
    return to


def _find_model(client: MlflowClient, experiment_id: str, run_id: str, sha: str) -> LoggedModel | None:
    ours = f"source_run_id = '{run_id}' AND tags.`{SHA}` = '{sha}'"
    found: list[LoggedModel] = client.search_logged_models([experiment_id], ours)
    return found[0] if found else None

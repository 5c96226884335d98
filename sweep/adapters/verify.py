"""Run in a fresh process: load an export with PEFT, transformers or MLflow alone, compare its logits."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file


def largest_difference(question: dict[str, Any]) -> float:
    """Largest absolute difference of the logits, over all rows; padding left out.

    Weights and activations are float64, but for what a model casts to float32 itself: all in float32, the rounding
    of a deep model alone differs by more than an error should.
    """
    kinds: dict[str, Any] = {
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "image-classification": transformers.AutoModelForImageClassification,
        "causal-lm": transformers.AutoModelForCausalLM,
    }
    auto, classify = kinds[question["task"]], question["task"] != "causal-lm"
    code = question["trust_remote_code"]
    settings: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": code, "use_safetensors": True}
    if "registered" in question:  # in MLflow's registry, with MLflow alone
        os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
        from mlflow.pyfunc import load_model

        given = {"model_config": {"trust_remote_code": True}} if code else {}
        model = load_model(question["registered"], **given).unwrap_python_model().model
    elif question["base"] is None:
        model = auto.from_pretrained(question["folder"], **settings)
    else:
        from peft import PeftModel

        if question["gguf_file"]:
            settings |= {"gguf_file": question["gguf_file"], "use_safetensors": None}
        if classify:
            settings["num_labels"] = question["labels"]
            settings["ignore_mismatched_sizes"] = True
        base = auto.from_pretrained(question["base"], **settings)
        if question["task"] == "sequence-classification":
            base.config.pad_token_id = question["pad_token_id"]
        model = PeftModel.from_pretrained(base, question["folder"])
        prefix = Path(question["folder"]) / "prefix"  # of an adapter that is LoRA and a prefix
        if prefix.exists():
            merged = torch.nn.Module.double(model).merge_and_unload()
            model = PeftModel.from_pretrained(merged, str(prefix))
    expected = load_file(question["expected"])
    torch.nn.Module.double(model.eval())  # transformers' own refuses for models read from GGUF files
    ours = expected.pop("logits")
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in expected.items()}
    with torch.no_grad():
        logits = model(**inputs).logits
    if not classify:  # behind a prefix, whose own are left out
        logits = logits[:, -expected["attention_mask"].shape[1] :]
    difference = (logits - ours).abs()
    if not classify:
        difference = difference[expected["attention_mask"].bool()]
    return float(difference.max())


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    print(json.dumps({"largest_difference": largest_difference(json.load(sys.stdin))}))

"""The adapter as MLflow loads it: `mlflow.pyfunc.load_model`. MLflow keeps this file beside the adapter and runs it.

It needs MLflow, PEFT, transformers and torch, and nothing of ours. The base model is not in MLflow: it is found again
by the name that the adapter gives (a hub id, a path, package:NAME/PATH), or where `model_config={"base": …}` says. Its
weights are read from safetensors or GGUF, and code that it brings runs with `{"trust_remote_code": True}` there alone.
"""

from __future__ import annotations

from importlib.util import find_spec
from json import loads
from pathlib import Path
from typing import Any

import pandas
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

ROWS = 32  # that go through the model at once


class AdapterModel(PythonModel):
    """A base model with its adapter: `model` as PEFT makes it, and `processor`, its tokenizer or image processor."""

    def load_context(self, context: Any) -> None:
        import transformers
        from peft import PeftModel

        folder = Path(context.artifacts["adapter"])
        told = loads((folder / "sweep.json").read_text())
        self.task, self.labels = told["task"], told["labels"]
        auto = {
            "sequence-classification": transformers.AutoModelForSequenceClassification,
            "image-classification": transformers.AutoModelForImageClassification,
            "causal-lm": transformers.AutoModelForCausalLM,
        }[self.task]
        images = self.task == "image-classification"
        kind = transformers.AutoImageProcessor if images else transformers.AutoTokenizer
        asked = context.model_config or {}
        code = {"trust_remote_code": asked.get("trust_remote_code") is True}
        self.processor = kind.from_pretrained(folder, **code)
        config = loads((folder / "adapter_config.json").read_text())
        settings: dict[str, Any] = {"dtype": "float32", **code}
        if self.labels:
            settings |= {"num_labels": len(self.labels), "ignore_mismatched_sizes": True}
        own = folder / "base"  # where the study itself made the base
        where = asked.get("base") or config["base_model_name_or_path"]
        base, gguf = (str(own), {}) if own.is_dir() else find_base(where)
        settings |= gguf if gguf else {"use_safetensors": True}
        model = auto.from_pretrained(base, **settings)
        if not images:
            self.processor.pad_token = self.processor.pad_token or self.processor.eos_token
            model.config.pad_token_id = self.processor.pad_token_id
        model = PeftModel.from_pretrained(model, str(folder))
        if (folder / "prefix").is_dir():  # PEFT has no adapter that is LoRA and a prefix: LoRA is merged first
            model = PeftModel.from_pretrained(model.merge_and_unload(), str(folder / "prefix"))
        self.model = model.eval()

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """A row for each text (or path of an image): its class and each class's probability, or what comes next."""
        import torch

        rows = model_input.iloc[:, 0].tolist()
        answers: list[dict[str, Any]] = []
        with torch.no_grad():
            for at in range(0, len(rows), ROWS):
                part = rows[at : at + ROWS]
                answers += self.classify(part) if self.labels else self.complete(part, params or {})
        return pandas.DataFrame(answers)

    def classify(self, rows: list[str]) -> list[dict[str, Any]]:
        probabilities = self.model(**self.inputs(rows)).logits.float().softmax(-1)
        best = probabilities.argmax(-1)
        return [
            {"label": self.labels[i], **dict(zip(self.labels, row.tolist(), strict=True))}
            for i, row in zip(best.tolist(), probabilities, strict=True)
        ]

    def complete(self, rows: list[str], params: dict[str, Any]) -> list[dict[str, Any]]:
        inputs = self.inputs(rows, padding_side="left")
        said = self.model.generate(
            **inputs,
            max_new_tokens=params.get("max_new_tokens", 32),
            do_sample=False,
            pad_token_id=self.processor.pad_token_id,
        )
        fresh = said[:, inputs["input_ids"].shape[1] :]
        return [{"text": text} for text in self.processor.batch_decode(fresh, skip_special_tokens=True)]

    def inputs(self, rows: list[str], **settings: Any) -> Any:
        if self.task == "image-classification":
            from PIL import Image

            return self.processor([Image.open(row).convert("RGB") for row in rows], return_tensors="pt")
        longest = getattr(self.model.config, "max_position_embeddings", None) or 1024
        settings |= {"max_length": min(longest, self.processor.model_max_length)}
        tokens = self.processor(rows, padding=True, truncation=True, return_tensors="pt", **settings)
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def find_base(name: str) -> tuple[str, dict[str, str]]:
    """(folder or hub id, the argument that names a GGUF file)."""
    path = Path(name).expanduser()
    if name.startswith("package:"):
        package, _, inside = name.removeprefix("package:").partition("/")
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"the base model lies in the Python package {package}, which is not installed")
        if inside.startswith("/") or ".." in Path(inside).parts:
            raise ValueError(f"the base model's name {name!r} leads out of its package")
        path = Path(spec.submodule_search_locations[0]) / inside
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    ggufs = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").exists() else []
    if ggufs:
        return str(path), {"gguf_file": ggufs[0].name}
    return (str(path) if path.exists() else name), {}


set_model(AdapterModel())

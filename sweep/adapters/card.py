"""The model card that goes with an export: what it is, how to load it, and the evidence for it."""

from __future__ import annotations

from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord, TrialRecord


def model_card(study: Study, record: StudyRecord, trial: TrialRecord, merge: bool, evidence: str) -> str:
    """Markdown with the front matter that the hub reads."""
    spec, last, prepared = trial.spec, trial.last, record.prepared
    assert last is not None and prepared is not None  # export() has refused those that have none
    arm, classify = spec.arm, study.task == "sequence-classification"
    auto = "AutoModelForSequenceClassification" if classify else "AutoModelForCausalLM"
    labels = f", num_labels={len(prepared.labels)}" if classify else ""
    scores = {"eval_loss": last.eval_loss, **last.eval_metrics, **last.test_metrics}
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in scores.items() if value is not None)
    labelled = f"; labels, in order: {', '.join(prepared.labels)}" if classify else ""
    what = "full fine-tuning" if arm.is_full else f"{arm.method}, rank {arm.r}, alpha {arm.lora_alpha:g}"
    if not arm.is_full:
        what += f" (scaling {arm.scaling:g}), on {', '.join(arm.target_modules)}"
    if merge:
        load = f'model = {auto}.from_pretrained("THIS FOLDER")'
        imports = f"from transformers import {auto}"
    else:
        load = (
            f'base = {auto}.from_pretrained("BASE"{labels})  # {study.model}\n'
            'model = PeftModel.from_pretrained(base, "THIS FOLDER")'
        )
        imports = f"from peft import PeftModel\nfrom transformers import {auto}"
    return f"""---
library_name: {"transformers" if merge else "peft"}
base_model: "{study.model}"
tags: [lora-sweep{"" if merge else ", lora"}]
---
# {study.name}: {arm.name}{", merged" if merge else ""}

{study.question}

{evidence}

- Trained by: {what}; learning rate {spec.learning_rate:g}, seed {spec.seed}.
- Steps: {trial.step}, of {study.train.batch_size} rows each.
- Data: {study.data.source}, fingerprint {prepared.data_fingerprint}{labelled}.

| this trial on held-out rows | value |
| --- | --- |
{rows}

The claims above rest on all confirm seeds of the study; the table is this one trial alone.

```python
{imports}

{load}
```
"""

"""The model card that goes with an export: what it is, how to load it, and the evidence for it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from sweep.adapters.peft_format import BASE, SUBFOLDER
from sweep.report.words import BITS, plural
from sweep.study.arms import pattern_text
from sweep.study.schema import Study
from sweep.tracking.journal import StudyRecord, TrialRecord
from sweep.training.locate import PACKAGE, locate_model


def model_card(study: Study, record: StudyRecord, trial: TrialRecord, merge: bool, evidence: str) -> str:
    """Markdown with the front matter that the hub reads, and Python that runs in the export's folder."""
    spec, last, prepared = trial.spec, trial.last, record.prepared
    assert last is not None and prepared is not None  # export() has refused those that have none
    arm, classify = spec.arm, study.task != "causal-lm"
    scores = {"eval_loss": last.eval_loss, **last.eval_metrics, **last.test_metrics}
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in scores.items() if value is not None)
    labelled = f"; labels, in order: {', '.join(prepared.labels)}" if classify else ""
    what = "full fine-tuning" if arm.is_full else arm.method
    if arm.prefix_length:
        what += f", a prefix of {plural(arm.prefix_length, 'embedding')}"
    if arm.r:
        what += f", rank {arm.r}, alpha {arm.lora_alpha:g}"
    if arm.rank_pattern:
        what += f", rank_pattern {pattern_text(arm.rank_pattern)}"
    if arm.alpha_pattern:
        what += f", alpha_pattern {pattern_text(arm.alpha_pattern)}"
    if arm.method == "pissa" and not merge:
        what += f", exported as LoRA of rank {2 * arm.r} over the whole base"
    if arm.r:
        what += f" (scaling {arm.scaling:g}), on {', '.join(arm.target_modules)}"
    if study.quantization is not None:
        over = "merged into" if merge else "checked over"
        what += f"; over the base in {BITS[study.quantization]}, and {over} the base in full precision"
    base = f'base_model: "{study.model}"' if study.pretrain is None else f"# the base model is in {BASE}/"
    folder = study.model if study.pretrain is None else BASE
    load = loading(
        folder,
        len(prepared.labels) if classify else None,
        merge,
        prefix_below=arm.r > 0 and arm.prefix_length > 0,
        images=study.task == "image-classification",
        own_code=study.trust_remote_code,
    )
    return f"""---
library_name: {"transformers" if merge else "peft"}
{base}
tags: [lora-sweep{", lora" if arm.r and not merge else ""}]
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

To load it, in this folder:

```python
{load}
```
"""


def loading(
    model: str,
    labels: int | None,
    merge: bool,
    prefix_below: bool = False,
    images: bool = False,
    own_code: bool = False,
) -> str:
    """The program that loads an export with transformers and PEFT alone, run in its folder.

    labels: their number where rows are classified, else None. prefix_below: the folder holds LoRA, and one below it a
    prefix. images: whether the rows are images. own_code: whether the model brings code of its own.
    """
    trust = ", trust_remote_code=True" if own_code else ""
    auto = "AutoModelForImageClassification" if images else "AutoModelForSequenceClassification"
    auto = "AutoModelForCausalLM" if labels is None else auto
    kind, name = ("AutoImageProcessor", "processor") if images else ("AutoTokenizer", "tokenizer")
    names = ", ".join(sorted((auto, kind)))
    if merge:
        load = f'{name} = {kind}.from_pretrained("."{trust})\nmodel = {auto}.from_pretrained("."{trust})'
        return f"from transformers import {names}\n\n{load}"
    imports, folder, gguf = _base(model)
    settings = f"{gguf}{trust}" if labels is None else f"{gguf}{trust}, num_labels={labels}"
    settings += ", ignore_mismatched_sizes=True" if images else ""  # the base mostly has a head for other labels
    lines = [*imports, "from peft import PeftModel", f"from transformers import {names}", "", folder]
    lines += [
        f"{name} = {kind}.from_pretrained(folder{gguf}{trust})",
        f"base = {auto}.from_pretrained(folder{settings})",
    ]
    if labels is not None and not images:  # the model's own configuration may name another padding token, or none
        lines += [
            "tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token",
            "base.config.pad_token_id = tokenizer.pad_token_id",
        ]
    if not prefix_below:
        return "\n".join([*lines, 'model = PeftModel.from_pretrained(base, ".")'])
    lines += [
        "# PEFT has no adapter that is LoRA and a prefix: LoRA is merged, then the prefix put before it.",
        'merged = PeftModel.from_pretrained(base, ".").merge_and_unload()',
        f'model = PeftModel.from_pretrained(merged, "{SUBFOLDER}")',
    ]
    return "\n".join(lines)


def _base(model: str) -> tuple[list[str], str, str]:
    """(imports, the line that sets `folder`, the argument that names the GGUF file); this machine's paths stay out."""
    if model == BASE:
        return [], f'folder = "{BASE}"  # the base model, which the study itself made', ""
    packaged = model.startswith(PACKAGE)
    if not packaged and not Path(model).expanduser().exists():
        return [], f'folder = "{model}"', ""  # the hub's, which holds no GGUF files for us
    name = locate_model(model).gguf_file
    gguf = f', gguf_file="{name}"' if name else ""
    path = PurePosixPath(model.removeprefix(PACKAGE))
    if name and path.name == name:
        path = path.parent
    if model.startswith("~"):
        return ["from pathlib import Path", ""], f'folder = Path("{path}").expanduser()', gguf
    if not packaged:
        return [], f'folder = "{path}"  # the base model, where the study found it', gguf
    package, *inside = path.parts
    place = "".join(f' / "{part}"' for part in inside)
    where = f'folder = str(files("{package}"){place})  # of an installed package'
    return ["from importlib.resources import files", ""], where, gguf

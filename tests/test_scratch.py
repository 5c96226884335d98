"""`model: scratch`: a base made from the rows of some labels, for a study that has the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import sweep
from image_parts import COLOURS, picture
from PIL import Image
from safetensors.torch import load_file
from test_export import run_trials, trial_of
from transformers import AutoImageProcessor, AutoModelForImageClassification

from sweep.adapters.export import _our_logits, _weights_of, export, few_rows
from sweep.driver.takeup import refuse_changed_inputs
from sweep.execution.executor import InlineExecutor
from sweep.execution.worker import Work
from sweep.report.statistics import find
from sweep.report.tables import measured
from sweep.study.errors import FieldError
from sweep.study.file import StudyError, read_study
from sweep.study.home import Home
from sweep.study.records import Setup
from sweep.study.schema import Study
from sweep.training.base import load_base
from sweep.training.data import load_data
from sweep.training.rung import located, tokenised
from sweep.training.scratch import find_base, pretraining_record

VISION, CONV = Path("studies/vision.yaml").absolute(), Path("studies/vision-conv.yaml").absolute()
SHADES = (*COLOURS, "dark", "light")
TINY = "{image_size: 8, patch_size: 4, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2}"


@pytest.fixture(scope="module")
def shades(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of five labels."""
    folder, rng = tmp_path_factory.mktemp("shades"), np.random.default_rng(5)
    for shade in SHADES:
        (folder / shade).mkdir()
        for i in range(14):
            image = picture(rng, shade if shade in COLOURS else "red")
            if shade == "dark":
                image = image.point(lambda value: value // 4)
            elif shade == "light":
                image = image.point(lambda value: 255 - value // 4)
            image.save(folder / shade / f"{i}.png")
    return folder


def scratch_study(source: Path, *overrides: str, study: Path = VISION) -> Study:
    small = [
        f"data.source={source}",
        f"pretrain.config={TINY}",
        "pretrain.labels=[blue, green, red]",
        "pretrain.steps=12",
        "pretrain.batch_size=8",
        "arms.rank=[2, 8]",
        "arms.alpha_ratio=[1]",
        "confirm.reference=8",
        "train.steps=3",
        "train.batch_size=4",
        "train.precision=float32",
        "search.rungs=[3]",
    ]
    return read_study(study, [*small, *overrides]).study


def setup_of(source: Path, cache: Path, *overrides: str) -> Setup:
    return scratch_study(source, *overrides).setup(str(cache))


def problem(source: Path, cache: Path, *overrides: str) -> tuple[str, str]:
    with pytest.raises(FieldError) as caught:
        find_base(setup_of(source, cache, *overrides))
    (found,) = caught.value.problems
    return found


def test_base_learns_the_rows_of_its_labels_and_the_study_has_the_others(shades: Path, tmp_path: Path) -> None:
    setup = setup_of(shades, tmp_path)
    place = find_base(setup)
    data = load_data(setup, place)
    assert data.labels == ("dark", "light")
    assert sum(len(split) for split in (data.train, data.validation, data.test)) == 28
    record = pretraining_record(place)
    assert record["labels"] == list(COLOURS) and record["train_rows"] + record["held_out_rows"] == 42
    processor = AutoImageProcessor.from_pretrained(place.path, backend="pil")
    model = AutoModelForImageClassification.from_pretrained(place.path)
    assert model.config.id2label == dict(enumerate(COLOURS))
    # The held-out rows, told by the base's own cached pixels, scored by transformers alone.
    by_pixels = {}
    for file in sorted(shades.rglob("*.png")):
        pixels = processor([Image.open(file)], return_tensors="np", do_rescale=False, do_normalize=False)
        by_pixels[pixels["pixel_values"].tobytes()] = file
    held_out, learnt = [], set()
    for path in tmp_path.glob("pixels-*.npy"):
        files = [by_pixels[one[None].tobytes()] for one in np.load(path)]
        if files[0].parent.name in COLOURS:
            assert {file.parent.name for file in files} <= set(COLOURS)
            learnt |= set(files) if path.stem.endswith("train") else set()
            held_out += [] if path.stem.endswith("train") else files
    assert len(held_out) == record["held_out_rows"] and not learnt & set(held_out)
    pixels = processor([Image.open(file) for file in held_out], return_tensors="pt")["pixel_values"]
    labels = torch.tensor([COLOURS.index(file.parent.name) for file in held_out])
    with torch.no_grad():
        logits = model.eval()(pixels).logits
    assert record["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert record["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_base_is_made_once_and_again_the_same_where_it_was_lost_or_damaged(shades: Path, tmp_path: Path) -> None:
    setup = setup_of(shades, tmp_path)
    first = find_base(setup)
    weights = load_file(Path(first.path) / "model.safetensors")
    stamp = (Path(first.path) / "model.safetensors").stat().st_mtime_ns
    assert find_base(setup) == first and (Path(first.path) / "model.safetensors").stat().st_mtime_ns == stamp
    shutil.rmtree(first.path)
    file = Path(find_base(setup).path) / "model.safetensors"
    again, content = load_file(file), file.read_bytes()
    file.unlink()  # tensors are mapped from it
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert Path(find_base(setup).path, "model.safetensors").read_bytes() == content
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
    for change in ("pretrain.seed=1", "pretrain.steps=11", "pretrain.learning_rate=1.0e-3", "search.seed=9"):
        assert find_base(setup_of(shades, tmp_path, change)) != first
    assert find_base(setup_of(shades, tmp_path, "train.steps=9", "search.rungs=[9]")) == first  # none of the base's


def test_a_lost_base_or_other_images_are_seen_when_a_study_goes_on(shades: Path, tmp_path: Path) -> None:
    source = tmp_path / "shades"
    shutil.copytree(shades, source)
    study, home = scratch_study(source), Home(tmp_path / "home")
    record = run_trials(study, home, ["r2-ratio1"])
    setup, executor, prepared = study.setup(str(home.cache)), InlineExecutor(), record.prepared
    assert prepared is not None and prepared.pretraining["labels"] == list(COLOURS)
    facts = dict(measured(study, record, find(study, record)))
    accuracy = f"{100 * prepared.pretraining['accuracy']:.1f} %"
    assert accuracy in facts["Base model"] and "blue, green, red" in facts["Base model"]
    assert facts["Images a step"] == "4" and "Tokens a step" not in facts and "tokens" not in facts["Data"]

    def go_on() -> None:
        located.cache_clear()
        tokenised.cache_clear()
        refuse_changed_inputs(executor, Work(), setup, prepared)

    shutil.rmtree(find_base(setup).path)
    go_on()  # made again, the same
    (source / "light" / "0.png").unlink()
    with pytest.raises(FieldError, match=r"data.source: .* has changed since the study began"):
        go_on()
    (source / "blue" / "0.png").unlink()
    with pytest.raises(FieldError, match="model: scratch has changed since the study began"):
        go_on()


@pytest.mark.parametrize("kind", [pytest.param("vit", marks=pytest.mark.slow), "resnet"])
def test_the_cards_program_gives_the_engines_logits_from_the_exports_folder(
    kind: str, shades: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base goes with the adapter; merged and fully fine-tuned models stand alone."""
    overrides: list[str] = []
    if kind == "resnet":
        config = "{layer_type: basic, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1]}"
        overrides = [f"pretrain.config={config}", "pretrain.image_size=8"]
    study = scratch_study(shades, *overrides, study=CONV if kind == "resnet" else VISION)
    home = Home(tmp_path / "home")
    record = run_trials(study, home, ["r8-ratio1", "full"])
    setup = study.setup(str(home.cache))
    place, data = find_base(setup), load_data(setup, find_base(setup))
    base = load_base(place, study.task, data.labels, 0, "float32", "eager")
    batch = few_rows(data)
    inputs = {"pixel_values": torch.from_numpy(batch.inputs["pixel_values"])}
    shutil.move(str(home.cache), tmp_path / "elsewhere")  # a user has the export alone
    exports = []
    for arm, merge in (("r8-ratio1", False), ("r8-ratio1", True), ("full", True)):
        trial, to = trial_of(record, arm), tmp_path / f"{arm}-{merge}"
        ours = _our_logits(base, trial.spec.arm, _weights_of(trial, merge), batch).float()
        exports.append((to, merge, ours))
        shutil.copytree(tmp_path / "elsewhere", home.cache, dirs_exist_ok=True)
        export(study, record, trial, to, merge, "Evidence.", home.cache)
        shutil.rmtree(home.cache)
    assert not torch.allclose(exports[0][2], base.model(**inputs).logits, atol=1e-3)
    for to, merge, ours in exports:
        assert (to / "base" / "model.safetensors").exists() != merge
        assert (to / "preprocessor_config.json").exists()
        program = (to / "README.md").read_text().split("```python")[1].split("```")[0]
        monkeypatch.chdir(to)
        found: dict[str, Any] = {}
        exec(program, found)
        with torch.no_grad():
            torch.testing.assert_close(found["model"].eval()(**inputs).logits, ours, atol=1e-5, rtol=0)
    config = json.loads((exports[0][0] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base" and config["modules_to_save"] == ["classifier"]


def test_what_makes_no_base_is_named(shades: Path, tmp_path: Path) -> None:
    def told(*overrides: str) -> tuple[str, str]:
        return problem(shades, tmp_path, *overrides)

    field, message = told("pretrain.architecture=vitt")
    assert field == "pretrain.architecture" and "did you mean vit" in message
    field, message = told("pretrain.config.hiden_size=16")
    assert field == "pretrain.config.hiden_size" and "did you mean hidden_size?" in message
    field, message = told("pretrain.config.hidden_size=many")
    assert field == "pretrain.config" and "hidden_size" in message and "expected int" in message
    field, message = told("pretrain.config.hidden_act=swoosh")
    assert field == "pretrain.config" and "makes no model that runs" in message and "swoosh" in message
    field, message = told("pretrain.config.num_channels=4")
    assert field == "pretrain.config.num_channels" and "1 for greys" in message
    field, message = told("pretrain.image_size=16")
    assert field == "pretrain.image_size" and "the second is enough" in message
    field, message = told("pretrain.architecture=resnet", "pretrain.config={}")
    assert field == "pretrain.image_size" and "to how many pixels" in message
    field, message = told("pretrain.labels=[blue, pink]")
    assert field == "pretrain.labels" and "'pink'; there are blue, dark, green, light, red" in message
    field, message = told("pretrain.labels=[blue, green, red, dark]")
    assert field == "pretrain.labels" and "leaves under two" in message
    field, message = told("pretrain.batch_size=64")
    assert field == "pretrain.batch_size" and "more than the 26 rows" in message
    field, message = told("pretrain.learning_rate=1.0e+30")
    assert field == "pretrain.learning_rate" and "diverged" in message
    assert not list(tmp_path.glob("base-*"))  # nothing half made is left behind


@pytest.mark.parametrize(
    ("overrides", "field", "words"),
    [
        (["data.max_length=32"], "data.max_length", "is for text"),
        (["data.text=body"], "data.text", "image-classification reads data.image and data.label"),
        (["data.messages=chat"], "data.messages", "is for text"),
        (["model=some/vit"], "pretrain", "goes with model: scratch"),
        (["pretrain=null"], "pretrain", "model: scratch needs it"),
        (["task=causal-lm", "data.image=null"], "pretrain", "is for image-classification"),
        (["task=causal-lm"], "data.image", "causal-lm reads text"),
        (["pretrain.labels=[1]"], "pretrain.labels", "at least 2"),
        (["pretrain.labels=[0, '0']"], "pretrain.labels", "names a label twice"),
        (["pretrain.stepps=1"], "pretrain.stepps", "did you mean steps?"),
    ],
)
def test_keys_of_another_task_are_refused(overrides: list[str], field: str, words: str) -> None:
    with pytest.raises(StudyError) as caught:
        read_study(VISION, overrides)
    found = {p.field: p.message for p in caught.value.problems}
    assert words in found[field]


def test_text_studies_have_the_defaults_that_they_had_and_refuse_an_image_column() -> None:
    quickstart = Path("studies/quickstart.yaml")
    raw: Any = read_study(quickstart).study.model_dump(mode="json")
    for key in ("text", "max_length", "image"):
        del raw["data"][key]
    data = Study.model_validate(raw).data
    assert (data.text, data.max_length, data.image) == ("text", 128, None)
    with pytest.raises(StudyError, match=r"data\.image: is for image-classification"):
        read_study(quickstart, ["data.image=picture"])


def test_dumped_study_reads_as_it_was() -> None:
    """The home keeps the study with its defaults written out; a later run is held against that."""
    study = read_study(VISION).study
    assert study.data.image == "image" and study.data.text is None and study.data.max_length is None
    assert Study.model_validate(study.model_dump(mode="json")) == study


@pytest.mark.slow
@pytest.mark.parametrize("study", [VISION, CONV], ids=["vit", "resnet"])
def test_the_studies_run_small_through_the_command(study: Path, tmp_path: Path) -> None:
    small = ["pretrain.steps=60", "train.steps=4", "search.rungs=[2, 4]", "confirm.seeds=[1, 2]"]
    words = [part for one in small for part in ("--set", one)]
    words = ["run", str(study), *words, "--set", "arms.rank=[2, 64]", "--set", "arms.alpha_ratio=[1]"]
    done = sweep(*words, "--home", str(tmp_path / "home"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name = study.stem
    report = (tmp_path / "reports" / name / "report.md").read_text()
    assert "Base model:" in report and "Accuracy" in report and "tokens" not in report.lower()
    again = sweep(*words, "--home", str(tmp_path / "home"), cwd=tmp_path)
    assert again.returncode == 0 and "nothing to train" in again.stdout
    merged = sweep(
        *["export", name, "--arm", "full", "--merge", "--to", "m", "--home", str(tmp_path / "home")], cwd=tmp_path
    )
    assert merged.returncode == 0, merged.stderr
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "m").config.id2label[0] == "5"

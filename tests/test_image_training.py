"""Images train as text does: a trial is the same packed, alone and in PEFT; what comes out loads with equal logits."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from image_parts import COLOURS, SIZE, image_setup, save_folders, save_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft_reference import arm, curve, prepared_for, train, trial, weights_of
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, get_linear_schedule_with_warmup

from sweep.adapters.answers import common_task
from sweep.adapters.peft_format import read_adapter
from sweep.adapters.serve import load_serving_base
from sweep.study.arms import Arm, full_arm
from sweep.study.errors import FieldError
from sweep.study.records import Prepared, Setup, TrialSpec
from sweep.training.base import check_arm, target_layers
from sweep.training.batches import step_rows
from sweep.training.calibration import packs_see_rows
from sweep.training.prepare import chance, prepare
from sweep.training.rung import base_for, fresh_state, tokenised

STEPS = 6
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]  # what all-linear names in a ViT
PACKS = {
    "vit": [
        arm(2, 1, ("q_proj", "v_proj")),
        arm(8, 2, ("all-linear",)),
        arm(4, 1, ("projection", "fc1")),  # the convolution that makes patches, and a linear layer
        arm(2, 0.5, ("q_proj", "v_proj"), "rslora"),
    ],
    "resnet": [
        arm(2, 1, ("convolution",)),
        arm(4, 2, ("layer.0.convolution", "shortcut.convolution")),
        arm(2, 0.5, ("convolution",), "rslora"),
        arm(8, 1, ("layer.1.convolution",)),
    ],
}


@pytest.fixture(scope="module", params=["vit", "resnet"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Setup, Prepared]:
    folder = tmp_path_factory.mktemp(request.param)
    setup = image_setup(save_model(request.param, folder / "model"), save_folders(folder / "data"), folder / "cache")
    return request.param, setup, prepared_for(setup)


def reference_rows(setup: Setup) -> tuple[torch.Tensor, torch.Tensor]:
    """The training rows by Pillow and transformers alone: those whose pixels the study trains on, in its order."""
    processor = AutoImageProcessor.from_pretrained(setup.model, backend="pil")
    files = sorted(Path(setup.data.source).rglob("*.png"))
    pixels_NCHW = processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    classes_N = torch.tensor([COLOURS.index(file.parent.name) for file in files])
    wanted = torch.from_numpy(tokenised(setup).train.read(np.arange(len(tokenised(setup).train))))
    places = [int((pixels_NCHW - one).abs().amax((1, 2, 3)).argmin()) for one in wanted]
    assert len(set(places)) == len(wanted)
    return pixels_NCHW[places], classes_N[places]


def peft_training(setup: Setup, prepared: Prepared, one: TrialSpec) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A plain loop over a PEFT model, the model in evaluation mode (batch normalisation keeps its statistics)."""
    base = AutoModelForImageClassification.from_pretrained(setup.model, num_labels=3, ignore_mismatched_sizes=True)
    if one.arm.is_full:
        model: torch.nn.Module = base.eval()
    else:
        modules = LINEAR if one.arm.target_modules == ("all-linear",) else list(one.arm.target_modules)
        config = LoraConfig(
            r=one.arm.r,
            lora_alpha=one.arm.lora_alpha,  # type: ignore[arg-type]
            target_modules=modules,
            modules_to_save=["classifier"],
            use_rslora=one.arm.method == "rslora",
        )
        model = get_peft_model(base, config).eval()
    named = {our_name(name): p for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, value in fresh_state(base_for(setup, prepared, one.arm), one, setup.train).items():
            named[name].copy_(value)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=one.learning_rate, weight_decay=0.0)
    warm = int(np.ceil(setup.train.warmup * setup.train.steps))
    schedule = get_linear_schedule_with_warmup(optimizer, warm, setup.train.steps)
    pixels_NCHW, classes_N = reference_rows(setup)
    losses = []
    for rows in step_rows(np.ones(len(classes_N)), setup.train.batch_size, one.seed, 0, STEPS):
        loss = model(pixel_values=pixels_NCHW[rows], labels=classes_N[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, setup.train.clip or float("inf"))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in named.items() if p.requires_grad}


def our_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")


def test_trials_of_a_mixed_pack_have_the_losses_and_weights_that_peft_gives_each(
    small: tuple[str, Setup, Prepared], tmp_path: Path
) -> None:
    kind, setup, prepared = small
    trials = [trial(i, one, (3e-3, 1e-2)[i % 2], 1 + i % 3, tmp_path) for i, one in enumerate(PACKS[kind])]
    packed = train(setup, prepared, trials, [STEPS])
    for one in trials:
        losses, state = peft_training(setup, prepared, one)
        np.testing.assert_allclose(curve(packed[one.number]), losses, atol=1e-4, rtol=0)
        weights = weights_of(one, packed[one.number][-1])
        assert set(weights) == set(state)
        for name, value in state.items():
            torch.testing.assert_close(weights[name], value, atol=2e-4, rtol=0)
            if "lora_B" in name:
                assert value.abs().max() > 1e-3, f"{name} never moved, so the test would be blind"


def test_full_finetuning_is_the_plain_loop_over_all_weights(small: tuple[str, Setup, Prepared], tmp_path: Path) -> None:
    _, setup, prepared = small
    one = trial(0, full_arm(), 1e-3, 2, tmp_path)
    (measurement,) = train(setup, prepared, [one], [STEPS])[0]
    losses, state = peft_training(setup, prepared, one)
    np.testing.assert_allclose(measurement.train_loss, losses, atol=1e-4, rtol=0)
    weights = weights_of(one, measurement)
    for name, value in state.items():
        torch.testing.assert_close(weights[name], value, atol=2e-4, rtol=0)
    assert measurement.tokens == STEPS * setup.train.batch_size  # an image counts as one
    assert measurement.test_metrics.keys() == {"test_loss", "test_accuracy"}


def test_splitting_the_batch_or_the_rung_changes_no_image_trial(
    small: tuple[str, Setup, Prepared], tmp_path: Path
) -> None:
    kind, setup, prepared = small
    trials = [trial(i, one, 3e-3, 1, tmp_path / "a") for i, one in enumerate(PACKS[kind])]
    whole = train(setup, prepared, trials, [4])
    parts = image_setup(setup.model, setup.data.source, Path(setup.cache), micro_batch_size=3)
    again = [trial(i, one, 3e-3, 1, tmp_path / "b") for i, one in enumerate(PACKS[kind])]
    split = train(parts, prepared, again, [2, 4])
    for one in trials:
        np.testing.assert_allclose(curve(whole[one.number]), curve(split[one.number]), atol=1e-5, rtol=0)


def test_prepare_chooses_a_pack_and_counts_images(small: tuple[str, Setup, Prepared]) -> None:
    kind, setup, _ = small
    arms = (*PACKS[kind][:2], full_arm())
    prepared = prepare(setup, arms)
    assert prepared.tokens_per_step == setup.train.batch_size and prepared.labels == COLOURS
    assert prepared.rows == {"train": 28, "validation": 10, "test": 10}
    assert prepared.chance_loss == pytest.approx(np.log(3), abs=0.05) == chance(tokenised(setup))[0]
    assert prepared.pack_size >= 1 and packs_see_rows(setup, prepared, arms[0])


def base_of(kind: str, tmp_path: Path) -> tuple[Setup, Prepared]:
    setup = image_setup(save_model(kind, tmp_path / "model"), save_folders(tmp_path / "data", 6), tmp_path / "cache")
    return setup, prepared_for(setup)


def test_all_linear_on_a_convnet_without_linear_layers_says_what_to_write(tmp_path: Path) -> None:
    setup, prepared = base_of("resnet", tmp_path)
    with pytest.raises(FieldError, match=r"no linear layer; name its other layers .* \[\[convolution\]\]"):
        check_arm(base_for(setup, prepared, arm(2, 1)), arm(2, 1, ("all-linear",)))
    with pytest.raises(FieldError, match="rank 64 is larger than layer"):
        check_arm(base_for(setup, prepared, arm(2, 1)), arm(64, 1, ("convolution",)))


def test_convnext_takes_adapters_on_its_linear_layers_and_not_on_its_depthwise_convolutions(tmp_path: Path) -> None:
    setup, prepared = base_of("convnext", tmp_path)
    one = arm(2, 1, ("all-linear",))
    base = base_for(setup, prepared, one)
    assert {name.split(".")[-1] for name in target_layers(base.model, base.head, one.target_modules)} == {
        "pwconv1",
        "pwconv2",
    }
    with pytest.raises(FieldError, match="no layer's name ends in 'dwconv'"):
        target_layers(base.model, base.head, ("dwconv",))
    (found,) = train(setup, prepared, [trial(0, one, 1e-2, 1, tmp_path)], [2])[0]
    assert found.diverged_at is None


@pytest.mark.parametrize("one", [arm(2, 1, ("convolution",)), full_arm()], ids=["lora", "full"])
def test_bfloat16_takes_images_too(one: Arm, tmp_path: Path) -> None:
    """The frozen base is bfloat16 and so must the pixels be; full fine-tuning runs under autocast."""
    setup, prepared = base_of("resnet", tmp_path)
    half = Prepared(**{**vars(prepared), "precision": "bfloat16"})
    exact, rounded = (
        train(setup, p, [trial(0, one, 3e-3, 1, tmp_path / p.precision)], [3])[0][0].train_loss
        for p in (prepared, half)
    )
    np.testing.assert_allclose(rounded, exact, rtol=0.05)
    assert rounded != exact


def test_adapters_for_images_answer_in_one_batch_as_in_peft_and_answer_no_texts(tmp_path: Path) -> None:
    place = save_model("resnet", tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(place).eval()
    names = ("a", "b")
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        config = LoraConfig(r=2 + seed, target_modules=["convolution"], modules_to_save=["classifier"])
        model = get_peft_model(copy.deepcopy(base), config)
        for key, p in model.named_parameters():
            if ".lora_" in key or ".modules_to_save." in key:
                torch.nn.init.normal_(p, std=0.3)
        model.save_pretrained(tmp_path / name)
    serving = load_serving_base(str(place), "image-classification", ("x", "y"), attention="eager")
    pixels = torch.randn(4, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = [base(pixels).logits]
        for name in names:
            serving.add(name, tmp_path / name)
            peft = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / name)).eval()
            expected.append(peft(pixels).logits)
    rows = ["b", None, "a", "b"]
    wanted = torch.stack([expected[[None, *names].index(name)][i] for i, name in enumerate(rows)])
    torch.testing.assert_close(serving.logits({"pixel_values": pixels}, rows), wanted, atol=3e-5, rtol=1e-5)

    (tmp_path / "a" / "sweep.json").write_text('{"task": "image-classification"}')
    with pytest.raises(FieldError, match="answers no text"):
        common_task([read_adapter(tmp_path / "a")])

"""Small image models with random weights, and small folders of images, for the tests of image classification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from sweep.study.records import DataSettings, Setup, TrainSettings

SIZE = 8
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
COLOURS = ("blue", "green", "red")
CONFIGS: dict[str, Any] = {
    "vit": transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=SIZE,
        patch_size=4,
    ),
    "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"),
    "convnext": transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2),
}


def save_model(kind: str, folder: Path) -> Path:
    """A model with a head for two labels and an image processor of its own mean and deviation, saved."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageClassification.from_config(CONFIGS[kind])
    with torch.no_grad():
        if kind == "vit":  # at the usual 0.02 a small model hardly answers to its layers
            for p in model.parameters():
                p.mul_(6 if p.ndim >= 2 else 1)
        for name, buffer in model.named_buffers():  # of batch normalisation: not those of a fresh model
            if "running_mean" in name:
                buffer.copy_(0.2 * torch.randn_like(buffer))
            elif "running_var" in name:
                buffer.copy_(0.3 + 0.4 * torch.rand_like(buffer))
    model.save_pretrained(folder)
    sides = {"height": SIZE, "width": SIZE}
    transformers.ViTImageProcessorPil(size=sides, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder


def picture(rng: np.random.Generator, colour: str, side: int = 10) -> Image.Image:
    """Noise that is stronger in the channel of its colour."""
    pixels_HWC = rng.integers(0, 120, (side, side, 3)).astype(np.uint8)
    pixels_HWC[..., ("red", "green", "blue").index(colour)] += np.uint8(100)
    return Image.fromarray(pixels_HWC)


def save_folders(folder: Path, rows: int = 16) -> Path:
    """Class folders of PNG files."""
    rng = np.random.default_rng(3)
    for colour in COLOURS:
        (folder / colour).mkdir(parents=True)
        for i in range(rows):
            picture(rng, colour).save(folder / colour / f"{i:02d}.png")
    return folder


def image_setup(model: Path | str, source: Path | str, cache: Path, **train: Any) -> Setup:
    data = DataSettings(str(source), 0, 0.2, 0.2, image="image")
    settings = TrainSettings(**{"steps": 6, "batch_size": 4, "warmup": 0.25, "precision": "float32", **train})
    return Setup(str(model), "image-classification", data, settings, 0, str(cache))

"""Image rows: where they come from, what their pixels become, and what is refused."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from image_parts import COLOURS, MEAN, STD, image_setup, picture, save_folders, save_model
from PIL import Image
from transformers import AutoImageProcessor, ViTImageProcessorPil

from sweep.study.errors import FieldError
from sweep.training import images
from sweep.training.data import TokenisedData, load_data
from sweep.training.locate import ModelPlace, locate_model
from sweep.training.pictures import Picture, decode


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> ModelPlace:
    return locate_model(str(save_model("vit", tmp_path_factory.mktemp("vit"))))


def load(source: Path | str, place: ModelPlace, cache: Path, **data: Any) -> TokenisedData:
    setup = image_setup(place.path, source, cache)
    changed = {**vars(setup.data), **data}
    return load_data(type(setup)(**{**vars(setup), "data": type(setup.data)(**changed)}), place)


def problem(source: Path | str, place: ModelPlace, cache: Path, **data: Any) -> tuple[str, str]:
    with pytest.raises(FieldError) as caught:
        load(source, place, cache, **data)
    return caught.value.problems[0]


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def table(rows: int = 30) -> datasets.Dataset:
    """A set as the hub has it: an image column and one of named classes."""
    rng = np.random.default_rng(0)
    found = {"picture": [picture(rng, COLOURS[i % 3]) for i in range(rows)], "colour": [i % 3 for i in range(rows)]}
    kinds = {"picture": datasets.Image(), "colour": datasets.ClassLabel(names=list(COLOURS))}
    return datasets.Dataset.from_dict(found, features=datasets.Features(kinds))


def all_pixels(data: TokenisedData) -> np.ndarray:
    splits = (data.train, data.validation, data.test)
    return np.concatenate([split.read(np.arange(len(split))) for split in splits])


def test_pixels_are_those_of_the_models_own_image_processor(vit: ModelPlace, tmp_path: Path) -> None:
    data = load(save_folders(tmp_path / "data"), vit, tmp_path / "cache")
    assert (len(data.train), len(data.validation), len(data.test), data.labels) == (28, 10, 10, COLOURS)
    assert data.train.pixels_NCHW.dtype == np.uint8 and isinstance(data.train.pixels_NCHW, np.memmap)
    processor = AutoImageProcessor.from_pretrained(vit.path, backend="pil")
    files = sorted((tmp_path / "data").rglob("*.png"))
    expected = processor([Image.open(file) for file in files], return_tensors="np")["pixel_values"]
    found = all_pixels(data)
    order = [np.abs(expected - one).max((1, 2, 3)).argmin() for one in found]
    assert sorted(order) == list(range(48))
    np.testing.assert_allclose(found, expected[order], atol=1e-6)
    classes = np.concatenate([split.labels for split in (data.train, data.validation, data.test)])
    assert [COLOURS[i] for i in classes] == [files[at].parent.name for at in order]


def test_a_processor_that_does_more_than_scale_keeps_its_own_floats(
    vit: ModelPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gamma(ViTImageProcessorPil):
        def __call__(self, *words: Any, **settings: Any) -> Any:
            found = super().__call__(*words, **settings)
            found["pixel_values"] = np.sign(found["pixel_values"]) * np.abs(found["pixel_values"]) ** 2
            return found

    strange = Gamma(size={"height": 8, "width": 8}, image_mean=MEAN, image_std=STD)
    monkeypatch.setattr(images, "load_image_processor", lambda place: strange)
    source = save_folders(tmp_path / "data", 6)
    data = load(source, vit, tmp_path / "cache")
    assert data.train.pixels_NCHW.dtype == np.float32
    first = Image.open(source / "blue" / "00.png")
    expected = strange([first], return_tensors="np")["pixel_values"][0]
    assert min(np.abs(one - expected).max() for one in all_pixels(data)) < 1e-6


def test_folders_parquet_hub_and_file_names_give_the_same_rows(
    vit: ModelPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = table()
    rows.to_parquet(tmp_path / "rows.parquet")
    for i, row in enumerate(rows):
        folder = tmp_path / "folders" / COLOURS[row["colour"]]
        folder.mkdir(parents=True, exist_ok=True)
        row["picture"].save(folder / f"{i:02d}.bmp")
    names = sorted(p.relative_to(tmp_path) for p in (tmp_path / "folders").rglob("*.bmp"))
    lines = [f"{name},{name.parent.name}" for name in names]
    (tmp_path / "rows.csv").write_text("\n".join(["picture,colour", *lines]))
    monkeypatch.setattr("sweep.training.sources.hub_problem", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: rows)
    columns = {"image": "picture", "label": "colour"}
    cache = tmp_path / "cache"
    by_name = [load(tmp_path / name, vit, cache, **columns) for name in ("folders", "rows.csv")]
    hub, parquet = load("some/colours", vit, cache, **columns), load(tmp_path / "rows.parquet", vit, cache, **columns)
    assert by_name[0].fingerprint == by_name[1].fingerprint
    assert hub.labels == by_name[0].labels == COLOURS and parquet.labels == ("0", "1", "2")
    for other in (by_name[1], hub, parquet):
        ours, theirs = (np.sort(all_pixels(data).reshape(30, -1), axis=0) for data in (by_name[0], other))
        np.testing.assert_array_equal(ours, theirs)


def test_the_same_pixels_twice_are_one_row_however_they_are_encoded(vit: ModelPlace, tmp_path: Path) -> None:
    folder = save_folders(tmp_path / "data", 10)
    first = Image.open(folder / "red" / "00.png")
    first.save(folder / "red" / "again.bmp")
    first.save(folder / "blue" / "again.png", compress_level=1)
    data = load(folder, vit, tmp_path / "cache")
    assert data.duplicates_removed == 2
    assert len(np.unique(all_pixels(data).reshape(30, -1), axis=0)) == 30


def test_greys_of_16_bits_keep_their_range_and_32_bits_are_refused(tmp_path: Path) -> None:
    grey_HW = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(grey_HW.astype(np.uint16)).save(tmp_path / "16.png")
    seen = np.asarray(decode(Picture(tmp_path / "16.png", "16.png")))
    np.testing.assert_array_equal(seen, np.repeat(np.rint(grey_HW / 65535 * 255)[..., None], 3, axis=2))
    Image.fromarray(grey_HW.astype(np.float32)).save(tmp_path / "32.tiff")
    with pytest.raises(FieldError, match=r"32\.tiff has 32 bits a pixel, of no known range; save it with 16"):
        decode(Picture(tmp_path / "32.tiff", "32.tiff"))


def test_images_are_decoded_and_prepared_once(vit: ModelPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = save_folders(tmp_path / "data", 8), tmp_path / "cache"
    decoded: list[str] = []
    for module in ("sweep.training.images", "sweep.training.pictures"):
        decode = sys.modules[module].decode
        monkeypatch.setattr(f"{module}.decode", lambda p, decode=decode: (decoded.append(p.where), decode(p))[1])
    first = load(folder, vit, cache)
    pixels = all_pixels(first)
    assert len(decoded) == 24 + 1 + 24  # the digests, a look at the processor, the pixels
    again = load(folder, vit, cache)
    assert len(decoded) == 49 + 1
    np.testing.assert_array_equal(pixels, all_pixels(again))
    damaged = next(cache.glob("pixels-*-test.npy"))
    whole = damaged.read_bytes()
    for spoiled in (whole[:200], whole[:-1], b"", whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:]):
        damaged.unlink()  # an array that maps it keeps its pixels
        damaged.write_bytes(spoiled)
        np.testing.assert_array_equal(pixels, all_pixels(load(folder, vit, cache)))
    digests = next(cache.glob("images-*.json"))
    digests.write_text(digests.read_text().replace("a", "b"))
    assert load(folder, vit, cache).fingerprint == first.fingerprint
    picture(np.random.default_rng(9), "red").save(folder / "red" / "00.png")
    assert load(folder, vit, cache).fingerprint != first.fingerprint


def test_digits_are_scikit_learns_and_greys_stay_one_channel(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    greys = ViTImageProcessorPil(size={"height": 8, "width": 8}, do_normalize=False, image_mean=[0.0], image_std=[1.0])
    greys.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "vit"}')
    data = load("sklearn:digits", locate_model(str(tmp_path / "model")), tmp_path / "cache")
    expected = load_digits()
    found = all_pixels(data)
    assert found.shape == (1797, 1, 8, 8) and data.labels == tuple("0123456789")
    theirs = np.sort((expected.images / 16).reshape(1797, -1), axis=0)
    np.testing.assert_allclose(np.sort(found.reshape(1797, -1), axis=0), theirs, atol=0.5 / 255 + 1e-6)
    counts = np.bincount(np.concatenate([s.labels for s in (data.train, data.validation, data.test)]))
    assert counts.tolist() == np.bincount(expected.target).tolist()


def test_what_cannot_be_used_is_named(vit: ModelPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    table().to_parquet(tmp_path / "rows.parquet")
    field, message = problem(tmp_path / "rows.parquet", vit, cache, label="colour")
    assert field == "data.image" and "no column 'image'" in message and "picture" in message
    field, message = problem(tmp_path / "rows.parquet", vit, cache, image="colour", label="colour")
    assert field == "data.image" and "row 1" in message and "no image but int" in message
    (tmp_path / "rows.csv").write_text("image,label\ngone.png,a\n")
    assert problem(tmp_path / "rows.csv", vit, cache) == (
        "data.image",
        f"row 1 of {tmp_path}/rows.csv: there is no file {tmp_path}/gone.png",
    )
    folder = save_folders(tmp_path / "data", 4)
    (folder / "red" / "00.png").write_bytes(b"not an image")
    field, message = problem(folder, vit, cache)
    assert field == "data.image" and "red/00.png cannot be decoded" in message
    (folder / "red" / "notes.md").write_text("")
    field, message = problem(folder, vit, cache)
    assert field == "data.source" and "notes.md" in message and ".png" in message
    field, message = problem("sklearn:iris", vit, cache)
    assert field == "data.source" and "sklearn:digits" in message
    field, message = problem("sklearn:digits", vit, cache, test="test")
    assert field == "data.test" and "give a fraction" in message
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert problem("sklearn:digits", vit, cache) == (
        "data.source",
        "sklearn:digits needs scikit-learn: `pip install scikit-learn`",
    )


def test_a_model_without_an_image_processor_is_refused(vit: ModelPlace, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((Path(vit.path) / "config.json").read_text())
    bare = locate_model(str(tmp_path / "model"))
    field, message = problem(save_folders(tmp_path / "data", 4), bare, tmp_path / "cache")
    assert field == "model" and "preprocessor_config.json" in message


def test_images_of_a_text_study_are_refused(vit: ModelPlace, tmp_path: Path) -> None:
    setup = image_setup(vit.path, "sklearn:digits", tmp_path)
    text = type(setup)(**{**vars(setup), "task": "sequence-classification"})
    with pytest.raises(FieldError, match="holds images: use task: image-classification"):
        load_data(text, vit)


def test_unlabelled_and_empty_cells_are_counted(vit: ModelPlace, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cells = [{"bytes": encoded(picture(rng, "red"), "PNG"), "path": None}, {"bytes": None, "path": None}]
    rows = {"image": cells * 2, "label": ["a", "b", None, "b"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(FieldError) as caught:
        load(tmp_path / "rows.parquet", vit, tmp_path / "cache")
    fields = dict(caught.value.problems)
    assert "2 rows have no image (first: row 2)" in fields["data.image"]
    assert "one row has no label (first: row 3)" in fields["data.label"]

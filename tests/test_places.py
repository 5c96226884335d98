"""Where checkpoints go: the home, another folder, a bucket on a real S3 server. The study is the same everywhere."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from commands import sweep
from driving import Killed, journal_view, optuna_view, records_of, run, trials_of
from fakes import fake_work, make_study, train_rung
from object_stores import SECRET, Bucket, bucket

from sweep.doctor import examine
from sweep.study.errors import FieldError
from sweep.study.home import Home
from sweep.study.records import Measurement, Unit
from sweep.study.schema import Study
from sweep.tracking import remote
from sweep.tracking.remote import PlaceError, as_place


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def small_study() -> Study:
    """Each of its files is a request to a server that Python serves."""
    return make_study(
        arms={"rank": [2, 8], "alpha_ratio": [1.0], "full_finetuning": True},
        tune={"learning_rate": [1e-3, 1e-2], "full_finetuning": {"learning_rate": [1e-5, 1e-4]}},
        confirm={"seeds": [1], "reference": 8, "epsilon": 0.05},
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = Home(tmp_path_factory.mktemp("done"))
    run(home, small_study())
    return home


@pytest.fixture(scope="module")
def s3() -> Iterator[Bucket]:
    with bucket() as found:
        yield found


def interrupted(home: Home, study: Study, checkpoints: str, rungs: int = 5) -> None:
    trained = 0

    def train(unit: Unit) -> tuple[Measurement, ...]:
        nonlocal trained
        trained += 1
        found = train_rung(unit)
        if trained > rungs:
            raise Killed  # what it wrote is there, and nobody heard of it
        return found

    with pytest.raises(Killed):
        run(home, study, fake_work(train), checkpoints=checkpoints)


def named(home: Home, study: Study) -> set[str]:
    """Files of checkpoints that may be there, relative to the place of this run of the study."""
    files = ("checkpoint.json", "weights.safetensors", "test-rows.safetensors")
    kept = [(t.spec, t.kept) for t in records_of(home, study).trials if t.kept]
    return {
        f"{spec.number}/{saved.name}/{file}"
        for spec, saved in kept
        for file in files
        if spec.phase == "confirm" or "rows" not in file
    }


def test_a_study_whose_checkpoints_go_to_a_bucket_is_the_same_study_killed_or_not(
    home: Home, done: Home, s3: Bucket
) -> None:
    study = small_study()
    interrupted(home, study, s3.url)
    run(home, study, checkpoints=s3.url)
    record = records_of(home, study)
    assert journal_view(record) == journal_view(records_of(done, study))
    assert optuna_view(trials_of(home, study)) == optuna_view(trials_of(done, study))
    assert not list(home.root.rglob("checkpoints")), "nothing of them lies in the home"
    mine = record.place.removeprefix(f"{s3.url}/")
    assert re.fullmatch(r"fake/[0-9a-f]{12}", mine)
    assert {n.removeprefix(f"{mine}/") for n in s3.names() if n.startswith(mine)} == named(home, study)
    assert not any(SECRET.encode() in path.read_bytes() for path in home.root.rglob("*") if path.is_file())


@pytest.mark.parametrize("form", ["{}", "file://{}", "local://{}"])
def test_another_folder_is_named_by_its_path_or_its_url(home: Home, done: Home, tmp_path: Path, form: str) -> None:
    study, share = small_study(), tmp_path / "share"
    interrupted(home, study, form.format(share))
    run(home, study)  # goes on where it was, whatever the environment says by now
    record = records_of(home, study)
    assert journal_view(record) == journal_view(records_of(done, study))
    assert Path(record.place).parent == share / "fake"
    found = {str(path.relative_to(record.place)) for path in Path(record.place).rglob("*") if path.is_file()}
    assert found == named(home, study)
    assert not list(home.root.rglob("checkpoints"))


def test_two_homes_with_studies_of_one_name_share_a_bucket(tmp_path: Path, done: Home, s3: Bucket) -> None:
    study, homes = small_study(), [Home(tmp_path / name) for name in ("one", "other")]
    for home in homes:
        interrupted(home, study, s3.url)
    for home in homes:
        run(home, study, checkpoints=s3.url)
        assert journal_view(records_of(home, study)) == journal_view(records_of(done, study))
    one, other = [records_of(home, study).place for home in homes]
    assert one != other


@pytest.mark.parametrize("spoil", ["cut short", "gone"])
def test_what_is_damaged_in_a_bucket_is_made_again(home: Home, done: Home, s3: Bucket, spoil: str) -> None:
    study = small_study()
    interrupted(home, study, s3.url)
    trial = next(t for t in records_of(home, study).trials if t.state is None and t.kept)
    assert trial.kept is not None
    name = f"{trial.spec.place.removeprefix(f'{s3.url}/')}/{trial.kept.name}/weights.safetensors"
    if spoil == "gone":
        s3.remove(name)
    else:
        s3.write(name, s3.read(name)[:-1])
    run(home, study, checkpoints=s3.url)
    record = records_of(home, study)
    assert journal_view(record)[:-1] == journal_view(records_of(done, study))[:-1]
    (warning,) = record.warnings
    assert warning.startswith(f"the checkpoint of trial {trial.spec.number} (") and "with the same losses" in warning


def test_a_place_is_left_only_for_one_that_holds_the_checkpoints(home: Home, done: Home, s3: Bucket) -> None:
    study, elsewhere = small_study(), f"{s3.url}/elsewhere"
    interrupted(home, study, s3.url)
    place = records_of(home, study).place
    moved = f"{elsewhere}/fake/{place.rpartition('/')[2]}"
    with pytest.raises(FieldError) as caught:
        run(home, study, checkpoints=elsewhere)
    assert str(caught.value) == (
        f"checkpoints: those of study fake lie in {place}: copy {place} to {moved} first, or give the place as it was"
    )
    s3.copy(place.removeprefix(f"{s3.url}/"), moved.removeprefix(f"{s3.url}/"))
    run(home, study, checkpoints=elsewhere)
    assert records_of(home, study).place == moved
    assert journal_view(records_of(home, study)) == journal_view(records_of(done, study))


def test_a_study_that_began_in_its_home_stays_there(home: Home, s3: Bucket) -> None:
    study = small_study()
    interrupted(home, study, "")
    with pytest.raises(FieldError, match="lie in its home: leave it out, or give the study another name"):
        run(home, study, checkpoints=s3.url)


def test_a_share_that_is_not_mounted_is_no_reason_to_train_all_anew(home: Home, done: Home, tmp_path: Path) -> None:
    study, share = small_study(), tmp_path / "share"
    interrupted(home, study, str(share))
    share.rename(tmp_path / "away")
    with pytest.raises(PlaceError, match=r"checkpoints: .* holds none of study fake any more: is it mounted\?"):
        run(home, study, checkpoints=str(share))
    assert not share.exists()
    (tmp_path / "away").rename(share)
    run(home, study, checkpoints=str(share))
    assert journal_view(records_of(home, study)) == journal_view(records_of(done, study))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nope://bucket/x", "checkpoints: fsspec knows no nope://; it knows "),
        ("gs://bucket/x", "checkpoints: the package for gs:// is not installed: Please install gcsfs"),
        ("s3://", "checkpoints: s3:// names no bucket or folder"),
        (f"sftp://me:{SECRET}@host/x", "checkpoints: the URL holds a password or a key: give it in the environment ("),
        (f"s3://bucket/x?secret={SECRET}", "checkpoints: the URL holds a password or a key"),
    ],
)
def test_a_url_that_cannot_be_used_is_told_in_a_line_that_names_the_field(place: str, message: str) -> None:
    with pytest.raises(FieldError) as caught:
        as_place(place)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value) and SECRET not in str(caught.value)


def test_the_missing_package_of_a_bucket_is_named_as_our_extra() -> None:
    program = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from sweep.tracking.remote import as_place\n"
        "try: as_place('s3://bucket/x')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    told = "checkpoints: the package for s3:// is not installed: pip install 'lora-sweep[s3]'"
    assert done.stdout.strip() == told


def test_a_bucket_that_does_not_exist_stops_the_study_before_anything_is_trained(home: Home, s3: Bucket) -> None:
    study = small_study()

    def train(unit: Unit) -> tuple[Measurement, ...]:
        raise AssertionError("trained")

    with pytest.raises(PlaceError, match=r"^checkpoints: s3://nobodys/x/fake/\w+: no such bucket or folder"):
        run(home, study, fake_work(train), checkpoints="s3://nobodys/x")
    assert not records_of(home, study).prepared
    with pytest.raises(PlaceError, match="no such bucket"):  # and none was made
        remote.try_writing("s3://nobodys/x")


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_trained(home: Home, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PlaceError, match=r"^checkpoints: /.*/file/x/fake/\w+ cannot be used: NotADirectoryError"):
        run(home, make_study(), checkpoints=str(tmp_path / "file" / "x"))


def test_a_worker_tries_the_place_before_it_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It may have other rights than the driver, and a rung is long."""
    from sweep.study.arms import full_arm
    from sweep.study.records import TrialSpec
    from sweep.tracking.store import try_place

    tried: list[str] = []
    monkeypatch.setattr(remote, "try_writing", tried.append)
    try_place(TrialSpec(3, full_arm(), 1e-3, 0, "search", str(tmp_path), "s3://bucket/x/fake/0123/3"))
    try_place(TrialSpec(3, full_arm(), 1e-3, 0, "search", str(tmp_path)))
    assert tried == ["s3://bucket/x/fake/0123"]


def test_without_a_url_fsspec_is_not_loaded(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from fakes import make_study\nfrom driving import run\nfrom pathlib import Path\n"
        "from sweep.study.home import Home\n"
        "run(Home(Path(sys.argv[2])), make_study(), checkpoints=sys.argv[3])\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('fsspec', 'torch')])"
    )
    words = [str(Path(__file__).parent), str(tmp_path / "home"), str(tmp_path / "share")]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_doctor_tries_the_place_that_the_environment_names(
    tmp_path: Path, s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, told, ok in (
        (s3.url, f"{s3.url} can be written", True),
        ("s3://nobodys/y", "SWEEP_CHECKPOINTS: s3://nobodys/y: no such bucket or folder", False),
        ("nope://x", "SWEEP_CHECKPOINTS: fsspec knows no nope://", False),
    ):
        monkeypatch.setenv("SWEEP_CHECKPOINTS", place)
        (check,) = [check for check in examine(Home(tmp_path)) if check.name == "checkpoints"]
        assert check.found.startswith(told) and check.ok is ok


def test_the_environment_wins_over_the_file_and_errors_name_the_field(tmp_path: Path) -> None:
    study = make_study().model_dump(exclude_none=True)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**study, "checkpoints": "nope://file"}))
    done = sweep("run", "s.yaml", "--home", "home", cwd=tmp_path)
    assert done.returncode == 2 and ": checkpoints: fsspec knows no nope://" in done.stderr
    done = sweep("run", "s.yaml", "--home", "home", cwd=tmp_path, SWEEP_CHECKPOINTS="never://mind")
    assert done.returncode == 2 and ": checkpoints: fsspec knows no never://" in done.stderr
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**study, "checkpoints": f"ftp://me:{SECRET}@host/x"}))
    done = sweep("run", "s.yaml", "--home", "home", cwd=tmp_path)
    assert done.returncode == 2 and ": checkpoints: the URL holds a password or a key" in done.stderr
    assert SECRET not in done.stderr + done.stdout and "Traceback" not in done.stderr

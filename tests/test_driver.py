"""The driver with a fake trainer: what it asks, how it packs, what it keeps, and what bad trials do to the others."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import pytest
from driving import Killed, Threads, journal_view, records_of, run, trials_of, undisturbed
from fakes import diverged, fake_work, loss_of, make_study, measure, train_rung
from optuna.trial import TrialState

from sweep.study.home import Home
from sweep.study.records import COMPLETE, DIVERGED, FAILED, PRUNED, Measurement, Unit


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return undisturbed(tmp_path_factory.mktemp("done"))


class TestWhatIsAsked:
    def test_every_arm_gets_the_same_number_of_rates_and_finalists_get_fresh_seeds(self, done: Home) -> None:
        study = make_study()
        record = records_of(done, study)
        search = [t.spec for t in record.trials if t.spec.phase == "search"]
        assert Counter(s.arm.name for s in search) == {a.name: 3 for a in study.list_arms()}
        assert {s.seed for s in search} == {0}
        confirm = [t.spec for t in record.trials if t.spec.phase == "confirm"]
        assert Counter(s.arm.name for s in confirm) == {"r2-ratio2": 2, "r8-ratio2": 2, "full": 2}
        assert {s.seed for s in confirm} == {1, 2}

    def test_the_results_are_those_computed_by_hand(self, done: Home) -> None:
        study = make_study()
        record = records_of(done, study)
        assert record.finalists == (("r2-ratio2", 1e-2), ("r8-ratio2", 1e-2), ("full", 1e-4))
        steps = {(t.spec.arm.name, t.spec.learning_rate): t.step for t in record.trials if t.spec.phase == "search"}
        # 6 trials a rank: 3 go on at step 1 (both ratios at 1e-2, and ratio 2 at 1e-3, asked before 1e-1), 2 at step 2.
        assert {cell: step for cell, step in steps.items() if cell[0].startswith("r8")} == {
            ("r8-ratio1", 1e-3): 1,
            ("r8-ratio2", 1e-3): 2,
            ("r8-ratio1", 1e-2): 4,
            ("r8-ratio2", 1e-2): 4,
            ("r8-ratio1", 1e-1): 1,
            ("r8-ratio2", 1e-1): 1,
        }
        for t in record.trials:
            for step, loss in t.eval_curve:
                assert loss == loss_of(t.spec.arm, t.spec.learning_rate, t.spec.seed, step)
            assert bool(t.last and t.last.test_metrics) == (t.spec.phase == "confirm"), "test only at confirm's end"
        assert set(record.costs) == {"r2-lora-all-linear", "r8-lora-all-linear", "full"}

    def test_a_rank_far_worse_than_the_others_keeps_its_share(self, home: Home) -> None:
        def train(unit: Unit) -> tuple[Measurement, ...]:
            return tuple(
                replace(m, eval_loss=(m.eval_loss or 0) + (1000 if t.arm.r == 2 else 0))
                for m, t in zip(train_rung(unit), unit.trials, strict=True)
            )

        study = make_study()
        run(home, study, fake_work(train))
        complete = Counter(
            t.spec.arm.r for t in records_of(home, study).trials if t.spec.phase == "search" and t.state == COMPLETE
        )
        assert complete == {2: 2, 8: 2, 0: 1}

    def test_optuna_tells_the_same_as_the_journals(self, done: Home) -> None:
        study = make_study()
        trials = trials_of(done, study)
        assert Counter(t.state for t in trials) == {TrialState.COMPLETE: 11, TrialState.PRUNED: 10}
        for trial, record in zip(trials, records_of(done, study).trials, strict=True):
            assert trial.number == record.spec.number
            assert trial.params == {
                "rank": record.spec.arm.r,
                "alpha_ratio": record.spec.arm.alpha_ratio,
                "learning_rate": record.spec.learning_rate,
            }
            assert trial.user_attrs["arm"] == record.spec.arm.name
            assert (trial.user_attrs["phase"], trial.user_attrs["seed"]) == (record.spec.phase, record.spec.seed)
            assert trial.intermediate_values == dict(record.eval_curve)
            assert trial.value == record.eval_curve[-1][1]
            if record.state == PRUNED:
                assert trial.user_attrs["reason"] == record.reason
                assert f"pruned at rung {record.step}" in record.reason

    def test_what_the_study_sweeps_besides_is_a_parameter_too(self, home: Home) -> None:
        arms = {
            "rank": [2, 8],
            "alpha_ratio": [1.0],
            "method": ["lora", "rslora"],
            "target_modules": [["query", "value"], "all-linear"],
        }
        study = make_study(arms=arms)
        run(home, study)
        params = [t.params for t in trials_of(home, study)]
        assert {p["method"] for p in params} == {"lora", "rslora", "full"}
        assert {p["target_modules"] for p in params} == {"query+value", "all-linear", "full"}

    def test_finalists_by_arm_represent_every_arm_even_one_that_was_pruned_away(self, home: Home) -> None:
        study = make_study(confirm={"seeds": [1], "reference": 8, "epsilon": 0.1, "finalists": "arm"})

        def train(unit: Unit) -> tuple[Measurement, ...]:
            return tuple(
                replace(m, eval_loss=(m.eval_loss or 0) + (9 if t.arm.name == "r2-ratio1" else 0))
                for m, t in zip(train_rung(unit), unit.trials, strict=True)
            )

        run(home, study, fake_work(train))
        record = records_of(home, study)
        assert dict(record.finalists) == {
            "r2-ratio1": 1e-2,  # all of its trials ended at the first rung
            "r2-ratio2": 1e-2,
            "r8-ratio1": 1e-2,
            "r8-ratio2": 1e-2,
            "full": 1e-4,
        }

    @pytest.mark.parametrize("sampler", ["random", "tpe", "qmc", "nsga2", "gp"])
    def test_a_sampler_gives_every_arm_its_rates_within_the_range(self, home: Home, sampler: str) -> None:
        study = make_study(
            search={"sampler": sampler, "rungs": [1, 4], "keep": 0.5, "seed": 3},
            tune={
                "learning_rate": {"low": 1e-3, "high": 1e-1, "values": 5},
                "full_finetuning": {"learning_rate": {"low": 1e-5, "high": 1e-3, "values": 5}},
            },
        )
        run(home, study)
        rates: dict[str, list[float]] = {}
        for t in records_of(home, study).trials:
            if t.spec.phase == "search":
                rates.setdefault(t.spec.arm.name, []).append(t.spec.learning_rate)
        assert {name: len(set(found)) for name, found in rates.items()} == {a.name: 5 for a in study.list_arms()}
        assert all(1e-3 <= rate <= 1e-1 for name, found in rates.items() if name != "full" for rate in found)
        assert all(1e-5 <= rate <= 1e-3 for rate in rates["full"])
        if sampler in ("random", "qmc"):  # those that do not learn try the same rates in every arm
            assert rates["r2-ratio1"] == rates["r8-ratio2"]


class TestBadTrials:
    def test_a_diverged_trial_ends_and_its_neighbours_do_not(self, home: Home) -> None:
        def train(unit: Unit) -> tuple[Measurement, ...]:
            return tuple((diverged if t.learning_rate == 1e-1 else measure)(unit, t) for t in unit.trials)

        study = make_study()
        run(home, study, fake_work(train))
        record = records_of(home, study)
        ended = [t for t in record.trials if t.state == DIVERGED]
        assert [t.spec.learning_rate for t in ended] == [1e-1] * 4
        assert {t.reason for t in ended} == {"diverged at step 1"}
        for t in trials_of(home, study):
            if t.params["learning_rate"] == 1e-1:
                assert (t.state, t.user_attrs["reason"]) == (TrialState.FAIL, "diverged at step 1")
        steps = Counter(t.step for t in record.trials if t.spec.arm.r == 2 and t.spec.phase == "search")
        assert steps == {1: 2 + 2, 2: 1, 4: 1}  # of the 4 that reached the first rung 2 go on, then 1

    @pytest.mark.parametrize("slots", [1, 3])
    def test_a_trial_is_not_lost_because_of_a_failing_neighbour(self, home: Home, slots: int) -> None:
        def train(unit: Unit) -> tuple[Measurement, ...]:
            if any(t.arm.name == "r2-ratio2" and t.learning_rate == 1e-2 for t in unit.trials):
                raise ValueError("no use\nof this")
            return train_rung(unit)

        study = make_study()
        with Threads(slots) as executor:
            heard = run(home, study, fake_work(train), executor)
        record = records_of(home, study)
        failed = [t for t in record.trials if t.state == FAILED]
        assert [(t.spec.arm.name, t.spec.learning_rate) for t in failed] == [("r2-ratio2", 1e-2)]
        assert failed[0].reason == "ValueError: no use of this"
        [in_optuna] = [t for t in trials_of(home, study) if t.state == TrialState.FAIL]
        assert in_optuna.user_attrs["reason"] == "ValueError: no use of this"
        assert record.finished_at and record.finalists[0] == ("r2-ratio1", 1e-2)
        assert all(t.state for t in record.trials)
        assert heard[-1].failed == 1 and heard[-1].done == heard[-1].total

    def test_a_rank_without_a_live_trial_has_no_finalist_but_a_warning(self, home: Home) -> None:
        def train(unit: Unit) -> tuple[Measurement, ...]:
            return tuple((diverged if t.arm.r == 2 else measure)(unit, t) for t in unit.trials)

        study = make_study()
        heard = run(home, study, fake_work(train))
        record = records_of(home, study)
        assert [arm for arm, _ in record.finalists] == ["r8-ratio2", "full"]
        assert record.warnings == ("rank 2 has no finalist: every trial of its search diverged or failed",)
        assert (heard[-1].done, heard[-1].total, heard[-1].steps_done) == (19, 19, heard[-1].steps_total)

    def test_a_study_in_which_everything_fails_still_finishes(self, home: Home) -> None:
        def train(unit: Unit) -> tuple[Measurement, ...]:
            raise ValueError("never")

        study = make_study()
        heard = run(home, study, fake_work(train))
        assert records_of(home, study).finished_at
        assert (heard[-1].failed, heard[-1].total, heard[-1].steps_total) == (15, 15, 0)

    def test_a_cost_that_cannot_be_measured_is_a_warning(self, home: Home) -> None:
        def probe(setup: Any, prepared: Any, arm: Any) -> Any:
            if arm.is_full:
                raise RuntimeError("killed by the kernel")
            return fakes.probe(setup, prepared, arm)

        study = make_study()
        run(home, study, replace(fake_work(), probe=probe))
        record = records_of(home, study)
        assert set(record.costs) == {"r2-lora-all-linear", "r8-lora-all-linear"}
        assert record.warnings == ("the cost of full could not be measured: RuntimeError: killed by the kernel",)
        assert record.finished_at

    def test_an_error_in_preparing_passes_through_and_the_question_may_be_mended(self, home: Home) -> None:
        def prepare(setup: Any, arms: Any) -> Any:
            raise ValueError("data.text: no such column")

        with pytest.raises(ValueError, match="no such column"):
            run(home, make_study(), replace(fake_work(), prepare=prepare))
        mended = make_study(data={"source": "none", "text": "body"})
        run(home, mended)
        assert records_of(home, mended).finished_at


class TestPacks:
    def test_packs_keep_to_their_size_and_full_fine_tuning_trains_alone(self, home: Home) -> None:
        units: list[Unit] = []

        def train(unit: Unit) -> tuple[Measurement, ...]:
            units.append(unit)
            return train_rung(unit)

        run(home, make_study(), fake_work(train))
        assert all(len(u.trials) <= 5 for u in units)
        assert all(len(u.trials) == 1 for u in units if any(t.arm.is_full for t in u.trials))
        assert any({t.arm.r for t in u.trials} == {2, 8} and u.start == 2 for u in units), "survivors share a pack"
        mixed = [u for u in units if u.trials[0].phase == "confirm" and not u.trials[0].arm.is_full]
        assert all({t.seed for t in u.trials} == {1, 2} for u in mixed)

    def test_as_many_units_run_at_once_as_the_executor_has_slots(self, home: Home, done: Home) -> None:
        first_three, started = threading.Barrier(3), itertools.count()

        def train(unit: Unit) -> tuple[Measurement, ...]:
            if next(started) < 3:
                first_three.wait(timeout=60)  # passes only when three are at work together
            return train_rung(unit)

        study = make_study()
        with Threads(3) as executor:
            run(home, study, fake_work(train), executor)
        # Packs differ with the slots, trials do not.
        assert journal_view(records_of(home, study)) == journal_view(records_of(done, study))


class TestCheckpoints:
    def test_only_what_an_export_needs_stays_on_disk(self, done: Home) -> None:
        study = make_study()
        for t in records_of(done, study).trials:
            left = sorted(str(p.relative_to(t.spec.folder)) for p in Path(t.spec.folder).rglob("*.safetensors"))
            kept = t.state == COMPLETE and not (t.spec.arm.is_full and t.spec.phase == "search")
            names = ["test-rows", "weights"] if t.spec.phase == "confirm" else ["weights"]
            assert left == ([f"{t.last.checkpoint}/{name}.safetensors" for name in names] if kept and t.last else [])

    def test_what_a_killed_worker_left_is_removed_when_the_study_is_taken_up(self, home: Home) -> None:
        study = make_study()

        def train(unit: Unit) -> tuple[Measurement, ...]:
            if unit.start == 2:
                for t in unit.trials:
                    (Path(t.folder) / "checkpoints/.tmp-99").mkdir()  # killed while it wrote,
                measure(unit, unit.trials[0])  # or before anybody heard of what it wrote
                raise Killed
            return train_rung(unit)

        with pytest.raises(Killed):
            run(home, study, fake_work(train))
        run(home, study)
        named = {t.last.checkpoint for t in records_of(home, study).trials if t.last}
        left = [folder for folder in home.root.rglob("checkpoints/*")]
        assert left and {f"checkpoints/{folder.name}" for folder in left} <= named

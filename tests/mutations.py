"""Would the parity suite notice? One term of the engine is broken at a time, in a copy, and the suite is run on it.

`python tests/mutations.py [--out FILE] [--only WORDS] [--jobs N]` prints and writes a Markdown table of what each
mutation broke. Exit code 1 if one survived, or if the control, which changes nothing, did not pass.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
SUITE = tuple(
    f"tests/test_{name}.py" for name in ("lora_methods", "lora_layers", "parity_random", "parity_packs", "prefix")
)
SHOWN = 6  # tests named in a row of the table


@dataclass(frozen=True)
class Mutation:
    """`old`, which stands in the file exactly once, becomes `new`."""

    what: str
    file: str
    old: str
    new: str


ARMS, LAYERS, DORA = "study/arms.py", "lora/layers.py", "lora/dora.py"
ADAPTER, OPTIM, METHODS = "lora/adapter.py", "lora/optim.py", "lora/methods.py"
PREFIX, PASSES, TRUNK, RUNG, TASKS = (
    "lora/prefix.py",
    "lora/passes.py",
    "lora/trunk.py",
    "training/rung.py",
    "training/tasks.py",
)

CONTROL = Mutation("control: nothing but a comment", LAYERS, "class PackedLinear(", "# nothing\nclass PackedLinear(")
HEADING = (
    "# What breaks when a term is wrong",
    "",
    "Each line is one wrong term in a copy of the engine, and the tests of the parity suite that then fail, with how",
    "many of their cases. Written by `python tests/mutations.py --out reports/parity/mutations.md`.",
    "",
)
MUTATIONS = (
    Mutation(
        "scaling is alpha, not alpha / r",
        ARMS,
        'return alpha / (math.sqrt(r) if self.method == "rslora" else r)',
        "return alpha",
    ),
    Mutation("rsLoRA's root dropped", ARMS, 'math.sqrt(r) if self.method == "rslora" else r', "r"),
    Mutation(
        "a layer's own rank ignored in its scaling",
        ARMS,
        "self._scaling(alpha, self.rank_at(module))",
        "self._scaling(alpha, self.r)",
    ),
    Mutation("a layer's own scaling ignored", ADAPTER, "[a.scaling_at(name) for a in", "[a.scaling for a in"),
    Mutation("scaling dropped, forward", LAYERS, "(scalings[i] * factors[2 * i])", "(factors[2 * i])"),
    Mutation("scaling dropped in A's gradient", LAYERS, ".float() * ctx.scalings[i])", ".float())"),
    Mutation(
        "B's gradient with another trial's A",
        LAYERS,
        "torch.bmm(h_GNr.transpose(1, 2), g_GNO)",
        "torch.bmm(h_GNr.roll(1, 0).transpose(1, 2), g_GNO)",
    ),
    Mutation(
        "A and B swapped by name",
        METHODS,
        'return "lora_A.weight", "lora_B.weight"',
        'return "lora_B.weight", "lora_A.weight"',
    ),
    Mutation(
        "A and B swapped at the start: A zero, B drawn",
        METHODS,
        "    return A_rI, torch.zeros(O, r)",
        "    return torch.zeros(r, I), torch.randn(O, r, generator=generator)",
    ),
    Mutation("A and B swapped in roles: LoRA+ on A", OPTIM, 'if flat.role == "B"', 'if flat.role == "A"'),
    Mutation("LoRA+ ignored", OPTIM, 'factor * group["ratio"]', "factor"),
    Mutation(
        "the input's gradient lacks the low-rank part", LAYERS, "dx_KNI[start:stop].baddbmm_(u_GNr, A_GrI)", "pass"
    ),
    Mutation(
        "dropout missing in the input's gradient",
        LAYERS,
        ".addcmul_(torch.bmm(u_GNr, A_GrI), keep_KNI[start:stop])",
        ".add_(torch.bmm(u_GNr, A_GrI))",
    ),
    Mutation(
        "dropout missing in A's gradient",
        LAYERS,
        "g_GNO, x_GNI = g_KNO[start:stop], _dropped(x_KNI, keep_KNI if drops else None, start, stop)",
        "g_GNO, x_GNI = g_KNO[start:stop], x_KNI[start:stop]",
    ),
    Mutation("dropout never on", TASKS, "told.dropout = step is not None and told.p > 0", "told.dropout = False"),
    Mutation("dropout's generator missing: no seed", PASSES, "_mix(keys.seeds_K + ", "_mix(keys.seeds_K * 0 + "),
    Mutation("dropout does not depend on the step", PASSES, "(keys.step + 1)", "1"),
    Mutation("dropout does not depend on the layer", PASSES, "(layer + 1)", "1"),
    Mutation(
        "dropout starts again in each device batch",
        PASSES,
        "keys.first_row + torch.arange(rows",
        "torch.arange(rows",
    ),
    Mutation("dropout does not rescale what it keeps", PASSES, "keep.float() / (1.0 - keys.p)", "keep.float()"),
    Mutation(
        "DoRA's norm has a gradient",
        DORA,
        "    with torch.no_grad():\n        norm_GO",
        "    if True:\n        norm_GO",
    ),
    Mutation("DoRA's magnitude missing", DORA, "(magnitude_GO / norm_GO)", "(norm_GO / norm_GO)"),
    Mutation("DoRA's magnitude not trained", DORA, "(magnitude_GO / norm_GO)", "(magnitude_GO.detach() / norm_GO)"),
    Mutation("DoRA's norm of the base alone", DORA, "clamp(min=0).sqrt()", "mul(0).add(W_OI.square().sum(1)).sqrt()"),
    Mutation("DoRA's norm without its cross term", DORA, "2 * scaling_G1 * cross_GO", "0 * scaling_G1 * cross_GO"),
    Mutation(
        "DoRA's dropout leaves the base product whole",
        DORA,
        "(c_G1O - 1) * F.linear(input_GNI, W_OI)",
        "(c_G1O - 1) * base_GNO",
    ),
    Mutation("PiSSA's residual missing", LAYERS, "if self.initial is None:", "if True:"),
    Mutation("PiSSA's residual dropped out", LAYERS, "(A0_GrI, -B0_GOr, False)", "(A0_GrI, -B0_GOr, True)"),
    Mutation("PiSSA's factors not over the scaling", METHODS, "(S_r / scaling).sqrt()", "S_r.sqrt()"),
    Mutation(
        "PiSSA shares buckets with LoRA", ADAPTER, "if self.method in (DORA, PISSA) else", "if self.method == DORA else"
    ),
    Mutation("Kaiming's bound without its root", METHODS, "/ math.sqrt(I)", "/ I"),
    Mutation(
        "Gaussian A not over r",
        METHODS,
        "torch.randn(r, I, generator=generator) / r",
        "torch.randn(r, I, generator=generator)",
    ),
    Mutation(
        "Conv1D not transposed", LAYERS, "if isinstance(self.base, nn.Linear) else weight.T", "if True else weight.T"
    ),
    Mutation("an embedding's factor missing", LAYERS, "* bucket.scaling_G11 * factor)", "* bucket.scaling_G11)"),
    Mutation("an embedding's scaling missing", LAYERS, "* bucket.scaling_G11 * factor)", "* factor)"),
    Mutation("an embedding's padding trained", LAYERS, "if padding is not None:", "if False:"),
    Mutation("a convolution's stride ignored", LAYERS, "None, base.stride,", "None, 1,"),
    Mutation("a convolution's scaling missing", LAYERS, "h_GbrP) * bucket.scaling_G11[..., None])", "h_GbrP))"),
    Mutation(
        "the heads' bias missing",
        LAYERS,
        "y_KNO = y_KNO + self.bias[:, None, :]",
        "y_KNO = y_KNO + 0 * self.bias.sum()",
    ),
    Mutation(
        "clipping by the pack's joint norm",
        OPTIM,
        "norm_K = square_K.sqrt()",
        "norm_K = square_K.sum().sqrt().expand_as(square_K)",
    ),
    Mutation(
        "clipping by the last tensors' norm",
        OPTIM,
        "square_K[flat.start : flat.stop] += ",
        "square_K[flat.start : flat.stop] = ",
    ),
    Mutation("clipping missing", OPTIM, "if clipped[k]:", "if False:"),
    Mutation("mean over K, not sum", RUNG, "loss_K.sum().backward()", "loss_K.mean().backward()"),
    Mutation(
        "a device batch's mean, not the batch's",
        RUNG,
        "torch.from_numpy(counts).to(loss_K)",
        "torch.from_numpy(target_counts(part, trainee.trials)).to(loss_K)",
    ),
    Mutation(
        "the first trial's rate for all",
        OPTIM,
        "recipe.learning_rate * factor",
        "self.recipes[0].learning_rate * factor",
    ),
    Mutation("the first trial's betas for all", OPTIM, '{"betas": recipe.betas}', '{"betas": recipes[0].betas}'),
    Mutation("the first trial's decay for all", OPTIM, "else recipe.weight_decay", "else recipes[0].weight_decay"),
    Mutation(
        "weight decay on biases", OPTIM, '0.0 if flat.role == "bias" else recipe.weight_decay', "recipe.weight_decay"
    ),
    Mutation(
        "warm-up begins one step late", OPTIM, "return step / max(1, warm)", "return max(0, step - 1) / max(1, warm)"
    ),
    Mutation("cosine for linear", OPTIM, 'if schedule == "linear":', 'if schedule == "":'),
    Mutation("moments not restored", OPTIM, "if states is not None:", "if False:"),
    Mutation("AdamW's own step not restored", OPTIM, "torch.tensor(float(step_count), ", "torch.tensor(0.0, "),
    Mutation("step_count not restored", OPTIM, "        step_count=step_count,", "        step_count=0,"),
    Mutation(
        "the NaN guard removed", OPTIM, "alive and self.step_count < r.steps for", "self.step_count < r.steps for"
    ),
    Mutation("an infinite loss stops nothing", OPTIM, "torch.isfinite(loss_K)", "~torch.isnan(loss_K)"),
    Mutation(
        "a NaN stops all",
        OPTIM,
        "torch.isfinite(norm_K) & torch.isfinite(loss_K)",
        "(torch.isfinite(norm_K) & torch.isfinite(loss_K)).all()",
    ),
    Mutation("a trial's own end ignored", OPTIM, "alive and self.step_count < r.steps for", "alive for"),
    Mutation(
        "rows return from the trunk to wrong places",
        TASKS,
        "torch.from_numpy(place_R).to(device)",
        "torch.from_numpy(place_R).flip(0).to(device)",
    ),
    Mutation("the trunk reaches into the first adapted block", TRUNK, "first = min((int(", "first = max((int("),
    Mutation("the trunk is not shared", TASKS, "repeats = len(distinct_U) < len(place_R)", "repeats = False"),
    Mutation("hooks stay after a pack", ADAPTER, "        hook.remove()", "        pass"),
    Mutation(
        "a prefix of another trial",
        PREFIX,
        "prefix.value_GpH.to(tokens_RTH.dtype)",
        "prefix.value_GpH.roll(1, 0).to(tokens_RTH.dtype)",
    ),
    Mutation(
        "a prefix is masked", PREFIX, "torch.where(place_1L < 0, 1, token_RL)", "torch.where(place_1L < 0, 0, token_RL)"
    ),
    Mutation("padding behind shorter prefixes is not masked", PREFIX, " * (place_1L < ids_RT.shape[1])", ""),
    Mutation("tokens' hidden states behind the longest prefix", PREFIX, "[None] + length_R1", "[None] + longest"),
    Mutation(
        "rows are shared under prefixes", ADAPTER, "if any(adapter.prefix_length for adapter in adapters):", "if False:"
    ),
    Mutation(
        "the language model's loss gradient lacks the target",
        TASKS,
        "device=wanted_C.device), wanted_C] -= 1",
        "device=wanted_C.device), wanted_C] -= 0",
    ),
)


def copy_sources(source: Path, to: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "benchmarks")
    for part in ("sweep", "tests"):
        shutil.copytree(source / part, to / part, ignore=ignored)
    shutil.copy(source / "pyproject.toml", to)


def check_that_all_apply(mutations: Iterable[Mutation]) -> None:
    for mutation in mutations:
        times = (ROOT / "sweep" / mutation.file).read_text().count(mutation.old)
        if times != 1:
            raise SystemExit(
                f"{mutation.what}: this stands in {mutation.file} {times} times, not once:\n{mutation.old}"
            )


def run_suite(mutation: Mutation, sources: Path) -> tuple[list[str], int]:
    """The tests that fail on the mutated copy, and how many passed. In a process of its own: it imports the copy."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_sources(sources, folder)
        file = folder / "sweep" / mutation.file
        file.write_text(file.read_text().replace(mutation.old, mutation.new))
        os.chdir(folder)
        sys.path.insert(0, name)
        options = ["-q", "--tb=no", "-p", "no:cacheprovider", f"--rootdir={name}", "--junit-xml=found.xml"]
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            pytest.main([*options, *SUITE])
        imported = sys.modules["sweep"].__file__ or ""
        assert Path(imported).is_relative_to(folder), f"the suite imported {imported}, not the copy"
        cases = list(ElementTree.parse(folder / "found.xml").iter("testcase"))
        os.chdir(ROOT)
    failed = [c.get("name", "") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    return failed, len(cases) - len(failed)


def in_words(failed: list[str]) -> str:
    """Tests by name, with how many of their cases failed."""
    counts = Counter(name.partition("[")[0].removeprefix("test_") for name in failed)
    names = [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]
    more = [f"and {len(names) - SHOWN} more tests"] if len(names) > SHOWN else []
    return "; ".join([*names[:SHOWN], *more])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--only", default="", help="only mutations with these words in their name, and the control")
    parser.add_argument("--jobs", type=int, default=1, help="suites that run at once")
    parser.add_argument("--examples", type=int, default=1, help="random packs of each family")
    options = parser.parse_args()
    chosen = [CONTROL, *(m for m in MUTATIONS if options.only in m.what)]
    check_that_all_apply(chosen)
    os.environ |= {"PARITY_EXAMPLES": str(options.examples), "TOKENIZERS_PARALLELISM": "false"}
    for library in ("torch", "transformers", "peft", "peft.optimizers", "hypothesis"):  # once, and not for each suite
        importlib.import_module(library)
    sys.modules["torch"].set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as sources,  # as they are now: a run takes minutes, and work may go on
        multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=1) as pool,
    ):
        copy_sources(ROOT, Path(sources))
        found = pool.imap(partial(run_suite, sources=Path(sources)), chosen)
        lines, bad = ["| mutation | file | what broke |", "| --- | --- | --- |"], []
        print(*lines, sep="\n")
        for mutation, (failed, passed) in zip(chosen, found, strict=True):
            if bool(failed) == (mutation is CONTROL) or not failed + [""] * passed:
                bad.append(mutation.what)
            broke = in_words(failed) or f"**nothing**: {passed} tests passed"
            lines.append(f"| {mutation.what} | `{mutation.file}` | {broke} |")
            print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join([*HEADING, *lines]) + "\n")
    print(f"\n{len(chosen) - 1} mutations; not as it should be: {', '.join(bad) or 'none'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""Write what README.md shows of other files: measured numbers from benchmarks/results/*.json, what runs on what from
`polar.compatibility`. `--check` only compares.

Usage: python -m benchmarks.readme [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import convergence_report
from polar.compatibility import table

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured: made by `python -m benchmarks.readme` -->", "<!-- end of measured -->"
TABLE_BEGIN, TABLE_END = "<!-- engines: made by `python -m benchmarks.readme` -->", "<!-- end of engines -->"
BASELINES = {
    "landing_nxn": "n x n landing formula, as the paper's code computes it",
    "svd": "projection + one SVD per factor",
    "svd_batched": "projection + one batched SVD per shape",
    "qr": "projection + one QR per factor",
}


def manifold_step(result: dict[str, Any]) -> list[str]:
    """Lines about benchmarks/manifold_step.py."""
    ms, scratch = result["ms"], result["scratch_mib"]
    memory_layers = result["memory_note"].split()[2]
    lines = [
        f"**One manifold step over all {result['num_factors']} factors of Gemma-3-27B** (r = {result['r']}, fp32, one "
        f"process, {_where(result)}); median of {ms['ours']['runs']} runs that alternate:",
        "",
        f"| method | ms | ours is faster by | scratch memory, MiB, on {memory_layers} layers |",
        "|---|---:|---:|---:|",
        f"| `retract_polar` (ours, exact) | {ms['ours']['median']:.0f} | | {scratch['ours']:.1f} |",
        f"| `landing` (ours, r x r) | {ms['ours_landing']['median']:.0f} | | {scratch['ours_landing']:.1f} |",
    ]
    for method, text in BASELINES.items():
        faster = result["times_faster_than"][method]
        lines.append(f"| {text} | {ms[method]['median']:,.0f} | {faster:,.1f}x | {scratch[method]:,.1f} |")
    return [
        *lines,
        "",
        _how(result, f"The n x n formula was {result['landing_nxn_note'].replace('1 layers', '1 layer')}."),
    ]


def step_overhead(result: dict[str, Any]) -> list[str]:
    """Lines about benchmarks/step_overhead.py."""
    lines = [
        f"**A whole training step** ({result['num_parameters'] / 1e6:.0f} M parameters, HF Trainer, AdamW, r = "
        f"{result['r']}, {result['batch']} x {result['length']} tokens, {_where(result)}); median of "
        f"{result['step_ms']['lora']['runs']} steps in {result['runs']} processes that alternate:",
        "",
        "| method | ms per step | beside LoRA | peak memory beside LoRA |",
        "|---|---:|---:|---:|",
    ]
    names = {"lora": "PEFT LoRA", "polar": "PoLAR", "polar_no_step": "PoLAR without the manifold step"}
    for method, name in names.items():
        time = result["step_ms"][method]["median"] / result["step_ms"]["lora"]["median"]
        memory = result["peak_mib"][method]["median"] / result["peak_mib"]["lora"]["median"]
        lines.append(f"| {name} | {result['step_ms'][method]['median']:.0f} | {time:.3f}x | {memory:.3f}x |")
    return [*lines, "", _how(result, "")]


def manifold_step_distributed(result: dict[str, Any]) -> list[str]:
    """Lines about benchmarks/manifold_step_distributed.py."""
    ms, faster = result["ms"], result["times_faster_than"]
    names = {
        "sharded": "`sharded` (ours)",
        "gather": "`gather` (ours, whole factors)",
        "user": "by hand: GatheredParameters and one SVD per factor",
    }
    lines = [
        f"**The manifold step on {result['ranks']} ranks**, {result['num_factors']} factors of Gemma-3-27B in a "
        f"DeepSpeed ZeRO-3 engine (r = {result['r']}, fp32, gloo, {_where(result)} per rank); median of "
        "runs that alternate:",
        "",
        "| method | field, ms | retraction, ms | both, ms (min to max) | `sharded` is faster by |",
        "|---|---:|---:|---:|---:|",
    ]
    for method, name in names.items():
        runs = ms[method]["step"]["runs"]
        field, retraction, step = (ms[method][phase] for phase in ("field", "retraction", "step"))
        ratio = f"{faster[method]['step']:.1f}x" if method in faster else ""
        lines.append(
            f"| {name} | {field['median']:,.0f} | {retraction['median']:,.0f} | {step['median']:,.0f} "
            f"({step['min']:,.0f} to {step['max']:,.0f}; {runs} runs) | {ratio} |"
        )
    difference = max(value for of in result["max_difference_from_user"].values() for value in of.values())
    load = result["load_average"]
    note = (
        f"Largest difference between the methods: {difference:.1e}. The {result['cpu_cores']} cores were shared: load "
        f"average {min(load):.1f} to {max(load):.1f}."
    )
    if not result["gathered_parameters_reach_the_master"]:
        note += (
            " By hand only the compute copy is changed, not the fp32 master that the optimizer steps: code that keeps "
            "its retraction needs one more write per factor."
        )
    return [*lines, "", _how(result, note)]


def manifold_comm(result: dict[str, Any]) -> list[str]:
    """Lines about benchmarks/manifold_comm.py."""
    lines = [
        f"**What one manifold step sends**, {result['num_factors']} factors of Gemma-3-27B under ZeRO-3, r = "
        f"{result['r']}; MiB that each rank hands to collectives and messages. Rows cut between ranks travel in a "
        "table of the all-reduce or between neighbours, whichever sends less:",
        "",
        "| ranks | cut rows in a table | between neighbours | chosen | gather | chosen / gather | |",
        "|---:|---:|---:|---|---:|---:|---|",
    ]
    for row in result["bytes"]:
        table, neighbours, gather = (row[key] / 2**20 for key in ("table", "neighbours", "gather"))
        lines.append(
            f"| {row['ranks']} | {table:.1f} | {neighbours:.1f} | {row['way']} | {gather:,.0f} | "
            f"{100 * row['ratio']:.2f} % | {row['source']} |"
        )
    return [*lines, "", _how(result, "")]


def adaptive_ranks(result: dict[str, Any]) -> list[str]:
    """Lines about benchmarks/adaptive_ranks.py."""
    wall, processor = result["seconds"], result["cpu_seconds"]
    faster, memory = result["times_faster_than"], result["peak_mib"]
    runs = wall["ours_1_threads"]["runs"]
    total = result["layers_of_model"]
    part = "" if result["layers"] == total else f"{result['layers']} of {total} "
    lines = [
        f"**Adaptive ranks from the spectra of {result['model']}'s shapes** ({result['num_weights']} weights of {part}"
        f"layers, random bf16, {_where(result)}); median of {runs} processes that alternate:",
        "",
        "| method | s (min to max) | processor s | `polar ranks` is faster by | by processor time | peak memory, MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    names = {
        "ours": "`polar ranks`, whole: read, hash, spectra, fits, ranks",
        "svdvals": "one fp32 `svdvals` per weight of the loaded model, loading not counted",
        "svdvals_tall": "the same, wide weights transposed first",
    }
    for method, name in names.items():
        counts = {1, result["threads"]}
        fastest, least = (
            min((times[f"{method}_{n}_threads"] for n in counts), key=lambda values: values["median"])
            for times in (wall, processor)
        )
        ratios = [f"{faster[key][method]:.1f}x" if method in faster[key] else "" for key in ("seconds", "cpu_seconds")]
        peak = f"{memory[method]:,.0f}" if method in memory else ""
        seconds = f"{fastest['median']:.1f} ({fastest['min']:.1f} to {fastest['max']:.1f})"
        lines.append(f"| {name} | {seconds} | {least['median']:.1f} | {ratios[0]} | {ratios[1]} | {peak} |")
    errors = ", ".join(f"{row['float32_gram']:.0e} at {row['steepness']:.0e}" for row in result["accuracy"])
    largest = max(row["auto"] for row in result["accuracy"])
    note = (
        "Other work on the machine spreads the wall clock; processor time it hardly touches. "
        f"Memory is for all {total} layers ({result['weights_mib']:,.0f} MiB of weights, the largest "
        f"{result['largest_weight_mib']['bf16']:.0f}). alpha_hill from float32 Gram matrices against a float64 SVD, by "
        f"largest over median eigenvalue: relative error {errors}; with the automatic switch to float64 at 1e4 at most "
        f"{largest:.0e}."
    )
    return [*lines, "", _how(result, note)]


def resume_soak(result: dict[str, Any]) -> list[str]:
    """Lines about benchmarks/resume_soak.py."""
    moments = ", ".join(f"{count} {moment}" for moment, count in result["kills_by_moment"].items())
    same = "equal bit for bit to" if all(result["equal_bit_for_bit"].values()) else "NOT equal to"
    lost, ended, back = result["steps_lost"], result["job_ended_after_s"], result["back_after_s"]
    half_written = result["kills_that_left_a_half_written_folder"]
    return [
        f"**{result['num_kills']} kills (-9) of one rank at random moments** ({moments}) of a run of {result['steps']} "
        f"steps under ZeRO-3 with {result['ranks']} ranks, a checkpoint every {result['save_steps']} steps: the end is "
        f"{same} that of a run that nobody killed (adapter, moments, all logs). Each kill lost {lost['min']} "
        f"to {lost['max']} steps; {half_written} left a half-written folder, which no start took for a checkpoint. The "
        f"job ended {ended['min']:.1f} to {ended['max']:.1f} s after the kill and was back at its step after "
        f"{back['median']:.0f} s (median), most of it start-up on a busy machine.",
        "",
        _how(result, f"On {result['cpu']}, {result['cpu_cores']} cores."),
    ]


def slurm_preemption(result: dict[str, Any]) -> list[str]:
    """Lines about benchmarks/slurm_preemption.py."""
    same = "equal bit for bit to" if all(result["equal_bit_for_bit"].values()) else "NOT equal to"
    ways = result["by_way"]
    start, saved, lost = result["from_sbatch"], result["saved_after_s"], result["lost_s"]
    return [
        f"**{result['num_preemptions']} preemptions at random moments of one SLURM job** ({ways.get('usr2', 0)} by "
        f"SIGUSR2, {ways.get('requeue', 0)} by `scontrol requeue`), {result['steps']} steps under ZeRO-3 on "
        f"{result['nodes']} nodes of the local cluster: the end is {same} that of the undisturbed job (adapter, "
        f"moments, all logs), and {result['steps_repeated']} steps were made twice. The stopped step was saved after "
        f"{saved['median']:.1f} s ({saved['min']:.1f} to {saved['max']:.1f}); the first new step ended after "
        f"{lost['median']:.0f} s ({lost['min']:.0f} to {lost['max']:.0f}), SLURM's own pause left out. From `sbatch` "
        f"to the end of the first step: {start['to_the_first_step_s']:.0f} s (one run).",
        "",
        _how(result, f"On {result['cpu']}, {result['cpu_cores']} cores, load average {result['load_average'][0]}."),
    ]


def convergence(result: dict[str, Any]) -> list[str]:
    """Lines about benchmarks/convergence.py; its parts may come from different runs."""
    lines = []
    for part, of in result["parts"].items():
        lines += [*convergence_report.section(part, of, result["comparison"]), _how(of, f"On {_where(of)}."), ""]
    return [*lines, convergence_report.conclusion(result["comparison"])]


def live_spectrum(result: dict[str, Any]) -> list[str]:
    """Lines about benchmarks/live_spectrum.py."""
    step, modules = result["step"], result["modules"]["cpu_ms"]
    without, with_it = (step["step_cpu_ms"][kind] for kind in ("without", "with"))
    alone = step["measurement_cpu_ms"]
    spread = " and ".join(f"{kind['min']:,.0f} to {kind['max']:,.0f} ms" for kind in (without, with_it))
    size = f"{step['num_parameters'] / 1e6:.0f} M parameters, {step['num_modules']} modules, r = {result['r']}"
    whole = result["modules"]["num_modules"]
    return [
        f"**Orthonormality error and stable rank in the training log** ({size}, {result['cpu']}, {result['threads']} "
        f"thread, processor time): one measurement takes {alone['median']:.0f} ms (median of {alone['runs']}), "
        f"{step['measurement_over_step']:.1%} of a step of {without['median']:,.0f} ms, at logging steps only. Steps "
        f"with it over steps without: {step['step_time_with_over_without']:.3f} (without and with it: {spread}). Over "
        f"the {whole} modules of Gemma-3-27B on one process it takes {modules['error_and_rank']['median']:.0f} ms; "
        f"{modules['error']['median']:.0f} ms of them are the error alone.",
        "",
        _how(result, ""),
    ]


def eval_throughput(result: dict[str, Any]) -> list[str]:
    """Lines about benchmarks/eval_throughput.py."""
    rates, faster = result["samples_per_s"], result["times_faster_than"]
    runs = rates["score_s"]["ours"]["runs"]
    lines = [
        f"**Scoring**: {result['problems']} problems, answered greedily by the demo's base (fp32, {result['cpu']}, "
        f"{result['threads']} thread), the same task and prompts; samples per second, median of {runs} processes that "
        "alternate:",
        "",
        "| method | scoring (min to max) | scoring, by processor time | whole command | `polar eval` is faster by "
        "(scoring, processor, whole) |",
        "|---|---:|---:|---:|---|",
    ]
    names = {
        "ours": "`polar eval`, batch size auto",
        "lm_eval_batch_1": "`lm_eval`, its default batch size 1",
        "lm_eval_batch_2": "`lm_eval`, batch size 2 as in the paper's scripts",
    }
    for method, name in names.items():
        wall = rates["score_s"][method]
        others = [f"{rates[clock][method]['median']:.2f}" for clock in ("score_cpu_s", "whole_s")]
        ratios = ", ".join(f"{faster[clock][method]:.1f}x" for clock in faster) if method != "ours" else ""
        spread = f"{wall['median']:.2f} ({wall['min']:.2f} to {wall['max']:.2f})"
        lines.append(f"| {name} | {spread} | {others[0]} | {others[1]} | {ratios} |")
    right = {count for counts in result["num_correct"].values() for count in counts}
    same = f"All found {right.pop()} right answers" if len(right) == 1 else f"Right answers: {result['num_correct']}"
    load = f"load average {min(result['load_average'])} to {max(result['load_average'])} on {result['cpu_cores']} cores"
    return [*lines, "", _how(result, f"{same}. The machine was shared: {load}.")]


SECTIONS = {
    "manifold_step": manifold_step,
    "manifold_step_distributed": manifold_step_distributed,
    "step_overhead": step_overhead,
    "manifold_comm": manifold_comm,
    "live_spectrum": live_spectrum,
    "adaptive_ranks": adaptive_ranks,
    "convergence": convergence,
    "eval_throughput": eval_throughput,
    "resume_soak": resume_soak,
    "slurm_preemption": slurm_preemption,
}


def measured_section() -> str:
    """The text between the markers: one part per result file, in the order of SECTIONS."""
    parts = [BEGIN]
    for name, section in SECTIONS.items():
        for path in sorted((ROOT / "benchmarks" / "results").glob(f"{name}*.json")):
            if max((other for other in SECTIONS if path.stem.startswith(other)), key=len) == name:
                parts += ["", *section(json.loads(path.read_text(encoding="utf-8")))]
    return "\n".join([*parts, "", END])


def _where(result: dict[str, Any]) -> str:
    if result["device"] != "cpu":
        return str(result["device"])
    return f"{result['cpu']}, {result['threads']} thread{'s' if result['threads'] > 1 else ''}"


def _how(result: dict[str, Any], note: str) -> str:
    text = f"`{result['command']}`, commit {result['commit']}, torch {result['versions']['torch']}."
    return f"{text} {note}".strip()


def with_generated_parts(text: str) -> str:
    """The README with the parts between the markers as they have to be."""
    engines = "\n".join([TABLE_BEGIN, "", *table(), "", TABLE_END])
    for begin, end, part in ((BEGIN, END, measured_section()), (TABLE_BEGIN, TABLE_END, engines)):
        before, _, rest = text.partition(begin)
        text = before + part + rest.partition(end)[2]
    return text


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = with_generated_parts(text)
    if "--check" in sys.argv[1:]:
        if new != text:
            print("README.md does not show what it should: run python -m benchmarks.readme", file=sys.stderr)
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

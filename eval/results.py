"""What `polar eval` writes: results.json, whose fields are documented here and nowhere else, and a line per sample."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from polar_eval.answers import NO_ANSWER

RESULT_NAME = "results.json"


@dataclass(frozen=True)
class Column:
    """One number of a task.

    Attributes:
        value: the share of right answers, 0 to 1; whatever the metric is for a stock task.
        stderr: its standard error; None where there is none, e.g. of one problem.
        num_correct: right answers; None where the metric is no share.
        num_without_answer: generations in which no answer was found; None where nothing is generated.
    """

    value: float
    stderr: float | None
    num_correct: int | None = None
    num_without_answer: int | None = None


@dataclass(frozen=True)
class Result:
    """results.json, field by field.

    Attributes:
        task: name on the command line.
        task_version: of its YAML.
        headline: the column to compare with the literature; None for lm-eval's own tasks, which name none.
        columns: by name. Generative tasks: one per way of reading the answer (strict, flexible; string, symbolic).
            Choices: acc, acc_norm. Stock tasks: lm-eval's "metric,filter", of a group "task:metric,filter" too.
        groups: MATH: by subject, then by column; empty elsewhere. Each has `num_problems`.
        mean_of_groups: by column, the mean over the groups, each counted once; `columns` counts each problem once.
        num_problems: scored.
        num_truncated: answers that ended at the generation limit; None where nothing is generated.
        num_resumed: requests whose answers were taken from an interrupted scoring.
        prompt_sha256: of all prompts (and choices), in order.
        first_prompt: to look at.
        adapter: folder, peft_type, sha256 of its weights; None for a base or merged model.
        base: folder or hub id.
        data: file or hub name; empty for a stock task.
        template: prompt template; None where the task brings its own texts.
        generation: settings of lm-eval (max_gen_toks, until, do_sample, ...); None where nothing is generated.
        canary: max_logit_change, how far the adapter moves the logits of the first prompt; None without an adapter.
        backend, dtype, device: what computed it.
        batch_size: given, or the largest that was used; 0: vLLM's own scheduling.
        batch_size_given: whether the user chose it.
        world_size: processes that shared the work.
        limit: only the first so many problems; None: all.
        seed: of everything that lm-eval draws; greedy decoding draws nothing.
        versions: of the packages that matter.
        identity: hash of what decides the numbers; --resume keeps a finished result with the same one.
        load_time_s: loading and checking the model, once for all tasks of a command.
        score_time_s: this task's answers and metrics.
        wall_time_s: both, and reading the data.
    """

    task: str
    task_version: Any
    headline: str | None
    columns: dict[str, Column]
    groups: dict[str, dict[str, Any]]
    mean_of_groups: dict[str, float]
    num_problems: int
    num_truncated: int | None
    num_resumed: int
    prompt_sha256: str
    first_prompt: str
    adapter: dict[str, Any] | None
    base: str
    data: str
    template: str | None
    generation: dict[str, Any] | None
    canary: dict[str, float] | None
    backend: str
    dtype: str
    device: str
    batch_size: int
    batch_size_given: bool
    world_size: int
    limit: int | None
    seed: int
    versions: dict[str, str | None]
    identity: str
    load_time_s: float
    score_time_s: float
    wall_time_s: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def prompt_facts(requests: Sequence[Any]) -> dict[str, Any]:
    """Return hash and first prompt of lm-eval's requests: of the prompts, and of the choices behind them."""
    texts = [request.args[0] for request in requests]
    hashed = ["\0".join(part for part in request.args if isinstance(part, str)) for request in requests]
    return {
        "prompt_sha256": hashlib.sha256("\0".join(hashed).encode("utf-8", "surrogatepass")).hexdigest(),
        "first_prompt": texts[0],
    }


@dataclass
class Measured:
    """Columns and sample rows of one task of ours.

    Args:
        found: lm-eval's result.
        name: the task's name in lm-eval.
        truncated: prompt -> whether its answer ended at the limit; empty where nothing is generated.
    """

    found: dict[str, Any]
    name: str
    truncated: dict[str, bool] = field(default_factory=dict)

    @property
    def samples(self) -> list[dict[str, Any]]:
        """lm-eval's samples: one per problem and filter."""
        return self.found["samples"][self.name]

    @property
    def generates(self) -> bool:
        """Whether the model wrote its answers."""
        return "exact_match" in self.samples[0]

    def columns(self) -> dict[str, Column]:
        """Return the columns, in the order of the YAML."""
        values = self.found["results"][self.name]
        columns = {}
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            own = [sample for sample in self.samples if sample["filter"] == chosen]
            error = values.get(f"{metric}_stderr,{chosen}")
            columns[chosen if self.generates else metric] = Column(
                value=float(value),
                stderr=float(error) if isinstance(error, float) else None,
                num_correct=sum(int(sample[metric]) for sample in own),
                num_without_answer=sum(sample["filtered_resps"][0] == NO_ANSWER for sample in own)
                if self.generates
                else None,
            )
        return columns

    def groups(self) -> dict[str, dict[str, Any]]:
        """Return the columns of each group of problems; empty where the problems have no groups."""
        found: dict[str, dict[str, list[float]]] = {}
        for sample in self.samples:
            if group := sample["doc"].get("group"):
                found.setdefault(group, {}).setdefault(sample["filter"], []).append(sample["exact_match"])
        return {
            group: {
                "num_problems": len(next(iter(columns.values()))),
                **{name: statistics.fmean(values) for name, values in columns.items()},
            }
            for group, columns in sorted(found.items())
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per problem: prompt, what the model answered, what was read in it, whether that is right."""
        rows: dict[int, dict[str, Any]] = {}
        for sample in self.samples:
            doc = sample["doc"]
            row = rows.setdefault(sample["doc_id"], {"row": doc["row"], "prompt": sample["arguments"][0][0]})
            if self.generates:
                row |= {
                    "question": doc["question"],
                    "generation": sample["resps"][0][0],
                    "truncated": self.truncated.get(row["prompt"], False),
                    "gold": doc["gold"],
                    **({"group": doc["group"]} if doc["group"] else {}),
                    sample["filter"]: sample["filtered_resps"][0],
                    f"{sample['filter']}_correct": bool(sample["exact_match"]),
                }
            else:
                row |= {
                    "choices": [arguments[1] for arguments in sample["arguments"]],
                    "prompts": [arguments[0] for arguments in sample["arguments"]],
                    "loglikelihoods": [response[0] for response in sample["filtered_resps"]],
                    "gold": doc["gold"],
                    **{f"{metric}_correct": bool(sample[metric]) for metric in sample["metrics"]},
                }
        return [rows[doc_id] for doc_id in sorted(rows)]


def stock_columns(found: dict[str, Any], name: str) -> dict[str, Column]:
    """Return lm-eval's own numbers of a task, or of a group and its members."""
    columns = {}
    for owner, values in found["results"].items():
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            label = key if owner == name else f"{owner}:{key}"
            columns[label] = Column(float(value), float(error) if isinstance(error, float) else None)
    return columns


def stock_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per problem and filter of a stock task, as JSON values."""
    kept = ("doc_id", "filter", "target", "arguments", "resps", "filtered_resps")
    return [
        {"task": name, **{key: sample[key] for key in kept}, **{metric: sample[metric] for metric in sample["metrics"]}}
        for name, samples in found["samples"].items()
        for sample in samples
    ]


def format_result(result: dict[str, Any]) -> str:
    """Return a result as a small table."""
    adapter = result["adapter"]
    who = "base alone" if adapter is None else f"{adapter['peft_type']} {adapter['folder']}"
    source = f" of {result['data']}" if result["data"] else ""
    template = f", template {result['template']}" if result["template"] else ""
    lines = [
        f"{result['task']} version {result['task_version']}, {result['num_problems']} problems{source}{template}",
        f"base {result['base']} ({result['dtype']}), {who}",
        "",
        f"{'':<24}{'value':>9}{'stderr':>9}{'correct':>9}{'no answer':>11}",
    ]
    for name, column in result["columns"].items():
        error = "-" if column["stderr"] is None else f"{column['stderr']:.4f}"
        counts = ("-" if column[key] is None else str(column[key]) for key in ("num_correct", "num_without_answer"))
        correct, without = counts
        mark = "  <- headline" if name == result["headline"] else ""
        lines.append(f"{name:<24}{column['value']:>9.4f}{error:>9}{correct:>9}{without:>11}{mark}")
    for group, columns in result["groups"].items():
        lines.append(f"  {group:<22}{columns[result['headline']]:>9.4f}{columns['num_problems']:>18} problems")
    if result["groups"]:
        lines.append(f"  {'mean of these':<22}{result['mean_of_groups'][result['headline']]:>9.4f}")
    if result["num_truncated"]:
        lines += ["", f"{result['num_truncated']} answers ended at the limit of --max_new_tokens and may be unfinished"]
    if result["canary"]:
        lines += ["", f"canary: the adapter moves the logits by {result['canary']['max_logit_change']:.3g}"]
    resumed = f"; {result['num_resumed']} answers from an interrupted scoring" if result["num_resumed"] else ""
    return "\n".join([*lines, f"{result['wall_time_s']:.1f} s, {result['load_time_s']:.1f} s of it loading{resumed}"])

"""The tasks that `polar eval` knows by name: which YAML, which data, which number is the headline."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from polar.commonsense import TASKS as COMMONSENSE
from polar.errors import UserError
from polar.glue import HUB as GLUE_HUB
from polar.glue import TASKS as GLUE
from polar.rows import FILE_KINDS

STOCK_PREFIX = "lm_eval:"  # lm_eval:NAME is lm-eval's own task or group, with its own prompts
GLUE_PREFIX = "glue_"  # an adapter with a head, see `polar_eval.glue`


@dataclass(frozen=True)
class ScoringTask:
    """One task.

    Attributes:
        name: on the command line.
        lm_eval_name: `task:` in the YAML under eval/tasks, or lm-eval's own.
        data: hub data set, `name` or `name:config`; empty for a stock task, which names its own.
        files: where the rows lie below --data_dir, without the ending; the first that exists.
        generates: whether the model writes an answer (with the training template), or choices are compared.
        headline: the column to compare with the literature; None for a stock task.
        stock: one of lm-eval's own.
    """

    name: str
    lm_eval_name: str
    data: str = ""
    files: tuple[str, ...] = ()
    generates: bool = True
    headline: str | None = None
    stock: bool = False


# The paper's code does not name its column. The level of its table (HellaSwag 82, OpenBookQA 57 with Llama-2-7B) is
# that of acc_norm, so this is the headline wherever lm-eval's own task has it, and acc elsewhere.
_ACC_ONLY = ("boolq", "social_iqa", "winogrande")
_PACKAGED_FOLDERS = {"social_iqa": "social_i_qa", "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}


def _commonsense(name: str) -> ScoringTask:
    folder = _PACKAGED_FOLDERS.get(name, name)
    return ScoringTask(
        name,
        f"{name}_polar",
        COMMONSENSE[name].source,
        (f"commonsense/{folder}/test", f"{folder}/test", f"{name}/test"),
        generates=False,
        headline="acc" if name in _ACC_ONLY else "acc_norm",
    )


TASKS = {
    task.name: task
    for task in (
        # strict and string: comparable with the paper's scoring, which reads what stands behind "the answer is:".
        ScoringTask("gsm8k", "gsm8k_polar", "openai/gsm8k:main", ("gsm8k/test",), headline="strict"),
        ScoringTask("math", "math_polar", "EleutherAI/hendrycks_math", ("math/test",), headline="string"),
        ScoringTask("math_paper", "math_paper_polar", "EleutherAI/hendrycks_math", ("math/test",), headline="string"),
        ScoringTask("math500", "math500_polar", "HuggingFaceH4/MATH-500", ("math500/test",), headline="string"),
        *(_commonsense(name) for name in COMMONSENSE),
        # flexible: LLM-Adapters' rule, on which LoRA-AR's table stands.
        ScoringTask("aqua", "aqua_polar", "deepmind/aqua_rat:raw", ("aqua/test", "AQuA/test"), headline="flexible"),
        ScoringTask("mawps", "mawps_polar", "MU-NLPC/Calc-mawps", ("mawps/test", "MAWPS/test"), headline="flexible"),
        ScoringTask("svamp", "svamp_polar", "ChilleD/SVAMP", ("svamp/test", "SVAMP/test"), headline="flexible"),
    )
}
GLUE_TASKS = {
    f"{GLUE_PREFIX}{task.name}": ScoringTask(
        f"{GLUE_PREFIX}{task.name}", "", GLUE_HUB, generates=False, headline=task.headline
    )
    for task in GLUE.values()
}
# Short names for several tasks.
SUITES = {"commonsense": tuple(COMMONSENSE), "math10k": ("aqua", "gsm8k", "mawps", "svamp")}


def find_tasks(names: str) -> list[ScoringTask]:
    """Return the tasks of a comma-separated list of task names, suites and `lm_eval:NAME`, each once, in order.

    Raises:
        UserError: an unknown name, or none.
    """
    found: dict[str, ScoringTask] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        for member in SUITES.get(name, (name,)):
            found.setdefault(member, _find(member))
    if not found:
        raise UserError(f"tasks {names!r}: names no task; there is {', '.join([*TASKS, *SUITES])}")
    return list(found.values())


def _find(name: str) -> ScoringTask:
    if name.startswith(STOCK_PREFIX) and name != STOCK_PREFIX:
        return ScoringTask(name, name.removeprefix(STOCK_PREFIX), stock=True)
    known = TASKS | GLUE_TASKS
    if name not in known:
        near = difflib.get_close_matches(name, [*known, *SUITES], n=1)
        hint = f"did you mean {near[0]}?" if near else f"there is {', '.join([*known, *SUITES])}"
        raise UserError(f"task {name!r}: unknown; {hint} {STOCK_PREFIX}NAME takes one of lm-eval's own")
    return known[name]


def find_data(task: ScoringTask, data: str | None, data_dir: str | None) -> str:
    """Return the data to score on: `data` if given, else the task's file below `data_dir`, else the hub's name.

    Raises:
        UserError: the folder has no file of this task.
    """
    if data is not None or data_dir is None or task.stock:
        if data is not None and task.stock:
            raise UserError(f"task {task.name} reads its own data; leave out --data")
        return data or task.data
    folder = Path(data_dir).expanduser()
    for place in task.files:
        for kind in FILE_KINDS:
            if (folder / f"{place}{kind}").is_file():
                return str(folder / f"{place}{kind}")
    places = ", ".join(f"{place}.jsonl" for place in task.files)
    raise UserError(f"--data_dir {data_dir}: no rows of {task.name} in it; put them there as {places}")

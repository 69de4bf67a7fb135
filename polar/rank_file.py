"""The file that `polar ranks` writes: ranks of every module, in the terms of PEFT's configurations.

Keys of `rank_pattern` and `alpha_pattern` and `target_modules` are regular expressions that match exactly the modules
they were made for, under PEFT's own rules (`get_pattern_key`, `check_target_module_exists`; peft 0.21.2).
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polar.errors import UserError

FORMAT = "polar-ranks-1"
# PEFT methods with a rank and an alpha per layer, and what they call alpha (peft 0.21.2).
ALPHA_NAMES = {"POLAR": "alpha", "LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
LAYER_NUMBER = re.compile(r"(.*?\.)(\d+)(\..*)")


def pattern_keys(names: Iterable[str], module_names: Collection[str]) -> dict[str, str]:
    """Return name -> regular expression that PEFT finds for this module and for no other module of the model.

    PEFT matches `(.*\\.)?(key)$`, so a key also fits names that end in ".name". Where the model has such a module, the
    key begins with ^; elsewhere it does not, so that it fits under prefixes such as `base_model.model.` too.

    Args:
        names: modules that get a key.
        module_names: all modules of the model.
    """
    endings = {name[i + 1 :] for name in module_names for i, letter in enumerate(name) if letter == "."}
    return {name: ("^" if name in endings else "") + re.escape(name) for name in names}


def target_pattern(names: Iterable[str]) -> str:
    """Return one regular expression whose full matches are exactly `names`, short where only layer numbers differ."""
    numbers: dict[tuple[str, str], list[str]] = {}
    plain = []
    for name in names:
        match = LAYER_NUMBER.fullmatch(name)
        if match:
            numbers.setdefault((match[1], match[3]), []).append(match[2])
        else:
            plain.append(re.escape(name))
    endings: dict[tuple[str, str], list[str]] = {}
    for (prefix, ending), found in numbers.items():
        choices = "|".join(sorted(found, key=int))
        endings.setdefault((prefix, choices), []).append(re.escape(ending))
    parts = [f"{re.escape(prefix)}(?:{choices})(?:{'|'.join(last)})" for (prefix, choices), last in endings.items()]
    return "|".join(plain + parts)


def read_rank_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `polar ranks` wrote.

    Raises:
        UserError: no such file, not JSON, or not such a file.
    """
    file = Path(path)
    try:
        ranks = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"rank file {file}: {error.strerror}; make it: polar ranks MODEL --out {file.name}") from error
    except ValueError as error:
        raise UserError(f"rank file {file}: not JSON ({error}); make it again with polar ranks") from error
    if not isinstance(ranks, dict) or ranks.get("format") != FORMAT:
        found = ranks.get("format") if isinstance(ranks, dict) else type(ranks).__name__
        raise UserError(f"rank file {file}: format {found!r}, need {FORMAT!r}; make it again with polar ranks")
    missing = {"r", "alpha", "target_modules", "rank_pattern", "alpha_pattern", "modules"} - ranks.keys()
    if missing:
        raise UserError(f"rank file {file}: has no {min(missing)}; make it again with polar ranks")
    modules = ranks["modules"]
    if not (isinstance(modules, dict) and modules and all(_is_entry(value) for value in modules.values())):
        raise UserError(f"rank file {file}: `modules` does not map names to layers; make it again with polar ranks")
    if not any(value["selected"] for value in modules.values()):
        raise UserError(f"rank file {file}: no layer is selected; make it again with polar ranks")
    wrong = [name for name, value in ranks["modules"].items() if value["selected"] and not _is_rank(value.get("r"))]
    if wrong:
        raise UserError(f"rank file {file}: {wrong[0]} has r = {ranks['modules'][wrong[0]].get('r')!r}, need r >= 1")
    return ranks


def selected_ranks(ranks: dict[str, Any]) -> dict[str, int]:
    """Return module name -> rank of the modules that get an adapter."""
    return {name: value["r"] for name, value in ranks["modules"].items() if value["selected"]}


def check_rank_file(
    ranks: dict[str, Any], module_names: Collection[str] | Mapping[str, Sequence[int]], source: str = "rank file"
) -> None:
    """Refuse a rank file that was made for another model.

    Args:
        ranks: a rank file's content.
        module_names: modules of the model that is to be adapted, without PEFT's prefix; a mapping also gives the shape
            of each linear layer's weight, which is compared too.
        source: how the message calls the file.

    Raises:
        UserError: a module of the file does not exist, or its weight has another shape.
    """
    missing = [name for name in selected_ranks(ranks) if name not in module_names]
    if missing:
        near = difflib.get_close_matches(missing[0], module_names, n=1)
        hint = f" (the nearest name is {near[0]})" if near else ""
        made_for = ranks.get("provenance", {}).get("model", "another model")
        raise UserError(
            f"{source}: {len(missing)} of its modules do not exist in the model, the first is {missing[0]}{hint};"
            f" it was made for {made_for}: run polar ranks on this model"
        )
    if isinstance(module_names, Mapping):
        for name in selected_ranks(ranks):
            stored, found = ranks["modules"][name].get("shape"), module_names[name]
            if stored is not None and found and list(stored) != list(found):
                made_for = ranks.get("provenance", {}).get("model", "another model")
                raise UserError(
                    f"{source}: the weight of {name} has shape {tuple(found)}, and {tuple(stored)} in {made_for}, for"
                    " which it was made: run polar ranks on this model"
                )


def adapter_settings(ranks: dict[str, Any], peft_type: str = "POLAR") -> dict[str, Any]:
    """Return the arguments of a PEFT configuration that carry the ranks.

    QLoRA, rsLoRA and DoRA are LoraConfigs with further arguments.

    Args:
        ranks: a rank file's content.
        peft_type: a key of ALPHA_NAMES.
    """
    if peft_type not in ALPHA_NAMES:
        raise UserError(f"peft_type {peft_type} has no rank per layer; use one of {', '.join(ALPHA_NAMES)}")
    return {
        "r": ranks["r"],
        ALPHA_NAMES[peft_type]: ranks["alpha"],
        "target_modules": ranks["target_modules"],
        "rank_pattern": dict(ranks["rank_pattern"]),
        "alpha_pattern": dict(ranks["alpha_pattern"]),
    }


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("selected"), bool)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1

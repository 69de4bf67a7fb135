"""`adapter.ranks` of a run: ranks from a file of `polar ranks`, or computed from the base's weights before training.

    adapter: {peft_type: LORA, ranks: ranks.json}             a file
    adapter: {peft_type: LORA, ranks: auto}                   computed with the defaults of polar.rank_settings
    adapter: {peft_type: POLAR, ranks: {budget: r=16}}        computed with these settings

Computed ranks are cached by base and settings ($POLAR_CACHE/ranks), so that every run and sweep over a base computes
them once. A run keeps its ranks in its folder (ranks.json), and continues with those.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar.errors import UserError
from polar.files import locked, write_json
from polar.launch import from_main_process, from_main_process_for_long
from polar.rank_file import ALPHA_NAMES, FORMAT, pattern_keys, read_rank_file, selected_ranks, target_pattern
from polar.rank_settings import RankSettings, parse_budget

if TYPE_CHECKING:
    from polar.run_config import RunConfig

RANKS_NAME = "ranks.json"
SET_BY_RANKS = ("r", "alpha", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class RunRanks:
    """Ranks of a run.

    Attributes:
        content: of a rank file; where ranks are still to be computed, as many as they can be at most.
        origin: where they come from, in one line.
        to_compute: how to compute them; None: they are final.
    """

    content: dict[str, Any]
    origin: str
    to_compute: RankSettings | None = None

    def provenance(self) -> dict[str, Any]:
        """Where the ranks come from, for provenance.json; the file itself lies beside it as ranks.json."""
        keys = ("settings", "provenance", "num_parameters")
        return {"origin": self.origin} | {key: self.content[key] for key in keys if key in self.content}


def ranks_setting(adapter: Mapping[str, Any]) -> str | RankSettings | None:
    """Return the rank file that an adapter block names, or the settings to compute ranks with, None without `ranks`.

    Raises:
        UserError: an unknown or wrong setting, or fields that the ranks set.
    """
    value = adapter.get("ranks")
    if value is None:
        return None
    twice = [key for key in SET_BY_RANKS if adapter.get(key) is not None]
    if twice:
        raise UserError(f"adapter.{twice[0]} is {adapter[twice[0]]}, but adapter.ranks sets it: leave one of them out")
    peft_type = str(adapter.get("peft_type", "POLAR")).upper()
    if peft_type not in ALPHA_NAMES:
        raise UserError(f"adapter.ranks: {peft_type} has no rank per layer: use one of {', '.join(ALPHA_NAMES)}")
    if isinstance(value, str) and value != "auto":
        return value
    if not isinstance(value, str | dict):
        raise UserError(f"adapter.ranks is {value!r}: give a file of `polar ranks`, auto, or a mapping of its settings")
    return _settings({} if isinstance(value, str) else value, peft_type, bool(adapter.get("use_dora")))


def _settings(given: dict[str, Any], peft_type: str, dora: bool) -> RankSettings:
    """Settings of `auto`; the method whose parameters a budget counts follows from the adapter."""
    known = {field.name for field in dataclasses.fields(RankSettings)}
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            fix = f"did you mean {near[0]}?" if near else f"its settings are {', '.join(sorted(known))}"
            raise UserError(f"adapter.ranks.{key}: unknown setting: {fix}")
    method = {"POLAR": "polar", "LORA": "dora" if dora else "lora"}.get(peft_type)
    if method is None and given.get("budget") is not None and "method" not in given:
        raise UserError(f"adapter.ranks.budget: it counts no {peft_type} parameters: set method, or leave budget out")
    values = {"method": method or "polar"} | given
    if isinstance(values.get("budget"), int):
        values["budget"] = str(values["budget"])
    for key in ("include", "exclude"):
        if isinstance(values.get(key), list):
            values[key] = tuple(values[key])
    try:
        return RankSettings(**values)
    except UserError as error:
        raise UserError(f"adapter.ranks.{error}") from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"adapter.ranks: {error}: see `polar ranks --help`") from error


def find_ranks(config: RunConfig) -> None:
    """Put the ranks that a run asks for into `config.adapter.ranks`, without computing any. Collective.

    Raises:
        UserError: no such file, or not a rank file; a base that is not there.
    """
    setting = ranks_setting(config.adapter.adapter)
    if setting is not None:
        config.adapter.ranks = from_main_process(lambda: _known_ranks(config, setting))


def compute_missing_ranks(config: RunConfig) -> str | None:
    """Compute ranks that are not known yet, on the main process, while the others wait. Collective.

    Returns:
        A line about them; None where nothing had to be computed.

    Raises:
        UserError: weights without a spectrum, a budget that cannot be met, and so on.
    """
    ranks = config.adapter.ranks
    if ranks is None or ranks.to_compute is None:
        return None
    settings = ranks.to_compute
    config.adapter.ranks = from_main_process_for_long(lambda: _compute(config, settings))
    return f"ranks {config.adapter.ranks.origin}"


def _known_ranks(config: RunConfig, setting: str | RankSettings) -> RunRanks:
    own = Path(config.training.output_dir) / RANKS_NAME
    if config.training.resume and own.is_file():
        return _from_file(own, "this run's own")
    if isinstance(setting, str):
        return _from_file(Path(setting).expanduser(), setting)
    cached = _cache_file(config, setting)
    if cached.is_file():
        return _from_file(cached, f"computed before ({cached})")
    return _upper_bound(config, setting)


def _from_file(file: Path, origin: str) -> RunRanks:
    content = read_rank_file(file)
    selected = selected_ranks(content)
    made_for = content.get("provenance", {}).get("model", "an unnamed model")
    spread = f"{min(selected.values())} to {max(selected.values())} on {len(selected)} of {len(content['modules'])}"
    return RunRanks(content, f"{origin}: {spread} layers, made for {made_for}")


def _upper_bound(config: RunConfig, settings: RankSettings) -> RunRanks:
    """What is known before computing: which layers are scored, and how large a rank can become."""
    from polar.base_checkpoint import describe_base
    from polar.base_weights import layer_names
    from polar.build_model import unpartitioned

    with unpartitioned(config):
        base = describe_base(str(config.model.model_name_or_path), config.model.revision)
    names = layer_names(base, settings.include, settings.exclude)
    uniform = parse_budget(settings.budget)[0] if settings.budget else 0
    highest = uniform or settings.r_max
    r = {name: min(highest, base.linears[name].d_out, base.linears[name].d_in) for name in names}
    keys = pattern_keys(names, {name for name, _ in base.model.named_modules()})
    content = {
        "format": FORMAT,
        "r": highest,
        "alpha": settings.alpha_factor * highest,
        "target_modules": target_pattern(names),
        "rank_pattern": {keys[name]: r[name] for name in names if r[name] < highest},
        "alpha_pattern": {},
        "modules": {},
    }
    changed = [
        f"{field.name} {getattr(settings, field.name)}"
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != field.default or field.name == "fraction"
    ]
    text = (
        f"computed from the weights before training ({', '.join(changed)}); counted below: r = {r} on all {len(names)} "
    )
    return RunRanks(content, text + "layers that are scored, more than it will be", settings)


def _compute(config: RunConfig, settings: RankSettings) -> RunRanks:
    """Compute and cache ranks, or take those that another run computed meanwhile. On one process."""
    from polar.build_model import unpartitioned
    from polar.ranks import compute_ranks, default_cache

    cached = _cache_file(config, settings)
    try:
        with locked(cached):
            if not cached.is_file():
                with unpartitioned(config):
                    content, _ = compute_ranks(
                        str(config.model.model_name_or_path),
                        settings,
                        revision=config.model.revision,
                        device="cuda" if config.training.device.type == "cuda" else "cpu",
                        cache=default_cache(),
                    )
                write_json(cached, content)
    except OSError as error:
        raise UserError(f"cannot keep ranks in {cached.parent}: {error}: set POLAR_CACHE to another folder") from error
    return _from_file(cached, f"computed ({cached})")


def _cache_file(config: RunConfig, settings: RankSettings) -> Path:
    from polar.ranks import default_cache

    base = _base_identity(str(config.model.model_name_or_path), config.model.revision)
    identity = json.dumps([FORMAT, base, dataclasses.asdict(settings)], sort_keys=True)
    return default_cache().parent / "ranks" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"


def _base_identity(name: str, revision: str | None) -> list[Any]:
    """What changes when the weights do: a hub model's commit; of a folder the files, their sizes and times."""
    from polar.base_checkpoint import resolve_base

    if not Path(name).is_dir():
        return [name, resolve_base(name, revision).name]  # .../snapshots/COMMIT
    files = sorted(file for file in Path(name).resolve().iterdir() if file.suffix in (".json", ".safetensors"))
    return [str(Path(name).resolve()), [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]]

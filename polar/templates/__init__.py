"""Prompt templates: data files that training and scoring both read, so that their prompts cannot differ.

A template is a YAML mapping:

    prompt:             text with {instruction}, and {input} if the template has no prompt_with_input
    prompt_with_input:  optional; used instead when the row's extra input is not empty
    separator:          what stands between prompt and response; it is learned with the response, and it is lm-eval's
                        `target_delimiter`. Absent: the response follows word for word, its own white space included

`{instruction}` and `{input}` are the only placeholders; every other brace is text, in templates and in rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from polar.errors import UserError
from polar.rows import request_of
from polar.strict_yaml import load_yaml

FOLDER = Path(__file__).parent
_KEYS = {"description", "prompt", "prompt_with_input", "separator"}
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]+)\}")


@dataclass(frozen=True)
class Template:
    """One way to turn a row into a prompt and a response. See the module's docstring for the fields."""

    name: str
    prompt_text: str
    prompt_with_input: str | None = None
    separator: str | None = None

    def prompt(self, fields: Mapping[str, object]) -> str:
        """Return the prompt of a row, for training and for scoring: it never ends in white space.

        Tokenizers treat white space at the end of a prompt differently from the same white space before a response,
        and lm-eval moves it to the response; so it is always part of the response here (`full_response`).

        Args:
            fields: `instruction` and, optionally, `input`; or a row in any of the known formats, whose response may
                be missing (`{"question": ...}` of GSM8K, `{"query": ...}` of MetaMathQA, ...).
        """
        return self._fill(fields).rstrip()

    def full_response(self, fields: Mapping[str, object], response: str) -> str:
        """Return what follows `prompt(fields)` word for word: separator, then response, without EOS."""
        if self.separator is not None:
            return self.separator + response.strip()
        filled = self._fill(fields)
        return filled[len(filled.rstrip()) :] + response

    def _fill(self, fields: Mapping[str, object]) -> str:
        instruction, extra = request_of(fields)
        text = self.prompt_text
        if self.prompt_with_input is not None and extra.strip():
            text = self.prompt_with_input
        values = {"instruction": instruction, "input": extra}
        return _PLACEHOLDER.sub(lambda match: values[match[1]], text)  # one pass: braces in rows stay text


def template_names() -> list[str]:
    """Return the names of the templates that ship with polar."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_template(name_or_path: str) -> Template:
    """Read a template by name, or from a YAML file when the argument is a path.

    Raises:
        UserError: no such template, an unknown key or placeholder, no {instruction}.
    """
    path = Path(name_or_path).expanduser()
    if not (path.suffix in (".yaml", ".yml") or "/" in name_or_path):
        path = FOLDER / f"{name_or_path}.yaml"
        if not path.is_file():
            known = ", ".join(template_names())
            raise UserError(f"template {name_or_path!r}: no such template: use {known}, or the path of a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"template {name_or_path}: cannot read it: {error}") from None
    content = load_yaml(text, str(name_or_path))
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
        raise UserError(f"template {name_or_path}: it needs a key `prompt` with the text of the prompt")
    for key, value in content.items():
        if key not in _KEYS:
            raise UserError(f"template {name_or_path}: unknown key {key!r}: use {', '.join(sorted(_KEYS))}")
        if not isinstance(value, str | None):
            raise UserError(f"template {name_or_path}: {key} is {value!r}: it must be text")
    with_input, separator = content.get("prompt_with_input"), content.get("separator")
    for key, prompt in (("prompt", content["prompt"]), ("prompt_with_input", with_input)):
        if prompt is not None:
            _check_placeholders(f"template {name_or_path}: {key}", prompt)
    return Template(path.stem, content["prompt"], with_input, separator)


def trained_template(folder: Path) -> str | None:
    """Return the template that an adapter or merged model was trained with; None where nothing in its folder says it.

    Args:
        folder: run folder, adapter or checkpoint in it (the run's config.yaml), or an export (its report).

    Raises:
        UserError: such a file that cannot be read.
    """
    reports = [folder / f"polar_{command}.json" for command in ("export", "convert", "combine")]
    for candidate in (*reports, folder / "config.yaml", folder.parent / "config.yaml"):
        if candidate.is_file():  # JSON is YAML
            content = load_yaml(candidate.read_text(encoding="utf-8"), str(candidate))
            template = content.get("template") if isinstance(content, dict) else None
            return str(template) if template else None
    return None


def _check_placeholders(where: str, prompt: str) -> None:
    found = set(_PLACEHOLDER.findall(prompt))
    if unknown := found - {"instruction", "input"}:
        raise UserError(f"{where}: unknown placeholder {{{min(unknown)}}}: use {{instruction}} and {{input}}")
    if "instruction" not in found:
        raise UserError(f"{where}: it has no {{instruction}}, so every row would get the same prompt")

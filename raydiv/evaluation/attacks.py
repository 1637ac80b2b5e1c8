"""Ways to ask: directly, or as someone would who wants an answer that the model should not give.

Harmless prompts are always asked directly. raydiv ships no jailbreak texts: templates and suffixes are the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raydiv.config.cluster import ClusterConfig
from raydiv.config.evaluate import AttackConfig
from raydiv.data.formats import BadRow, text_field
from raydiv.data.prompt_sets import Prompt
from raydiv.data.readers import iterate_records
from raydiv.evaluation.generate import Request
from raydiv.model.chat import Messages
from raydiv.model.load import ModelSource
from raydiv.runtime.actor_pool import Progress, no_progress
from raydiv.utils.errors import UserError

DIRECT = "direct"

PLACE = "{prompt}"
"""Where a template has the prompt."""

FILED = {"templates": ("template", PLACE), "suffixes": ("suffix", "")}
"""The attacks that have a file: its column, and what each of its texts needs."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to ask prompt number ``prompt``."""

    prompt_index: int
    attack: str
    request: Request


def direct_attempts(prompts: Sequence[Prompt]) -> list[Attempt]:
    """Every prompt as it is."""
    return [Attempt(number, DIRECT, Request(prompt.text)) for number, prompt in enumerate(prompts)]


def attack_attempts(
    attack: AttackConfig,
    prompts: Sequence[Prompt],
    model: ModelSource,
    cluster: ClusterConfig,
    progress: Progress = no_progress,
) -> list[Attempt]:
    """The harmful prompts under an attack, once for each text of its file; needs a Ray session for gcg."""
    harmful = [
        (number, prompt)
        for number, prompt in enumerate(prompts)
        if prompt.harmful and (attack.only is None or prompt.set in attack.only)
    ]
    if attack.kind == "gcg":
        from raydiv.evaluation.gcg import search_suffixes

        found = search_suffixes(model, [prompt.text for _, prompt in harmful], attack, cluster, progress)
        return [
            Attempt(number, "gcg", Request(with_suffix(prompt.text, suffix)))
            for (number, prompt), suffix in zip(harmful, found, strict=True)
        ]
    return [Attempt(number, attack.kind, ask(prompt.text)) for ask in _ways(attack) for number, prompt in harmful]


def check_attacks(attacks: Sequence[AttackConfig], prompts: Sequence[Prompt]) -> None:
    """Raises UserError for an attack whose file cannot be used, whose library is missing, or that would attack nothing."""
    harmful = dict.fromkeys(prompt.set for prompt in prompts if prompt.harmful)
    for attack in attacks:
        for name in attack.only or []:
            if name not in harmful:
                raise UserError(
                    f"evaluate.attacks: {attack.kind}: only: {name} is no set with harmful prompts (those that are: "
                    f"{', '.join(harmful) or 'none'})"
                )
        if attack.kind == "gcg":
            from raydiv.evaluation.gcg import require_nanogcg

            require_nanogcg()
        else:
            _ways(attack)


def attack_texts(attacks: Sequence[AttackConfig]) -> list[list[str]]:
    """The texts of each attack's file, as they are now; none of an attack without a file."""
    return [_texts(attack, *FILED[attack.kind]) if attack.kind in FILED else [] for attack in attacks]


def with_suffix(prompt: str | Messages, suffix: str) -> str | Messages:
    """A prompt with something after it."""
    return _changed(prompt, lambda said: f"{said} {suffix}")


Way = Callable[[str | Messages], Request]


def _ways(attack: AttackConfig) -> list[Way]:
    """How an attack asks, once for each text of its file."""
    if attack.kind == "prefill":
        return [lambda prompt: Request(prompt, opening=attack.opening)]
    if attack.kind == "templates":
        return [_in_template(template) for template in _texts(attack, *FILED[attack.kind])]
    if attack.kind == "suffixes":
        return [_before_suffix(suffix) for suffix in _texts(attack, *FILED[attack.kind])]
    raise AssertionError(f"nobody knows how to make the attack {attack.kind}")


def _in_template(template: str) -> Way:
    return lambda prompt: Request(_changed(prompt, lambda said: template.replace(PLACE, said)))


def _before_suffix(suffix: str) -> Way:
    return lambda prompt: Request(with_suffix(prompt, suffix))


def _changed(prompt: str | Messages, change: Callable[[str], str]) -> str | Messages:
    """A prompt whose last user's turn is changed."""
    if isinstance(prompt, str):
        return change(prompt)
    last = max(number for number, turn in enumerate(prompt) if turn["role"] == "user")
    return [{**turn, "content": change(turn["content"])} if n == last else turn for n, turn in enumerate(prompt)]


def _texts(attack: AttackConfig, column: str, needed: str) -> list[str]:
    """The texts of an attack's file, each with what it needs in it."""
    assert attack.file is not None, "the recipe sees to it"
    found = []
    for where, record in iterate_records(attack.file):
        try:
            # a line of plain text is read as a prompt
            own = text_field(record, column if column in record else "prompt")
        except BadRow as error:
            raise UserError(f"{where}: {error} (a text file, or records with a column {column})") from None
        if needed not in own:
            raise UserError(f"{where}: a {column} needs {needed} where the prompt goes")
        found.append(own)
    if not found:
        raise UserError(f"evaluate.attacks: {attack.file.path}: holds no {column}")
    return found

"""Attacks: requests that try to get an answer that the model should refuse, and direct requests.

Harmless prompts are only asked directly, but for the control of prefill-depth. raydiv ships no jailbreak texts: users
bring their own templates and suffixes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from raydiv.config.cluster import ClusterConfig
from raydiv.config.evaluate import AttackConfig, CutConfig
from raydiv.config.source import Source
from raydiv.data.fields import BadRow, text_field
from raydiv.data.prompt_sets import Prompt, last_user_text
from raydiv.data.readers import iterate_records
from raydiv.evaluation.generate import Request
from raydiv.model.chat import Chat, ChatPrompt, Conversation, as_messages
from raydiv.model.load import ModelSource
from raydiv.utils.errors import UserError
from raydiv.utils.progress import Progress, no_progress

DIRECT = "direct"

PLACEHOLDER = "{prompt}"
"""Stands for the prompt in a template."""

FILE_ATTACKS = {"templates": ("template", PLACEHOLDER), "suffixes": ("suffix", "")}
"""Attacks that read a file: its column, and what each text must contain."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request for the prompt at ``prompt_index``."""

    prompt_index: int
    attack: str
    request: Request


def direct_attempts(prompts: Sequence[Prompt]) -> list[Attempt]:
    """Every prompt, unchanged."""
    return [Attempt(number, DIRECT, Request(prompt.text)) for number, prompt in enumerate(prompts)]


def attack_attempts(
    attack: AttackConfig,
    prompts: Sequence[Prompt],
    model: ModelSource,
    cluster: ClusterConfig,
    progress: Progress = no_progress,
    answers: Answers | None = None,
) -> list[Attempt]:
    """The harmful prompts under an attack, once per text of its file; gcg needs a Ray session.

    With prefill-depth, the prompts that have one of ``answers``. To harmless ones the answer, cut as well, must not
    turn into a refusal.
    """
    attacked = [
        (number, prompt) for number, prompt in enumerate(prompts) if attack.only is None or prompt.set in attack.only
    ]
    harmful = [(number, prompt) for number, prompt in attacked if prompt.harmful]
    if attack.cut is not None:
        return _cut_attempts(attack.cut, attacked, model.chat(), answers or {})
    if attack.kind == "gcg":
        from raydiv.evaluation.gcg import search_suffixes

        suffixes = search_suffixes(model, [prompt.text for _, prompt in harmful], attack, cluster, progress)
        return [
            Attempt(number, "gcg", Request(with_suffix(prompt.text, suffix)))
            for (number, prompt), suffix in zip(harmful, suffixes, strict=True)
        ]
    if attack.kind == "forged-turn":
        forged = model.chat().forged_turn(attack.opening)
        return [
            Attempt(number, attack.kind, Request(with_suffix(prompt.text, forged, ""), control_tokens=True))
            for number, prompt in harmful
        ]
    return [
        Attempt(number, attack.kind, build(prompt.text))
        for build in _request_builders(attack)
        for number, prompt in harmful
    ]


Answers = dict[str, str]
"""An answer by the text of a prompt's last user turn."""


def _cut_attempts(cut: CutConfig, prompts: Sequence[tuple[int, Prompt]], chat: Chat, answers: Answers) -> list[Attempt]:
    """The prompts that have an answer, which is begun with its first tokens; once for each depth."""
    given = {text: chat.text_ids(answer) for text, answer in answers.items()}
    return [
        Attempt(number, f"prefill@{depth}", Request(prompt.text, opening=chat.tokenizer.decode(ids[:depth])))
        for depth in cut.depth
        for number, prompt in prompts
        if (ids := given.get(last_user_text(prompt))) is not None
    ]


def read_answers(source: Source) -> Answers:
    """The given answer to each prompt; of several the first. Raises UserError for an invalid file."""
    answers: Answers = {}
    for where, record in iterate_records(source):
        try:
            answers.setdefault(text_field(record, "prompt"), text_field(record, "response"))
        except BadRow as error:
            raise UserError(f"{where}: {error} (records of prompt and response)") from None
    return answers


def without_answer(cut: CutConfig, prompts: Sequence[Prompt], answers: Answers) -> list[str]:
    """A note on the harmful prompts without an answer, which prefill-depth does not attack."""
    harmful = [prompt for prompt in prompts if prompt.harmful]
    missing = sum(last_user_text(prompt) not in answers for prompt in harmful)
    if not missing:
        return []
    giver = "the reference, sampled once, gave no unsafe" if cut.texts is None else f"{cut.texts.path} has no"
    return [f"prefill-depth: {giver} answer to {missing} of {len(harmful)} harmful prompts, which it did not attack"]


def check_attacks(attacks: Sequence[AttackConfig], prompts: Sequence[Prompt]) -> None:
    """Raises UserError for an attack whose file is invalid, whose library is missing, or that applies to no prompt."""
    harmful = dict.fromkeys(prompt.set for prompt in prompts if prompt.harmful)
    for attack in attacks:
        for name in attack.only or []:
            if name not in harmful:
                raise UserError(
                    f"evaluate.attacks: {attack.kind}: only: {name} is not a set with harmful prompts (sets that are: "
                    f"{', '.join(harmful) or 'none'})"
                )
        if attack.kind == "gcg":
            from raydiv.evaluation.gcg import require_nanogcg

            require_nanogcg()
        elif attack.cut is not None:
            if attack.cut.texts is None:
                continue
            given = read_answers(attack.cut.texts)
            if not any(prompt.harmful and last_user_text(prompt) in given for prompt in prompts):
                raise UserError(
                    f"evaluate.attacks: prefill: texts: {attack.cut.texts.path}: has an answer to none of the harmful "
                    "prompts; its prompts must be those of evaluate.prompts"
                )
        elif attack.kind != "forged-turn":
            _request_builders(attack)


def attack_texts(attacks: Sequence[AttackConfig]) -> list[list[str]]:
    """The current texts of each attack's file; none for an attack without a file."""
    return [_texts_of(attack) for attack in attacks]


def _texts_of(attack: AttackConfig) -> list[str]:
    if attack.cut is not None and attack.cut.texts is not None:
        return [text for pair in read_answers(attack.cut.texts).items() for text in pair]
    return _read_texts(attack, *FILE_ATTACKS[attack.kind]) if attack.kind in FILE_ATTACKS else []


def with_suffix(prompt: ChatPrompt, suffix: str, separator: str = " ") -> ChatPrompt:
    """A prompt followed by a suffix."""
    return _edit_last_user_turn(prompt, lambda content: f"{content}{separator}{suffix}")


RequestBuilder = Callable[[ChatPrompt], Request]


def _request_builders(attack: AttackConfig) -> list[RequestBuilder]:
    """One request builder per text of an attack's file."""
    if attack.kind == "prefill":
        return [lambda prompt: Request(prompt, opening=attack.opening)]
    if attack.kind == "templates":
        return [_in_template(template) for template in _read_texts(attack, *FILE_ATTACKS[attack.kind])]
    if attack.kind == "suffixes":
        return [_before_suffix(suffix) for suffix in _read_texts(attack, *FILE_ATTACKS[attack.kind])]
    raise AssertionError(f"unknown attack {attack.kind}")


def _in_template(template: str) -> RequestBuilder:
    return lambda prompt: Request(_edit_last_user_turn(prompt, lambda content: template.replace(PLACEHOLDER, content)))


def _before_suffix(suffix: str) -> RequestBuilder:
    return lambda prompt: Request(with_suffix(prompt, suffix))


def _edit_last_user_turn(prompt: ChatPrompt, change: Callable[[str], str]) -> ChatPrompt:
    """A prompt with its last user turn changed."""
    if isinstance(prompt, str):
        return change(prompt)
    messages = as_messages(prompt)
    last = max(number for number, turn in enumerate(messages) if turn["role"] == "user")
    edited = [{**turn, "content": change(turn["content"])} if n == last else turn for n, turn in enumerate(messages)]
    return replace(prompt, messages=edited) if isinstance(prompt, Conversation) else edited


def _read_texts(attack: AttackConfig, column: str, needed: str) -> list[str]:
    """The texts of an attack's file. Raises UserError for one without ``needed``, and for a file without texts."""
    assert attack.file is not None, "AttackConfig requires a file"
    texts = []
    for where, record in iterate_records(attack.file):
        try:
            # the lines of a text file are read as prompts
            content = text_field(record, column if column in record else "prompt")
        except BadRow as error:
            raise UserError(f"{where}: {error} (a text file, or records with a column {column})") from None
        if needed not in content:
            raise UserError(f"{where}: a {column} must contain {needed}, which stands for the prompt")
        texts.append(content)
    if not texts:
        raise UserError(f"evaluate.attacks: {attack.file.path}: no {column} in it")
    return texts

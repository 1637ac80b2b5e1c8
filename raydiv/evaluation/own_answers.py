"""Answers that prefill-depth begins with: given ones, else the reference's own, sampled, judged and kept."""

from __future__ import annotations

import json
from collections.abc import Sequence

from raydiv.config.cluster import ClusterConfig
from raydiv.config.evaluate import CutConfig, EvaluateConfig
from raydiv.data.prompt_sets import Prompt, last_user_text
from raydiv.evaluation.attacks import Answers, read_answers
from raydiv.evaluation.generate import Request, generate
from raydiv.evaluation.judges.harm_judge import HarmJudge
from raydiv.evaluation.refusal import is_refusal
from raydiv.evaluation.vllm_engine import Vllm
from raydiv.model.load import ModelSource
from raydiv.utils.cache import code_digest, digest, shared_dir
from raydiv.utils.progress import Progress, no_progress
from raydiv.utils.storage import open_input


def answers_to_begin_with(
    cut: CutConfig,
    reference: ModelSource,
    prompts: Sequence[Prompt],
    judge: HarmJudge,
    config: EvaluateConfig,
    cluster: ClusterConfig,
    progress: Progress = no_progress,
) -> Answers:
    """An answer by the text of each prompt that has one; needs a Ray session where no file gives them.

    Without ``texts`` they are sampled from the reference, one for each prompt with a seed of its own. Of these the
    unsafe ones to harmful prompts count, and to harmless prompts those that are no refusals. They are kept in the
    cache, by model, prompts, judge and length: all models that are compared are attacked with the same.
    """
    if cut.texts is not None:
        return read_answers(cut.texts)
    length = max(*cut.depth, config.max_new_tokens)
    texts = [last_user_text(prompt) for prompt in prompts]
    settings = (reference.precision, reference.quantization, judge.label, length, code_digest("evaluation", "model"))
    folder = shared_dir("own-answers")
    name = f"{digest(reference.fingerprint(), reference.chat().fingerprint, texts, *settings)}.json"
    if folder.has(name):
        with open_input(folder.uri_of(name)) as file:
            return dict(json.loads(file.read()))
    requests = [
        Request(prompt.text, seed=int(digest(text)[:8], 16)) for prompt, text in zip(prompts, texts, strict=True)
    ]
    engine = Vllm(config.tensor_parallel) if config.engine == "vllm" else None
    generated = generate(reference, requests, length, cluster, progress, engine)
    written = [answer.written for answer in generated]
    answers = {}
    for text, prompt, answer, judgement in zip(texts, prompts, written, judge(prompts, written, cluster), strict=True):
        verdict = judgement.verdict(refused=is_refusal(answer), broken=not answer.strip())
        if verdict == "unsafe" if prompt.harmful else verdict in ("safe", "unsafe"):
            answers[text] = answer
    folder.write(name, json.dumps(answers).encode())
    return answers

"""TRL on the steps of a raydiv run: what ``raydiv bench --against trl`` compares with.

A script of its own process (see `harness`), which besides the work is told ``per_device``, the examples (pairs,
of a paired loss) that a forward takes. The trainer is TRL's own, fed text: what raydiv's token ids spell.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from raydiv.utils.errors import UserError

PAIRED = {
    "dpo": "sigmoid",
    "rdpo": "robust",
    "slic": "hinge",
    "ipo": "ipo",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "bco-pair": "bco_pair",
    "sppo": "sppo_hard",
    "aot": "aot",
    "aot-unpaired": "aot_unpaired",
    "apo-zero": "apo_zero",
    "apo-down": "apo_down",
    "discopop": "discopop",
    "sigmoid-norm": "sigmoid_norm",
    "sft": "sft",
}
"""Our losses, and what DPOTrainer calls them."""

UNPAIRED = {"kto": "kto", "apo-zero-unpaired": "apo_zero_unpaired"}
"""The same of KTOTrainer, which mixes nothing in."""


def counterpart(loss: Mapping[str, Any]) -> dict[str, Any]:
    """What TRL's config says for a recipe's ``loss`` section; options that it lacks, and that cost no time, are left out.

    Raises UserError for a loss that TRL does not have.
    """
    mix = loss["mix"]
    if loss["type"] in UNPAIRED and not mix:
        return {"loss_type": UNPAIRED[loss["type"]], "beta": loss["beta"]}
    terms = {loss["type"]: {**loss, "weight": 1.0}, **mix}
    for name in terms:
        if name not in PAIRED:
            raise UserError(
                f"--against trl: TRL's DPOTrainer has no {name} to compare with (it has {', '.join(sorted(PAIRED))}; its "
                f"KTOTrainer, with nothing mixed in, {' and '.join(UNPAIRED)})"
            )
    shared = {name: one[name] for one in (*mix.values(), loss) for name in ("beta", "label_smoothing") if name in one}
    weights = [one["weight"] for one in terms.values()]
    return {"loss_type": [PAIRED[name] for name in terms], "loss_weights": weights, **shared}


def per_device_sizes(loss: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> list[int]:
    """The batch sizes of 1, 2, 4 and 8 at which TRL can make these steps.

    Raises UserError where it can at none, since it takes equally many pairs, or lone examples, at every step.
    """
    paired = loss["type"] in PAIRED
    sizes = [len(step["examples"]) for step in steps]
    if len(set(sizes)) > 1:
        raise UserError(
            f"--against trl: the timed steps have {', '.join(map(str, sizes))} examples, and TRL takes equally many at every "
            "step: time fewer steps than an epoch has"
        )
    if paired and any(one["pair"] < 0 for step in steps for one in step["examples"]):
        raise UserError(f"--against trl: DPOTrainer takes pairs for {loss['type']}, and some examples have no partner")
    units = sizes[0] // (2 if paired else 1)
    # KTO's estimate of the KL needs a neighbour
    least = 2 if loss["type"] == "kto" else 1
    return [size for size in (1, 2, 4, 8) if size >= least and units % size == 0]


def rows_of(steps: Sequence[Mapping[str, Any]], tokenizer: Any, paired: bool) -> list[dict[str, Any]]:
    """The examples of all steps in TRL's formats, in order: pairs, or each with its label."""
    examples = [(number, one) for number, step in enumerate(steps) for one in step["examples"]]
    texts = [_texts(one, tokenizer) for _, one in examples]
    if not paired:
        return [
            {"prompt": prompt, "completion": response, "label": one["aligned"]}
            for (_, one), (prompt, response) in zip(examples, texts, strict=True)
        ]
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for (number, one), (prompt, response) in zip(examples, texts, strict=True):
        row = rows.setdefault((number, one["pair"]), {"prompt": prompt})
        row["chosen" if one["aligned"] else "rejected"] = response
    return list(rows.values())


def _texts(example: Mapping[str, Any], tokenizer: Any) -> tuple[str, str]:
    """Prompt and response as text, without the BOS that the tokenizer will put and the EOS that TRL will."""
    prompt, response = example["prompt_ids"], example["response_ids"]
    if prompt[:1] == tokenizer("").input_ids[:1]:
        prompt = prompt[1:]
    if response[-1:] == [tokenizer.eos_token_id]:
        response = response[:-1]
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    return decode(prompt), decode(response)


def main(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train on the steps; ``seconds`` and ``tokens`` (by TRL's attention masks) of each, and ``peak_bytes``."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    from raydiv.training.metrics import peak_memory

    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], trust_remote_code=settings["trust_remote_code"])
    paired = settings["loss"]["type"] in PAIRED
    rows = rows_of(settings["steps"], tokenizer, paired)
    accumulated = len(rows) // len(settings["steps"]) // settings["per_device"]
    trainer = _trainer(settings, folder, accumulated, Dataset.from_list(rows), tokenizer)
    counting = trainer.data_collator = _Counting(trainer.data_collator)
    clock = _clock()
    trainer.add_callback(clock)
    trainer.train()
    return {"seconds": clock.seconds, "tokens": counting.steps(accumulated), "peak_bytes": peak_memory()}


def _trainer(settings: Mapping[str, Any], folder: Path, accumulated: int, data: Any, tokenizer: Any) -> Any:
    import trl

    from raydiv.config.recipe import LoraConfig
    from raydiv.model.load import implementation, lora_config

    kind = "DPO" if settings["loss"]["type"] in PAIRED else "KTO"
    config, trainer = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    bf16, lora = settings["precision"] == "bf16", settings["lora"]
    arguments = config(
        output_dir=str(folder),
        per_device_train_batch_size=settings["per_device"],
        gradient_accumulation_steps=accumulated,
        max_steps=len(settings["steps"]),
        train_sampling_strategy="sequential",
        max_length=settings["max_length"],
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=1,  # not timed, and the fewer the less padding
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        adam_beta1=settings["betas"][0],
        adam_beta2=settings["betas"][1],
        adam_epsilon=settings["eps"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["clip"] or 0.0,
        disable_dropout=False,
        gradient_checkpointing=settings["activation_checkpointing"],
        bf16=bf16,
        use_cpu=not settings["use_gpu"],
        dataloader_pin_memory=settings["use_gpu"],
        # under bf16 the weights that are trained stay in fp32, as raydiv's master weights do
        model_init_kwargs={
            "dtype": "bfloat16" if bf16 and lora else "float32",
            "attn_implementation": implementation(settings["attention"]),
            "trust_remote_code": settings["trust_remote_code"],
        },
        seed=settings["seed"],
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        **counterpart(settings["loss"]),
    )
    adapters = lora_config(LoraConfig.model_validate(lora)) if lora else None
    return trainer(
        settings["model"], args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=adapters
    )


class _Counting:
    """A collator that counts the tokens of its batches."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator
        self._tokens: list[int] = []

    def __call__(self, examples: Any) -> Any:
        batch = self._collator(examples)
        self._tokens.append(int(batch["attention_mask"].sum()))
        return batch

    def steps(self, batches: int) -> list[int]:
        """Tokens of each step of ``batches``."""
        return [sum(self._tokens[start : start + batches]) for start in range(0, len(self._tokens), batches)]


def _clock() -> Any:
    """A callback with the ``seconds`` of each step, from its first forward until its update is done."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self._started)

    return Clock()


if __name__ == "__main__":
    given = Path(sys.argv[1])
    print(json.dumps(main(json.loads(given.read_text()), given.parent / "trl")))

"""The TRL baseline of ``raydiv bench --against trl``: TRL's trainer on the steps of a raydiv run.

A script for a separate process (see `harness`). Its settings also have ``per_device``, the examples (pairs for a paired
loss) of a forward. TRL's own trainer gets text: the decoded token ids of raydiv.
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

PAIRED_LOSSES = {
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
"""raydiv's name of a loss -> DPOTrainer's."""

UNPAIRED_LOSSES = {"kto": "kto", "apo-zero-unpaired": "apo_zero_unpaired"}
"""raydiv's name of a loss -> KTOTrainer's, which has no mixed losses."""


def trl_loss_options(loss: Mapping[str, Any]) -> dict[str, Any]:
    """TRL's options for a recipe's ``loss`` section. Options that TRL lacks and that cost no time are left out.

    Raises UserError for a loss that TRL does not have.
    """
    mix = loss["mix"]
    if loss["type"] in UNPAIRED_LOSSES and not mix:
        return {"loss_type": UNPAIRED_LOSSES[loss["type"]], "beta": loss["beta"]}
    terms = {loss["type"]: {**loss, "weight": 1.0}, **mix}
    for name in terms:
        if name not in PAIRED_LOSSES:
            raise UserError(
                f"--against trl: {name}: not a loss of TRL's DPOTrainer ({', '.join(sorted(PAIRED_LOSSES))}) or "
                f"KTOTrainer without loss.mix ({', '.join(UNPAIRED_LOSSES)})"
            )
    shared = {key: term[key] for term in (*mix.values(), loss) for key in ("beta", "label_smoothing") if key in term}
    weights = [term["weight"] for term in terms.values()]
    return {"loss_type": [PAIRED_LOSSES[name] for name in terms], "loss_weights": weights, **shared}


def per_device_sizes(loss: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> list[int]:
    """The per-device batch sizes among 1, 2, 4 and 8 with which TRL can make these steps.

    Raises UserError if the steps differ in size or a paired loss has unpaired examples, which TRL does not support.
    """
    paired = loss["type"] in PAIRED_LOSSES
    sizes = [len(step["examples"]) for step in steps]
    if len(set(sizes)) > 1:
        raise UserError(
            f"--against trl: the timed steps have {', '.join(map(str, sizes))} examples, and TRL needs steps of equal "
            "size: time fewer steps than an epoch has"
        )
    if paired and any(example["pair"] < 0 for step in steps for example in step["examples"]):
        raise UserError(f"--against trl: DPOTrainer needs pairs for {loss['type']}, and some examples are unpaired")
    units = sizes[0] // (2 if paired else 1)
    # KTO's estimate of the KL needs a neighbour
    least = 2 if loss["type"] == "kto" else 1
    return [size for size in (1, 2, 4, 8) if size >= least and units % size == 0]


def trl_rows(steps: Sequence[Mapping[str, Any]], tokenizer: Any, paired: bool) -> list[dict[str, Any]]:
    """The examples of all steps in TRL's formats, in order: pairs, or single examples with their label."""
    examples = [(number, example) for number, step in enumerate(steps) for example in step["examples"]]
    texts = [_texts(example, tokenizer) for _, example in examples]
    if not paired:
        return [
            {"prompt": prompt, "completion": response, "label": example["aligned"]}
            for (_, example), (prompt, response) in zip(examples, texts, strict=True)
        ]
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for (number, example), (prompt, response) in zip(examples, texts, strict=True):
        row = rows.setdefault((number, example["pair"]), {"prompt": prompt})
        row["chosen" if example["aligned"] else "rejected"] = response
    return list(rows.values())


def _texts(example: Mapping[str, Any], tokenizer: Any) -> tuple[str, str]:
    """Prompt and response as text, without the BOS that the tokenizer adds and the EOS that TRL adds."""
    prompt, response = example["prompt_ids"], example["response_ids"]
    if prompt[:1] == tokenizer("").input_ids[:1]:
        prompt = prompt[1:]
    if response[-1:] == [tokenizer.eos_token_id]:
        response = response[:-1]
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    return decode(prompt), decode(response)


def main(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train on the steps. Returns ``seconds`` and ``tokens`` (TRL's attention masks) of each, and ``peak_bytes``."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    from raydiv.training.metrics import peak_memory

    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], trust_remote_code=settings["trust_remote_code"])
    paired = settings["loss"]["type"] in PAIRED_LOSSES
    rows = trl_rows(settings["steps"], tokenizer, paired)
    accumulation_steps = len(rows) // len(settings["steps"]) // settings["per_device"]
    trainer = _trainer(settings, folder, accumulation_steps, Dataset.from_list(rows), tokenizer)
    counter = trainer.data_collator = _TokenCounter(trainer.data_collator)
    clock = _step_clock()
    trainer.add_callback(clock)
    trainer.train()
    return {"seconds": clock.seconds, "tokens": counter.steps(accumulation_steps), "peak_bytes": peak_memory()}


def _trainer(settings: Mapping[str, Any], folder: Path, accumulation_steps: int, data: Any, tokenizer: Any) -> Any:
    import trl

    from raydiv.config.recipe import LoraConfig
    from raydiv.model.load import attn_implementation, lora_config

    kind = "DPO" if settings["loss"]["type"] in PAIRED_LOSSES else "KTO"
    config, trainer = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    bf16, lora = settings["precision"] == "bf16", settings["lora"]
    arguments = config(
        output_dir=str(folder),
        per_device_train_batch_size=settings["per_device"],
        gradient_accumulation_steps=accumulation_steps,
        max_steps=len(settings["steps"]),
        train_sampling_strategy="sequential",
        max_length=settings["max_length"],
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=1,  # not timed; size 1 needs no padding
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
        # under bf16 the trained weights stay in fp32, like raydiv's master weights
        model_init_kwargs={
            "dtype": "bfloat16" if bf16 and lora else "float32",
            "attn_implementation": attn_implementation(settings["attention"]),
            "trust_remote_code": settings["trust_remote_code"],
        },
        seed=settings["seed"],
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        **trl_loss_options(settings["loss"]),
    )
    adapters = lora_config(LoraConfig.model_validate(lora)) if lora else None
    return trainer(
        settings["model"], args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=adapters
    )


class _TokenCounter:
    """A collator that counts the tokens of its batches."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator
        self._tokens: list[int] = []

    def __call__(self, examples: Any) -> Any:
        batch = self._collator(examples)
        self._tokens.append(int(batch["attention_mask"].sum()))
        return batch

    def steps(self, batches: int) -> list[int]:
        """Tokens of each step, which has ``batches`` batches."""
        return [sum(self._tokens[start : start + batches]) for start in range(0, len(self._tokens), batches)]


def _step_clock() -> Any:
    """A callback that records the ``seconds`` of each step, from its first forward to the end of its update."""
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
    settings_file = Path(sys.argv[1])
    print(json.dumps(main(json.loads(settings_file.read_text()), settings_file.parent / "trl")))

"""Objectives: pure functions of the global batch's log-probs (no collectives, no Ray, no torch at import).

A family is a file:

- kldo.py        KL by Donsker and Varadhan's bound: kldo (batch, ema, lagged; skew)
- fdo.py         any f-divergence by its variational bound: fdo
- classifier.py  the reward as a classifier's logit: bco, bco-pair, nca
- utility.py     saturating utilities: kto, apo-zero-unpaired, apo-zero, apo-down, npo
- preference.py  the difference of a pair's rewards: dpo, rdpo, slic, exo, discopop, sigmoid-norm
- regression.py  log-ratios on fixed targets: ipo, sppo
- transport.py   aligned and unaligned matched by rank: aot, aot-unpaired
- likelihood.py  no reference: sft, cpo, simpo, orpo
- penalty.py     to mix in: log-ratio-l2

position.py has what each token of a response counts, which serves any objective.

To add one, write one function in the file of its family, under ``@objective``. Its keyword-only parameters become the
recipe's ``loss`` section; the facts in the decorator feed validation and ``raydiv losses``.

Where the authors' KLDO code (github.com/rhaldarpurdue/KLDO, for arXiv 2502.00657) differs, and why raydiv does
otherwise:

- It takes log-mean-exp over the few unaligned examples of one micro-batch of one rank: a biased estimate, whose bias
  depends on the layout. Here every estimator sees the whole global batch.
- It sums over the batch for KTO, BCO and DPO and averages for KL. AdamW divides the scale out, but clipping,
  epsilon and a weighted sum of losses see it. Here each class, or the pairs, are averaged; weights of classes are
  options (lambda_aligned, lambda_unaligned).
- Its exp().mean().log() overflows for rewards above 88, and a backward divided by mean + 1e-6 vanishes below about -14.
  Here exponentials are taken through log-sum-exp; the gradient is a softmax at any reward.
- It updates the moving averages of BCO's delta and of the shift as m (1 - a) + a m, which never changes them. All of
  them are per rank, in linear space, with 0 for "unset"; evaluation changes them, each epoch restarts them, and no
  checkpoint has them. Here averages of exponentials are in log space. All start at the value that is exact while policy
  = reference, are the same on every rank, and are left alone by evaluation.
- Its ``normalize`` rescales the unaligned term by min(a, u) / u, which flips signs. Not offered.
- A class absent from a step gives NaN or a crash. Here it has no effect (raydiv.losses.numerics).
- Its label mask is off by tokens, since the templated prompt is no prefix of prompt and response; BOS is there in
  evaluation and not in training. Here prompt and response are tokenised separately and their ids joined
  (raydiv.model.chat), for both.
- Every rank trains on the same rows, every epoch in the same order. The learning rate's schedule counts examples
  instead of updates, and ends at 84-98% of its peak. See raydiv.data.batching and raydiv.training.schedule.
- Separation: one prompt a forward, PCA first, a determinant without its logarithm or a ridge, and anchors from the
  training prompts. See raydiv.evaluation.separation.metrics; the bundled anchors are never trained on.
- Attack success: answers are filtered by substrings of 32 tokens before a judge sees them, a judge's unreadable verdict
  counts as safe, and 88 of 100 evaluation prompts are in the training set. See raydiv.evaluation and
  raydiv/data/bundled/README.md.
"""

import importlib
import pkgutil

from raydiv.losses.objective import (
    OBJECTIVES,
    Batch,
    Objective,
    Scope,
    State,
    Term,
    Value,
    objective_names,
    widest_scope,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["OBJECTIVES", "Batch", "Objective", "Scope", "State", "Term", "Value", "objective_names", "widest_scope"]

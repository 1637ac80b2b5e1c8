"""``raydiv bench``: measurements of a recipe on this machine, part by part, in turns with plain baselines."""

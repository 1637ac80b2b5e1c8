"""``raydiv bench``: what this machine does with a recipe, part by part, side by side with the plain way."""

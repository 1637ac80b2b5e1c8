"""``raydiv study``: a grid of models, data and losses, its runs as Ray jobs, and their comparison."""

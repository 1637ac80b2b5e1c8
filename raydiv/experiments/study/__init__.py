"""``raydiv study``: cells of a grid, run as Ray jobs."""

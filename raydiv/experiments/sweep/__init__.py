"""``raydiv sweep``: Ray Tune over values of the recipe's keys."""

"""The forecast of a recipe: sizes of its model and data, memory of a worker, and the layout that fits."""

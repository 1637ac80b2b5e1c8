"""What a recipe needs, before anything is started: sizes of the model, memory of a worker, the layout that fits, and the plan."""

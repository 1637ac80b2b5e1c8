"""What a recipe needs, before anything is started: sizes of its model, memory of a worker, the layout that fits, the plan."""

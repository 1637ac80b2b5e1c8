"""What several tests share: models, runs and records made by hand, ranks, nodes. No test imports another test."""

"""Hidden states of prompts, and how far they separate safe from harmful ones."""

"""What a run logs, and what a person sees of it."""

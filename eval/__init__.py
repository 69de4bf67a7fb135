"""Scoring of base models and adapters with lm-eval; installed under the name `polar_eval`."""

"""Frozen models on text: samples, log-probs, scores, and rewards by Python functions."""

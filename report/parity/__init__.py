"""Parity: is it still the same model."""

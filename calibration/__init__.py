"""Calibration and quantisation: formats, statistics, algorithms."""

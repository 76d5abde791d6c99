"""Reports: is it still the same model, and how fast is it."""

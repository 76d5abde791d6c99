"""From a bundle to answers: preprocessing, stitching, KV cache, sampling, generation."""

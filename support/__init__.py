"""Plumbing that a reader of the papers may skip: faster kernels, generation, files, data, arguments, grading."""

"""GLM-4.5 you can read in an afternoon."""

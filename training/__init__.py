"""Training: recipes, mixtures, the VQ model, and Tabletop, the synthetic world of the default checkpoint."""
